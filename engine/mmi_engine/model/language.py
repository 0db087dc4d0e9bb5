"""The language model with MMFS: embeddings ``[B, T, d]`` and feature maps of images → hidden states ``[B, T, d]``.

A decoder-only model of the transformers library, used as it is; every ``mmfs_every``-th decoder layer is wrapped so
that MMFS runs between its self-attention and its FFN:  h += tanh(gate) · MMFS(RMSNorm(h), RMSNorm(F)).
The gate starts at 0, so a fresh assembly computes exactly what the unmodified language model computes.
Any library model whose layers have ``input_layernorm, self_attn, post_attention_layernorm, mlp`` fits (Llama, Mistral,
Qwen 2 and 3). Source: paper section 3.2; docs/model.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mmi_engine.errors import ModelError
from mmi_engine.model.config import LanguageConfig, SpecialTokens
from mmi_engine.model.dense import synchronizer
from mmi_engine.model.kept import Keeps
from mmi_engine.model.mmfs import Projecting, Shapes, project_all

ROOM = 64
"""Columns by which a KV cache grows at a time."""


@dataclass
class VisualContext:
    """What the language model's MMFS looks at.

    ``values``: one ``[B, M·S, H, D]`` per MMFS layer, in order; ``shapes``: (height, width) of the L maps of an image;
    ``visible``: ``[B, T, M]`` 0 / 1, or with another length than the queries its last row holds for all of them.
    """

    values: Sequence[Tensor]
    shapes: Shapes
    visible: Tensor


class RoomyLayer(DynamicLayer):
    """The library's cache layer, with room behind its columns: a step writes its own instead of copying all others.

    ``keys`` and ``values`` are views of the first columns of larger tensors; where another method put something else in
    their place, the next step makes room again.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See the library."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.room: tuple[Tensor, Tensor] = (self.keys, self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See the library."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, total = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        mine = all(
            part.data_ptr() == whole.data_ptr() and part.shape[:2] == whole.shape[:2] and total <= whole.shape[2]
            for part, whole in zip((self.keys, self.values), self.room, strict=True)
        )
        if not mine:
            self.room = (self._larger(self.keys, key_states, total), self._larger(self.values, value_states, total))
        for whole, new in zip(self.room, (key_states, value_states), strict=True):
            whole[:, :, held:total] = new
        self.keys, self.values = (whole[:, :, :total] for whole in self.room)
        return self.keys, self.values

    @staticmethod
    def _larger(old: Tensor, new: Tensor, columns: int) -> Tensor:
        rows, heads, _, width = new.shape
        whole = new.new_empty(rows, heads, columns + ROOM, width)
        whole[:, :, : old.shape[2]] = old
        return whole


class GatedMMFS(Projecting):
    """tanh(gate) · MMFS(RMSNorm(h), RMSNorm(F)), reference point in the middle of every image."""

    def __init__(self, config: LanguageConfig, d_model: int, d_value: int, eps: float) -> None:
        super().__init__()
        assert config.mmfs is not None
        self.query_norm = nn.RMSNorm(d_model, eps=eps)
        self.feature_norm = nn.RMSNorm(d_value, eps=eps)
        self.mmfs = synchronizer(config.mmfs, d_query=d_model, d_value=d_value, d_out=d_model, base=config.mmfs_base)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, values: Tensor, shapes: Shapes, visible: Tensor) -> Tensor:
        """``hidden`` ``[B, Q, d]`` → the term that is added to it."""
        reference = hidden.new_full((1, hidden.shape[1], 2), 0.5)
        return self.gate.tanh() * self.mmfs(self.query_norm(hidden), reference, values, shapes, visible)


class MMFSDecoderLayer(nn.Module):
    """A library decoder layer with MMFS between its attention and its FFN."""

    def __init__(self, layer: nn.Module, cross: GatedMMFS, order: int) -> None:
        super().__init__()
        self.layer, self.cross, self.order = layer, cross, order

    def forward(self, hidden_states: Tensor, *, visual: VisualContext | None = None, **kwargs: Any) -> Tensor:
        """Same call as the wrapped layer; ``visual`` None leaves MMFS out."""
        layer = self.layer
        hidden = hidden_states + layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
        if visual is not None:
            hidden = hidden + self.cross(hidden, visual.values[self.order], visual.shapes, visual.visible)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


