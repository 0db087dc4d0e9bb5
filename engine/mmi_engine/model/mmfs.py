"""MMFS, the multi-image multi-scale feature synchronizer: any query looks into the feature maps of several images.

Place in the flow: the language model calls it between self-attention and FFN of every fourth layer, the U-Net on its
skip connections and its middle block. Source: paper section 3.3, Eq. 4; the ignore slot, the relative image index and
every convention of scale follow the released checkpoint.

For a query f_q and M images, image m with visibility v_m(q):

    r_m  = number of visible images at or after m           (1 = nearest visible one, 0 = hidden)
    q_m  = W_q f_q + E[r_m]
    o_m  = W_p q_m        [H, P, 2]       offsets in cells of the base grid, the same for all levels
    a_m  = W_A q_m        [H, L, P]       logits; hidden images: − 10000
    out  = W_o ( Σ softmax(a)·bilinear(W_v F, reference + o_m·(s_l / base) / size_l)  +  ignored mass · t )

The released code gives every level one further "ignore" logit, fixed to −ln(M·L): together they weigh exp(0), so the
softmax over all of them is a softmax with one extra logit 0. The query side is linear, hence nothing is repeated per
image: W_p q_m = W_p W_q f_q + W_p E[r_m], and the second term is a table of ``max_images`` rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_engine.model.config import MMFSConfig
from mmi_kernels import deform_sample

HIDDEN_LOGIT = -10000.0
"""Added to the logits of hidden images; not −inf, so that a row that sees nothing stays finite."""

Shapes = Sequence[tuple[int, int]]
"""(height, width) per level."""


def relative_index(visible: Tensor) -> Tensor:
    """Relative image index r: ``visible`` ``[..., M]`` (0 / 1) → ``[..., M]`` long, 1 = nearest visible, 0 = hidden."""
    visible = visible.long()
    at_or_after = visible.flip(-1).cumsum(-1).flip(-1)
    return at_or_after * visible


class MMFS(nn.Module):
    """Deformable attention of queries ``[B, Q, d_query]`` over the feature maps of M images.

    Args:
        config: heads, points, inner width, levels.
        d_query: width of the queries.
        d_value: channels of the feature maps.
        d_out: width of the output.
        base: side of the grid in whose cells offsets are measured (16 in the LLM, the query map's side in the U-Net).
    """

    def __init__(self, config: MMFSConfig, *, d_query: int, d_value: int, d_out: int, base: int) -> None:
        super().__init__()
        self.config, self.base = config, base
        heads, points, levels = config.heads, config.points, len(config.levels)
        self.query_proj = nn.Linear(d_query, d_query)
        self.image_index = nn.Embedding(config.max_images, d_query)
        self.offsets = nn.Linear(d_query, heads * points * 2)
        # One slot more than points: the released checkpoint stores logits for the ignore slot but overwrites them.
        self.logits = nn.Linear(d_query, heads * levels * (points + 1))
        self.value_proj = nn.Linear(d_value, config.width)
        self.output_proj = nn.Linear(config.width, d_out)
        self.ignore_token = nn.Parameter(torch.zeros(1, 1, 1, config.width), requires_grad=False)
        self.backend = "auto"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialisation of the released implementation (docs/model.md)."""
        for linear in (self.query_proj, self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.image_index.weight, std=0.02)
        nn.init.zeros_(self.offsets.weight)
        nn.init.uniform_(self.offsets.bias, -self.config.offset_init, self.config.offset_init)
        nn.init.xavier_uniform_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def project_values(self, features: Tensor) -> Tensor:
        """W_v F. ``features`` ``[B, M, S, d_value]`` → values ``[B, M·S, H, D]``; depends on the images only."""
        values = self.value_proj(features)
        batch, images, cells = features.shape[:3]
        return values.view(batch, images * cells, self.config.heads, self.config.width // self.config.heads)

    def blind(self) -> Tensor:
        """What a query gets that sees no image: W_o t, ``[d_out]``."""
        return self.output_proj(self.ignore_token.flatten())

    def forward(self, query: Tensor, reference: Tensor, values: Tensor, shapes: Shapes, visible: Tensor) -> Tensor:
        """Attend.

        Args:
            query: ``[B, Q, d_query]``.
            reference: ``[1 or B, Q, 2]`` reference points (x, y) in [0, 1].
            values: ``[B, M·S, H, D]`` of :meth:`project_values`.
            shapes: (height, width) of the L real feature maps of one image.
            visible: ``[B, M]`` for all queries alike or ``[B, Q', M]``; with Q' ≠ Q its last row holds for every query
                (while decoding, a new token sees what the last prompt token saw).

        Returns:
            ``[B, Q, d_out]``. A query that sees no image yields W_o t.
        """
        batch, n_query = query.shape[:2]
        if visible.shape[-1] == 0:
            return self.blind().expand(batch, n_query, -1)
        if visible.ndim == 3 and visible.shape[1] != n_query:
            visible = visible[:, -1]
        visible = visible[:, None] if visible.ndim == 2 else visible  # (B, 1 or Q, M)
        weights, ignored, offsets = self._attention(query, visible)
        locations = self._locations(reference, offsets, shapes)
        n_images = visible.shape[-1]
        sampled = deform_sample(values, list(shapes) * n_images, locations, weights, backend=self.backend)
        heads = sampled.view(batch, n_query, self.config.heads, -1) + ignored * self.ignore_token.view(
            1, 1, self.config.heads, -1
        ).to(sampled.dtype)
        return self.output_proj(heads.flatten(2))

    def _attention(self, query: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights ``[B, Q, H, M·L, P]``, ignored mass ``[B, Q, H, 1]`` and offsets ``[B, Q, M, H, P, 2]``."""
        batch, n_query = query.shape[:2]
        heads, levels, points = self.config.heads, len(self.config.levels), self.config.points
        n_images = visible.shape[-1]
        index = relative_index(visible)
        projected = self.query_proj(query)
        # W (q + E[r]) + b = (W q + b) + (W E)[r]: the right-hand table has only max_images rows.
        logit_weight = self.logits.weight.view(heads, levels, points + 1, -1)[:, :, :points].flatten(0, 2)
        logit_bias = self.logits.bias.view(heads, levels, points + 1)[:, :, :points].flatten()
        table_offsets = F.linear(self.image_index.weight, self.offsets.weight)
        table_logits = F.linear(self.image_index.weight, logit_weight)
        offsets = self.offsets(projected)[:, :, None] + F.embedding(index, table_offsets)
        logits = F.linear(projected, logit_weight, logit_bias)[:, :, None] + F.embedding(index, table_logits)
        logits = logits + (1 - visible.to(logits.dtype))[..., None] * HIDDEN_LOGIT
        logits = logits.view(batch, n_query, n_images, heads, levels * points).transpose(2, 3).flatten(3)
        precise = torch.promote_types(logits.dtype, torch.float32)
        weights = torch.softmax(F.pad(logits, (0, 1)).to(precise), dim=-1).to(logits.dtype)  # extra logit 0: ignore
        weights, ignored = weights[..., :-1], weights[..., -1:]
        weights = weights.reshape(batch, n_query, heads, n_images * levels, points)
        return weights, ignored, offsets.view(batch, n_query, n_images, heads, points, 2)

    def _locations(self, reference: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
        """Sampling locations ``[B, Q, H, M·L, P, 2]`` as (x, y) in [0, 1]."""
        # In 16 bits a location would be off by up to half a cell of the finest map.
        precise = torch.promote_types(offsets.dtype, torch.float32)
        offsets, reference = offsets.to(precise), reference.to(precise)
        batch, n_query, n_images, heads, points, _ = offsets.shape
        scale = []
        for side, (height, width) in zip(self.config.levels, shapes, strict=True):
            real = (side, side) if self.config.keep_relative_distance else (width, height)
            scale.append([side / self.base / real[0], side / self.base / real[1]])
        per_level = offsets.new_tensor(scale)  # (L, 2)
        moved = offsets.transpose(2, 3)[:, :, :, :, None] * per_level[:, None]  # (B, Q, H, M, L, P, 2)
        located = reference[:, :, None, None, None, None] + moved
        return located.reshape(batch, n_query, heads, n_images * len(shapes), points, 2)
