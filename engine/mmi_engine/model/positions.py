"""Fixed sine-cosine position tables, in one and two dimensions, and their resizing to other grids.

Used by ``vision`` (2-D, added to patch tokens and feature maps), by the U-Net's MMFS blocks (2-D over the query map)
and by the image decoder (1-D over the reversed context). The tables are MAE's (He et al. 2022) up to one point: in two
dimensions the first half of the channels encodes the ROW and the second half the column, MAE has them the other way
round. Within an axis the first half of the channels are sines and the second half cosines, not interleaved.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 10000.0


def sincos_1d(positions: Tensor, channels: int) -> Tensor:
    """Sine-cosine encoding of scalar positions.

    Args:
        positions: any shape ``[...]``, in cells or tokens (0, 1, 2, …; fractions are allowed).
        channels: even number of channels.

    Returns:
        ``[..., channels]`` float32 on the device of ``positions``: sin(p · w_i) for i < channels / 2, then the
        cosines, with w_i = 10000 ** (-2 i / channels). Computed in float64, because single precision loses the
        phase of large positions.

    Raises:
        ValueError: ``channels`` is odd.
    """
    if channels % 2:
        raise ValueError(f"sine-cosine positions need an even number of channels, got {channels}")
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    angles = positions.double().unsqueeze(-1) * BASE**-exponent  # (..., C/2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def sincos_2d(height: int, width: int, channels: int, *, device: torch.device | str | None = None) -> Tensor:
    """Sine-cosine table of a grid in row-major order.

    Args:
        height, width: cells.
        channels: a multiple of 4.

    Returns:
        ``[height * width, channels]`` float32; the first half of the channels encodes the row, the second the column.

    Raises:
        ValueError: ``channels`` is not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"two-dimensional positions need a multiple of 4 channels, got {channels}")
    rows = sincos_1d(torch.arange(height, device=device), channels // 2)  # (h, C/2)
    columns = sincos_1d(torch.arange(width, device=device), channels // 2)  # (w, C/2)
    table = torch.cat(
        [rows[:, None].expand(height, width, -1), columns[None].expand(height, width, -1)], dim=-1
    )  # (h, w, C)
    return table.reshape(height * width, channels)


def resize_grid(cells: Tensor, grid: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """Bicubic resize of a square grid of vectors.

    Args:
        cells: ``[G * G, C]``, row-major.
        grid: wanted (height, width) in cells.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        ``[height * width, C]`` in the dtype of ``cells``; ``cells`` itself where the size does not change.

    Raises:
        ValueError: the number of cells is not a square.
    """
    side = math.isqrt(cells.shape[0])
    if side * side != cells.shape[0]:
        raise ValueError(f"a square position table is needed, got {cells.shape[0]} cells")
    if (side, side) == tuple(grid):
        return cells
    image = cells.float().unflatten(0, (side, side)).permute(2, 0, 1).unsqueeze(0)  # (1, C, G, G)
    image = F.interpolate(image, size=tuple(grid), mode="bicubic", align_corners=align_corners)
    return image[0].permute(1, 2, 0).reshape(grid[0] * grid[1], -1).to(cells.dtype)


def interpolate_position_embedding(
    table: Tensor, grid: tuple[int, int], *, align_corners: bool = False, prefix: int = 1
) -> Tensor:
    """Position table of a trunk for another patch grid; the rows of class or register tokens stay as they are.

    Args:
        table: ``[prefix + G * G, C]``.
        grid: wanted (height, width) in patches.
        align_corners: False is what the released code does when it loads weights and looks up tables; True is what
            its one published use at 448 px does.
        prefix: rows in front of the grid.

    Returns:
        ``[prefix + height * width, C]``.

    Raises:
        ValueError: the grid part is not square.
    """
    cells = resize_grid(table[prefix:], grid, align_corners=align_corners)
    return torch.cat([table[:prefix], cells], dim=0)
