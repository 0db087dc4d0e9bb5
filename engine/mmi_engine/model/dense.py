"""Dense attention where MMFS samples: every query attends to every cell of all visible images.

Place in the flow: the paper's alternatives to deformable sampling (its Table 6), for ablations; `synchronizer` gives
the language model and the U-Net what `MMFSConfig.attention` names. Keys and values are what `project_values` makes of
an image once, so caches and batches treat them as they treat MMFS's values. Kept from MMFS, so that the way of looking
is all that differs: the relative image index (here a bias per head), the ignore slot with logit 0, what a query gets
that sees nothing. Own choice: cells carry their position (sine and cosine, Eq. of Vaswani et al. 2017 in two
dimensions) and their level, since nothing else tells a dense query where it looks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_engine.errors import ModelError
from mmi_engine.model.config import RESAMPLED_TOKENS, MMFSConfig, QFormerConfig
from mmi_engine.model.mmfs import MMFS, Shapes, per_query, relative_index
from mmi_engine.model.positions import sincos_1d
from mmi_engine.model.resampler import QFormer


class DenseAttention(nn.Module):
    """Softmax attention of queries ``[B, Q, d_query]`` over all cells of the feature maps of M images.

    Args:
        config: heads, inner width, levels; points, offsets and distances do not apply.
        d_query, d_value, d_out: as in :class:`~mmi_engine.model.mmfs.MMFS`.
    """

    affine = True
    cell_positions: Tensor
    cell_levels: Tensor

    def __init__(self, config: MMFSConfig, *, d_query: int, d_value: int, d_out: int) -> None:
        super().__init__()
        self.config, self.backend = config, "torch"
        self.query_proj = nn.Linear(d_query, config.width)
        self.image_index = nn.Embedding(config.max_images, config.heads)
        self.value_proj = nn.Linear(d_value, 2 * config.width)
        self.output_proj = nn.Linear(config.width, d_out)
        self.ignore_token = nn.Parameter(torch.zeros(1, 1, 1, config.width), requires_grad=False)
        for linear in (self.query_proj, self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.image_index.weight)
        self.level_index = nn.Embedding(len(config.levels), d_value)
        nn.init.trunc_normal_(self.level_index.weight, std=0.02)
        levels = [torch.full((side * side,), level) for level, side in enumerate(config.levels)]
        self.register_buffer("cell_levels", torch.cat(levels), persistent=False)  # (S)
        tables = [_positions(side, max(config.levels), d_value) for side in config.levels]
        self.register_buffer("cell_positions", torch.cat(tables), persistent=False)  # (S, d_value)

    def project_values(self, features: Tensor) -> Tensor:
        """Keys and values of ``features`` ``[B, M, S, d_value]``: ``[B, M·S, H, 2·D]``."""
        return self.in_heads(self.value_proj(features))

    def in_heads(self, values: Tensor) -> Tensor:
        """``[B, M, S, 2·H·D]`` → ``[B, M·S, H, 2·D]``, with the share of position and level.

        Raises:
            ModelError: other maps than the configuration's.
        """
        batch, images, cells = values.shape[:3]
        where = F.linear(self._places(cells), self.value_proj.weight)
        return (values + where.to(values.dtype)).view(batch, images * cells, self.config.heads, -1)

    def _places(self, cells: int) -> Tensor:
        """What tells the position and level of each of S ``cells``, ``[S, d_value]``; raises ModelError."""
        if cells != len(self.cell_positions):
            raise ModelError(
                f"dense attention is made for maps of {len(self.cell_positions)} cells, these have {cells}",
                remedy="use the picture size the model was trained with",
            )
        level = self.level_index(self.cell_levels)
        return self.cell_positions.to(level) + level

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
        """Attend; arguments and result as in :meth:`mmi_engine.model.mmfs.MMFS.forward`, ``reference`` unused."""
        batch, n_query = query.shape[:2]
        if visible.shape[-1] == 0:
            return self.blind().expand(batch, n_query, -1)
        visible = per_query(visible, n_query)
        keys, content = (values if rows is None else values[rows]).transpose(1, 2).chunk(2, dim=-1)
        heads, cells = self.config.heads, keys.shape[2] // visible.shape[2]
        queries = self.query_proj(query).unflatten(-1, (heads, -1)).transpose(1, 2)
        bias = self.image_index(relative_index(visible)).masked_fill(~visible.bool()[..., None], -torch.inf)
        bias = bias.permute(0, 3, 1, 2).repeat_interleave(cells, dim=3).to(queries.dtype)  # (B, H, 1 or Q, M·S)
        token = self.ignore_token.to(content.dtype).view(1, heads, 1, -1).expand(batch, -1, -1, -1)
        sampled = F.scaled_dot_product_attention(
            queries,
            F.pad(keys, (0, 0, 0, 1)),  # the ignore slot: a key of zeros has logit 0
            torch.cat([content, token], dim=2),
            attn_mask=F.pad(bias, (0, 1)).expand(-1, -1, n_query, -1),
        )
        return (self.output_proj if out is None else out)(sampled.transpose(1, 2).flatten(2))


class ResampledAttention(DenseAttention):
    """The same over ``RESAMPLED_TOKENS`` tokens that a Q-Former of one layer leaves of every image.

    They have no place any more, so cells tell theirs to the Q-Former instead.
    """

    affine = False

    def __init__(self, config: MMFSConfig, *, d_query: int, d_value: int, d_out: int) -> None:
        super().__init__(config, d_query=d_query, d_value=d_value, d_out=d_out)
        sizes = {"num_heads": config.heads, "num_queries": RESAMPLED_TOKENS}
        widths = {"hidden_size": d_value, "encoder_hidden_size": d_value, "intermediate_size": 2 * d_value}
        once = {"num_layers": 1, "cross_attention_frequency": 1, "dropout": 0.0, "qk_norm": False}
        self.transition = QFormer(QFormerConfig(**sizes, **widths, **once))

    def project_values(self, features: Tensor) -> Tensor:
        """Keys and values of what is left of ``features`` ``[B, M, S, d_value]``: ``[B, M·32, H, 2·D]``.

        Raises:
            ModelError: other maps than the configuration's.
        """
        batch, images, cells = features.shape[:3]
        told = features + self._places(cells).to(features.dtype)
        tokens = self.value_proj(self.transition(told.flatten(0, 1)))
        return tokens.reshape(batch, images * RESAMPLED_TOKENS, self.config.heads, -1)


def _positions(side: int, finest: int, channels: int) -> Tensor:
    """Positions ``[side², channels]`` of a map's cells, row by row, in cells of the finest map."""
    along = sincos_1d((torch.arange(side) + 0.5) * (finest / side) - 0.5, channels // 2)
    rows = along[:, None].expand(-1, side, -1)
    return torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)


def synchronizer(
    config: MMFSConfig, *, d_query: int, d_value: int, d_out: int, base: int
) -> MMFS | DenseAttention | ResampledAttention:
    """What ``config.attention`` names; arguments as in :class:`~mmi_engine.model.mmfs.MMFS`."""
    if config.attention == "deformable":
        return MMFS(config, d_query=d_query, d_value=d_value, d_out=d_out, base=base)
    kind = DenseAttention if config.attention == "dense" else ResampledAttention
    return kind(config, d_query=d_query, d_value=d_value, d_out=d_out)
