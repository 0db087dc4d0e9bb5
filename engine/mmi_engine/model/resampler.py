"""Q-Former as a resampler: many features in, a fixed number of learnt queries out.

Used twice: after the visual trunk (patch features → the visual tokens that the language model reads; q/k norm, cross
attention in every second layer) and in front of the U-Net (hidden states of an image's context → its 77 condition
tokens; one layer, no q/k norm). The transformer is BLIP-2's Q-Former (Li et al. 2023, section 3.1) from the
transformers library; what is added here are the queries and, for the visual resampler, a LayerNorm over the head
dimension of queries and keys, shared by the heads of a layer. Source: docs/model.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mmi_engine.model.config import QFormerConfig


class HeadNormProjection(nn.Module):
    """A projection whose output is layer-normed separately in every attention head.

    ``[..., in_features]`` → ``[..., heads * head_dim]``; the norm's weight and bias ``[head_dim]`` serve all heads.
    It stands where an attention module of the library has its own query or key projection ``linear``.
    """

    def __init__(self, linear: nn.Linear, heads: int, eps: float) -> None:
        super().__init__()
        self.linear = linear
        self.heads = heads
        self.norm = nn.LayerNorm(linear.out_features // heads, eps=eps)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.linear(features).unflatten(-1, (self.heads, -1))).flatten(-2)


class QFormer(nn.Module):
    """Learnt queries that read a set of features through cross attention.

    Args:
        config: sizes; ``qk_norm`` adds the per-head norms, ``dropout`` acts on hidden states and attention.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        nn.init.normal_(self.queries, std=config.initializer_range)
        self.former = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_size,
                encoder_hidden_size=config.encoder_hidden_size,
                cross_attention_frequency=config.cross_attention_frequency,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.intermediate_size,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                layer_norm_eps=config.layer_norm_eps,
                initializer_range=config.initializer_range,
            )
        )
        if config.qk_norm:
            self._add_head_norms()

    def _add_head_norms(self) -> None:
        layers: list[Any] = list(self.former.encoder.layer)
        for layer in layers:
            blocks = [layer.attention, layer.crossattention] if layer.has_cross_attention else [layer.attention]
            for block in blocks:
                attention = block.attention
                heads, eps = self.config.num_heads, self.config.layer_norm_eps
                attention.query = HeadNormProjection(attention.query, heads, eps)
                attention.key = HeadNormProjection(attention.key, heads, eps)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read ``features`` with the learnt queries.

        Args:
            features: ``[B, K, encoder_hidden_size]``.
            mask: ``[B, K]``, 1 or True where a feature may be read, or ``None`` for all; at least one per row.

        Returns:
            ``[B, num_queries, hidden_size]``.
        """
        queries = self.queries.expand(features.shape[0], -1, -1)
        return self.former(
            query_embeds=queries,
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
        ).last_hidden_state
