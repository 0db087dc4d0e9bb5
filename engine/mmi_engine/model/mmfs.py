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
image: W_p q_m = W_p W_q f_q + W_p E[r_m], and the second term is a table of ``max_images`` rows. In evaluation W_p W_q
and W_A W_q are one matrix each; training and checkpoints have them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_engine.model.config import MMFSConfig
from mmi_engine.model.kept import Keeps, Kept, joined
from mmi_engine.model.packed import PackedMap
from mmi_kernels import mmfs_attention
from mmi_kernels.fused import Shapes, relative_index

__all__ = ["MMFS", "Shapes", "relative_index"]


@dataclass(frozen=True)
class Derived:
    """What follows from the weights: maps to offsets and logits, from the query itself where ``fused``, else from its
    projection; what relative index r adds to both; the ignore token."""

    offsets: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    tables: tuple[Tensor, Tensor]
    token: Tensor
    fused: bool = False


class MMFS(Keeps):
    """Deformable attention of queries ``[B, Q, d_query]`` over the feature maps of M images.

    Args:
        config: heads, points, inner width, levels.
        d_query: width of the queries.
        d_value: channels of the feature maps.
        d_out: width of the output.
        base: side of the grid in whose cells offsets are measured (16 in the LLM, the query map's side in the U-Net).
    """

    affine = True
    """Whether values are a linear map of the features."""

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
        return self.in_heads(self.value_proj(features))

    def in_heads(self, values: Tensor) -> Tensor:
        """``[B, M, S, H·D]`` → ``[B, M·S, H, D]``."""
        batch, images, cells = values.shape[:3]
        return values.view(batch, images * cells, self.config.heads, self.config.width // self.config.heads)

    def blind(self) -> Tensor:
        """What a query gets that sees no image: W_o t, ``[d_out]``."""
        return self.output_proj(self.ignore_token.flatten())

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        values: Tensor,
        shapes: Shapes,
        visible: Tensor,
        rows: Tensor | None = None,
        out: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[B, Q, d_query]``.
            reference: ``[1 or B, Q, 2]`` reference points (x, y) in [0, 1].
            values: ``[B, M·S, H, D]`` of :meth:`project_values`.
            shapes: (height, width) of the L real feature maps of one image.
            visible: ``[B, M]`` for all queries alike or ``[B, Q', M]``; with Q' ≠ Q its last row holds for every query
                (while decoding, a new token sees what the last prompt token saw).
            rows: ``[B]`` which row of ``values`` each sequence looks at; default its own.
            out: map to use instead of W_o.

        Returns:
            ``[B, Q, d_out]``. A query that sees no image yields W_o t.
        """
        batch, n_query = query.shape[:2]
        if visible.shape[-1] == 0:
            return self.blind().expand(batch, n_query, -1)
        visible = per_query(visible, n_query)
        derived = self.derived()
        projected = query if derived.fused else self.query_proj(query)
        sampled = mmfs_attention(
            values,
            shapes,
            derived.offsets(projected),
            derived.logits(projected),
            derived.tables,
            reference,
            self.scales(shapes),
            visible,
            derived.token,
            rows=rows,
            backend=self.backend,
        )
        return (self.output_proj if out is None else out)(sampled)

    def derived(self) -> Derived:
        """What depends on weights alone, kept between calls where that is safe."""
        weights = (
            self.image_index.weight,
            self.offsets.weight,
            self.offsets.bias,
            self.logits.weight,
            self.logits.bias,
            self.ignore_token,
            self.query_proj.weight,
            self.query_proj.bias,
        )
        if not self.kept.may(self.training, weights):
            return self._derive(fused=False)
        return self.kept.get(weights, lambda: self._derive(fused=True))

    def _derive(self, fused: bool) -> Derived:
        """The ignore slot's rows left out of the logits; both tables; ``fused``: the query's projection drawn in."""
        heads, levels, points = self.config.heads, len(self.config.levels), self.config.points
        # W (q + E[r]) + b = (W q + b) + (W E)[r]: the right-hand tables have only max_images rows.
        logit_weight = self.logits.weight.view(heads, levels, points + 1, -1)[:, :, :points].flatten(0, 2)
        logit_bias = self.logits.bias.view(heads, levels, points + 1)[:, :, :points].flatten()
        tables = (
            F.linear(self.image_index.weight, self.offsets.weight),
            F.linear(self.image_index.weight, logit_weight),
        )
        wide = torch.promote_types(self.ignore_token.dtype, torch.float32)
        maps = [(self.offsets.weight, self.offsets.bias), (logit_weight, logit_bias)]
        if fused:
            first = (self.query_proj.weight, self.query_proj.bias)
            offsets, logits = (PackedMap(*joined(weight, *first, bias)) for weight, bias in maps)
        else:
            offsets, logits = (partial(F.linear, weight=weight, bias=bias) for weight, bias in maps)
        return Derived(offsets, logits, tables, self.ignore_token.to(wide), fused)

    def scales(self, shapes: Shapes) -> list[tuple[float, float]]:
        """Per level: the share of the map's width and height that one cell of the base grid spans."""
        scales = []
        for side, (height, width) in zip(self.config.levels, shapes, strict=True):
            real = (side, side) if self.config.keep_relative_distance else (width, height)
            scales.append((side / self.base / real[0], side / self.base / real[1]))
        return scales


def per_query(visible: Tensor, n_query: int) -> Tensor:
    """Visibility ``[B, M]`` or ``[B, Q', M]`` of :meth:`MMFS.forward` as ``[B, 1 or Q, M]``."""
    if visible.ndim == 3 and visible.shape[1] != n_query:
        visible = visible[:, -1]
    return visible[:, None] if visible.ndim == 2 else visible


class Projecting(Keeps):
    """A module around MMFS with a norm of its own for what MMFS looks at: ``feature_norm`` and ``mmfs``."""

    feature_norm: nn.RMSNorm | nn.LayerNorm
    mmfs: Any
    """:class:`MMFS`, or one of `model/dense.py`."""

    def __init__(self) -> None:
        super().__init__()
        self.kept_values = Kept()

    def project_values(self, features: Tensor, normed: Tensor | None = None) -> Tensor:
        """``[B, M, S, d_value]`` → ``[B, M·S, H, D]``; ``normed``: the features as :func:`project_all` has them."""
        if normed is None:
            return self.mmfs.project_values(self.feature_norm(features))
        return self.mmfs.in_heads(self._value_map()(normed.flatten(0, 1)).unflatten(0, normed.shape[:2]))

    def keeps_values(self) -> bool:
        """Whether the norm's scale and shift may be drawn into the projection."""
        return self.mmfs.affine and self.kept_values.may(self.training, self._value_weights())

    def _value_weights(self) -> tuple[Tensor, ...]:
        norm, linear = self.feature_norm, self.mmfs.value_proj
        shift = getattr(norm, "bias", None)
        return (linear.weight, linear.bias, norm.weight, *(() if shift is None else (shift,)))

    def _value_map(self) -> PackedMap:
        weights = self._value_weights()
        weight, bias, scale, *shift = (tensor.detach() for tensor in weights)
        moved = bias + weight @ shift[0] if shift else bias
        return self.kept_values.get(weights, lambda: PackedMap(weight * scale, moved))


def project_all(blocks: Sequence[Projecting], features: Tensor) -> list[Tensor]:
    """Features ``[B, M, S, d_value]`` as every block's MMFS reads them, ``[B, M·S, H, D]`` each.

    Normalised once in evaluation, where each block's scale and shift are part of its projection. (One product for all
    blocks, taken apart afterwards, was no faster: the parts must be copied.)
    """
    if not blocks or not all(block.keeps_values() for block in blocks):
        return [block.project_values(features) for block in blocks]
    norm = blocks[0].feature_norm
    if isinstance(norm, nn.RMSNorm):
        normed = F.rms_norm(features, norm.normalized_shape, None, norm.eps)
    else:
        normed = F.layer_norm(features, norm.normalized_shape, None, None, norm.eps)
    return [block.project_values(features, normed) for block in blocks]