class LanguageModel(Keeps):
    """Body of the language model with MMFS; embeddings are looked up by :meth:`embed`, logits by :class:`TextHead`.

    Args:
        config: sizes.
        tokens: special tokens; they fix the vocabulary.
        d_value: channels of the feature maps.
        body: the library's model without a head, to be used (and changed) instead of a fresh one.
    """

    def __init__(
        self, config: LanguageConfig, tokens: SpecialTokens, d_value: int, body: PreTrainedModel | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.lean = True  # single tokens may go through `generate/step.py`
        self.body = body or self._fresh_body(config, tokens)
        library: Any = self.body.config
        self.d_model = int(library.hidden_size)
        order = 0
        for index, layer in enumerate(self.body.layers if config.mmfs is not None else []):
            if index % config.mmfs_every == 0:
                cross = GatedMMFS(config, self.d_model, d_value, eps=float(library.rms_norm_eps))
                self.body.layers[index] = MMFSDecoderLayer(layer, cross, order)
                order += 1

    @staticmethod
    def _fresh_body(config: LanguageConfig, tokens: SpecialTokens) -> PreTrainedModel:
        settings = dict(config.transformers)
        family = settings.pop("model_type", None)
        if family is None:
            raise ModelError("language.transformers lacks model_type", remedy="name one, e.g. 'llama'")
        library = AutoConfig.for_model(family, **{**settings, "vocab_size": tokens.vocab_size, "pad_token_id": None})
        return AutoModel.from_config(library, attn_implementation="sdpa")

    @property
    def mmfs_layers(self) -> list[GatedMMFS]:
        """The MMFS blocks in the order of the layers."""
        return [layer.cross for layer in self.body.layers if isinstance(layer, MMFSDecoderLayer)]

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings ``[B, T, d]``."""
        return self.body.embed_tokens(ids)

    def visual_context(self, features: list[Tensor], visible: Tensor) -> VisualContext | None:
        """Project the feature maps ``[B, M, C, h_l, w_l]`` of a batch once for all MMFS layers; M may be 0."""
        if not self.mmfs_layers:
            return None
        if visible.shape[-1] == 0:  # no image in the whole batch: MMFS is a constant and reads no values
            return VisualContext([visible.new_empty(0)] * len(self.mmfs_layers), [], visible)
        maps = features[self.config.finest_map :]
        flat = torch.cat([m.flatten(3).transpose(2, 3) for m in maps], dim=2)  # (B, M, S, C)
        values = project_all(self.mmfs_layers, flat)
        return VisualContext(values, [(m.shape[3], m.shape[4]) for m in maps], visible)

    def picture_values(self, features: list[Tensor]) -> list[Tensor]:
        """One picture's maps ``[1, 1, C, h_l, w_l]`` as every MMFS layer projects them: ``[S, H, D]`` each."""
        if not self.mmfs_layers:
            return []
        flat = torch.cat([m.flatten(3).transpose(2, 3) for m in features[self.config.finest_map :]], dim=2)
        return [values[0] for values in project_all(self.mmfs_layers, flat)]

    def new_cache(self) -> DynamicCache:
        """An empty KV cache; see :class:`RoomyLayer`."""
        cache = DynamicCache(config=self.body.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def forward(
        self,
        embeds: Tensor,
        attention_mask: Tensor,
        visual: VisualContext | None,
        *,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states ``[B, T, d]`` after the final norm.

        Args:
            embeds: ``[B, T, d]``.
            attention_mask: ``[B, past + T]``, 1 = attend.
            visual: the images, or ``None``.
            position_ids: ``[B, T]``; ``None`` counts from 0 after what the cache holds.
            cache: KV cache to read and extend.
        """
        # Wrapped layers alone know the keyword, so it is not sent at all when there is nothing to see.
        extra = {} if visual is None else {"visual": visual}
        return self.body(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        ).last_hidden_state


class TextHead(nn.Module):
    """Next-token logits: a frozen linear map over all rows plus a trainable one for the two new rows, summed there.

    The frozen part starts with bias −100 on the new rows and the trainable part with +95, so a fresh model hardly ever
    opens an image; docs/model.md.
    """

    def __init__(self, d_model: int, tokens: SpecialTokens) -> None:
        super().__init__()
        self.first_new = tokens.boi
        self.head = nn.Linear(d_model, tokens.vocab_size)
        self.head_new = nn.Linear(d_model, tokens.vocab_size - tokens.boi)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight[tokens.boi :] = 0
            self.head.bias[tokens.boi :] = -100.0
        nn.init.zeros_(self.head_new.weight)
        nn.init.constant_(self.head_new.bias, 95.0)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., d]`` → logits ``[..., vocabulary]``."""
        return self.head(hidden) + F.pad(self.head_new(hidden), (self.first_new, 0))
