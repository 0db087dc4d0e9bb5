"""Both attentions of `fused.py` whole on the CPU, without gradients: checks and threads around `numba_mmfs.py`.

Place in the flow: `fused.py` imports this file on the first call that the numba backend serves and that wants no
gradients. What is read by address was compared with the other shapes before. Types and threads as in `numba_cpu.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmi_kernels import numba_mmfs, numba_team
from mmi_kernels.numba_cpu import MIN_WORK_PER_THREAD, Plan, in_pool, no_memory, plain, plan_of, threads_for

import os
TILE = int(os.environ.get('TILE','16384'))
GROUP=int(os.environ.get('GROUP','0'))
"""Samples whose locations and weights a thread holds at a time: 192 KiB, within a core's second-level cache."""


def attend(
    values: Tensor,
    shapes: tuple[tuple[int, int], ...],
    offsets: Tensor,
    logits: Tensor,
    tables: tuple[Tensor, Tensor],
    reference: Tensor,
    scales: tuple[tuple[float, float], ...],
    visible: Tensor,
    token: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    """Both attentions of `fused.py` without gradients, whole (`numba_mmfs.py`).

    Args:
        values: [R, M·S, H, D].
        shapes: (height, width) of the L levels of one image.
        offsets: [B, Q, H·P·2], or with an own one per level [B, Q, H·L·P·2].
        logits: [B, Q, H·L·P].
        tables: what relative index r adds to offsets [K, ·] and logits [K, ·].
        reference: [1 or B, Q, 2].
        scales: per level, the share of the map's width and height that one unit of offset spans.
        visible: [B, 1 or Q, M], 0 / 1.
        token: [H·D], the value of a further logit 0; ``None`` for a softmax without.
        rows: [B], which row of ``values`` a sequence looks at; default its own.

    Returns:
        [B, Q, H·D] in the dtype of ``values``.

    Raises:
        KernelUnavailable: the tensors have no memory (fake tensors).
        ValueError: shapes or devices do not fit together.
        IndexError: a query sees more images than the tables have rows for, or ``rows`` names none of ``values``.
    """
    dtype, (batch, queries, _), levels = values.dtype, logits.shape, len(shapes)
    floats = [values, offsets, logits, *tables, reference, *(() if token is None else (token,))]
    visible = visible.expand(batch, -1, -1) if len(visible) == 1 else visible
    points, per_level = _checked(shapes, len(scales), floats, visible, rows)
    heads, dim, images = *values.shape[2:], visible.shape[2]
    plan = plan_of(
        shapes * images,
        torch.Size((batch, *values.shape[1:])),
        torch.Size((batch, queries, heads, images * levels, points)),
    )
    spans = _spans(scales)
    visible = visible.to(torch.int32).contiguous()
    sources = None if rows is None else rows.to(torch.int64).contiguous()
    out = torch.empty(batch, queries, heads * dim, dtype=torch.float32, device="cpu")
    floats = [plain(tensor) for tensor in floats]
    addresses = [tensor.data_ptr() for tensor in floats]
    if (0 in addresses or visible.data_ptr() == 0) and out.numel():
        raise no_memory()
    inner = (0 if token is None else addresses[6], 0 if sources is None else sources.data_ptr())
    group = GROUP or plan.group
    most = int(plan.bands_owner[0][:, 1].max())
    tile = max(1, min(queries, TILE // max(1, most * (min(group, heads) if plan.pack else heads))))
    fields = np.zeros(32, np.int64)
    fields[: len(numba_mmfs.FIELDS)] = (
        *(*addresses[:6], visible.data_ptr(), spans.ctypes.data, *inner, out.data_ptr()),
        *(plan.sizes[0], queries, heads, dim, images, levels, points, len(reference), visible.shape[1]),
        *(per_level, token is not None, group, plan.pack, tile, plan.bands[0], plan.bands[1], most, plan.bands[2]),
    )
    _spread(fields, plan, queries, (floats, visible, spans, sources, plan, out, fields))
    return out if dtype == torch.float32 else out.to(dtype)


def _checked(
    shapes: tuple[tuple[int, int], ...], scales: int, floats: list[Tensor], visible: Tensor, rows: Tensor | None
) -> tuple[int, bool]:
    """(points, whether every level has its own offsets); raises as `attend`. floats: its float tensors in order."""
    if any(tensor.device.type != "cpu" for tensor in (*floats, visible, *(() if rows is None else (rows,)))):
        raise ValueError("tensors on different devices")
    values, logits, known = floats[0], floats[2], len(floats[3])
    found = _fitting(shapes, scales, *(tensor.shape for tensor in floats[:6]), visible.shape)
    token = floats[6].numel() if len(floats) > 6 else values.shape[2] * values.shape[3]
    sources = values.shape[:1] if rows is None else rows.shape
    if tuple(sources) != (len(logits),) or token != values.shape[2] * values.shape[3]:
        raise ValueError(f"values {tuple(values.shape)} do not fit {len(logits)} sequences, their rows or the token")
    if visible.shape[2] >= known and bool((visible != 0).sum(-1).max() >= known):
        raise IndexError(f"a query sees more images than the tables tell apart, which is {known - 1}")
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(values):
        raise IndexError(f"rows must be within [0, {len(values)})")
    return found


def _spread(fields: np.ndarray, plan: Plan, queries: int, owners: tuple[Any, ...]) -> None:
    """`attend_lanes` over all lanes and queries, on as many threads as the work is worth."""
    at, work = fields.ctypes.data, plan.work + 32 * plan.lanes * queries * plan.sizes[4]
    if work < 2 * MIN_WORK_PER_THREAD:
        numba_mmfs.attend_lanes(at, 0, plan.lanes, 0, queries)
        return
    by_query = not plan.pack and plan.lanes < torch.get_num_threads()
    size = queries if by_query else plan.lanes
    threads = threads_for(size, work)
    if threads > 1 and numba_team.available():
        numba_team.attend(at, plan.lanes, queries, by_query, threads)
    elif by_query:
        in_pool(lambda a, b: numba_mmfs.attend_lanes(at, 0, plan.lanes, a, b), size, threads, owners)
    else:
        in_pool(lambda a, b: numba_mmfs.attend_lanes(at, a, b, 0, queries), size, threads, owners)


@lru_cache(maxsize=256)
def _fitting(
    shapes: tuple[tuple[int, int], ...],
    scales: int,
    values: torch.Size,
    offsets: torch.Size,
    logits: torch.Size,
    offset_table: torch.Size,
    logit_table: torch.Size,
    reference: torch.Size,
    visible: torch.Size,
) -> tuple[int, bool]:
    """(points, whether every level has its own offsets), after every shape was compared. Raises ValueError."""
    (batch, queries, width), levels, heads = logits, len(shapes), values[2]
    points = width // max(heads * levels, 1)
    cells = sum(height * width for height, width in shapes)
    fit = (
        min(points, heads, levels, values[3], visible[-1]) > 0
        and width == heads * levels * points
        and scales == levels
        and tuple(offsets) in ((batch, queries, heads * points * 2), (batch, queries, 2 * width))
        and tuple(offset_table[1:]) == tuple(offsets[2:])
        and tuple(logit_table) == (offset_table[0], width)
        and tuple(reference) in ((1, queries, 2), (batch, queries, 2))
        and len(visible) == 3
        and visible[0] == batch
        and visible[1] in (1, queries)
        and values[1] == visible[2] * cells
        and min(min(shape) for shape in shapes) > 0
    )
    if not fit:
        raise ValueError(
            f"values {tuple(values)}, maps {shapes}, offsets {tuple(offsets)}, logits {tuple(logits)}, tables "
            f"{tuple(offset_table)} and {tuple(logit_table)}, reference {tuple(reference)}, visible {tuple(visible)} "
            "do not fit together"
        )
    return points, offsets[2] == 2 * width and levels > 1


@lru_cache(maxsize=256)
def _spans(scales: tuple[tuple[float, float], ...]) -> np.ndarray:
    return np.asarray(scales, np.float32).reshape(-1)
