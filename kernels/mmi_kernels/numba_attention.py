"""Both attentions of `fused.py` whole on the CPU, without gradients: checks and threads around `numba_mmfs.py`.

Place in the flow: `fused.py` imports this file on the first call that the numba backend serves and that wants no
gradients. What is read by address was compared with the other shapes before. Types and threads as in `numba_cpu.py`.
"""

from __future__ import annotations

import math
from array import array
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmi_kernels import numba_mmfs, numba_team
from mmi_kernels.numba_cpu import MIN_WORK_PER_THREAD, Plan, in_pool, no_memory, plain, plan_of, threads_for

TILE = 16384
"""Samples whose locations and weights a thread holds at a time: 192 KiB, within a core's second-level cache."""
LINGERS = 5 << 17
"""Bytes of one sequence's values that a core's second-level cache keeps beside a tile; they are read where they are."""


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
    given = (values, offsets, logits, *tables, reference, *(() if token is None else (token,)))
    form = _form(
        shapes,
        scales,
        tuple([tensor.shape for tensor in given]),
        visible.shape,
        None if rows is None else rows.shape,
        TILE,
    )
    others = (visible,) if rows is None else (visible, rows)
    if not (all([tensor.is_cpu for tensor in given]) and all([tensor.is_cpu for tensor in others])):
        raise ValueError("tensors on different devices")
    _in_range(form, visible, rows, len(values))
    floats = [plain(tensor) for tensor in given]
    seen = visible.to(torch.int32)
    seen = (seen.expand(form.out[0], -1, -1) if len(seen) == 1 < form.out[0] else seen).contiguous()
    sources = None if rows is None else rows.to(torch.int64).contiguous()
    out = torch.empty(form.out, dtype=torch.float32, device="cpu")
    addresses = [tensor.data_ptr() for tensor in floats]
    seen_at, out_at = seen.data_ptr(), out.data_ptr()
    if (0 in addresses or seen_at == 0) and out_at:
        raise no_memory()
    inner = (0 if token is None else addresses[6], 0 if sources is None else sources.data_ptr())
    fields = array("q", (*addresses[:6], seen_at, form.spans_at, *inner, out_at, *form.rest))
    _spread(fields.buffer_info()[0], form, (floats, seen, sources, form, out, fields))
    return out if values.dtype == torch.float32 else out.to(values.dtype)


class _Form(NamedTuple):
    """What the shapes of a call decide.

    Attributes:
        plan: see `numba_cpu.Plan`.
        out: shape of the output.
        known: rows of the tables.
        spans: `scales` in float32, and their address.
        rest: what follows the addresses in `numba_mmfs.FIELDS`.
        work: multiply-adds, softmax and locations included.
    """

    plan: Plan
    out: tuple[int, int, int]
    known: int
    spans: np.ndarray
    spans_at: int
    rest: tuple[int, ...]
    work: int


@lru_cache(maxsize=256)
def _form(
    shapes: tuple[tuple[int, int], ...],
    scales: tuple[tuple[float, float], ...],
    given: tuple[torch.Size, ...],
    visible: torch.Size,
    rows: torch.Size | None,
    tile: int,
) -> _Form:
    """For the shapes of `attend`'s float tensors in order, after all were compared. Raises ValueError."""
    values, logits, known, reference = given[0], given[2], given[3][0], given[5]
    if len(visible) == 3 and visible[0] == 1:
        visible = torch.Size((logits[0], *visible[1:]))
    points, per_level = _fitting(shapes, len(scales), given, visible)
    channels = values[2] * values[3]
    sources = tuple(values[:1] if rows is None else rows)
    if sources != (logits[0],) or (len(given) > 6 and math.prod(given[6]) != channels):
        raise ValueError(f"values {tuple(values)} do not fit {logits[0]} sequences, their rows or the token")
    (batch, queries, _), (heads, dim), levels, images = logits, values[2:], len(shapes), visible[2]
    plan = plan_of(
        shapes * images,
        torch.Size((batch, *values[1:])),
        torch.Size((batch, queries, heads, images * levels, points)),
        LINGERS,
    )
    address, bands, positions, most = plan.bands
    tile = max(1, min(queries, tile // max(1, most * (min(plan.group, heads) if plan.pack else heads))))
    spans = np.asarray(scales, np.float32).reshape(-1)
    rest = (
        *(plan.sizes[0], queries, heads, dim, images, levels, points, reference[0], visible[1]),
        *(int(per_level), int(len(given) > 6), plan.group, int(plan.pack), tile, address, bands, most, positions),
    )
    work = plan.work + 32 * plan.lanes * queries * plan.sizes[4]
    return _Form(plan, (batch, queries, channels), known, spans, spans.ctypes.data, rest, work)


def _in_range(form: _Form, visible: Tensor, rows: Tensor | None, values: int) -> None:
    """Raises IndexError where `visible` or `rows` name what is not there."""
    if visible.shape[2] >= form.known and bool((visible != 0).sum(-1).max() >= form.known):
        raise IndexError(f"a query sees more images than the tables tell apart, which is {form.known - 1}")
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < values:
        raise IndexError(f"rows must be within [0, {values})")


def _spread(at: int, form: _Form, owners: tuple[Any, ...]) -> None:
    """`attend_lanes` over all lanes and queries, on as many threads as the work is worth; at: address of its array."""
    plan, queries = form.plan, form.out[1]
    if form.work < 2 * MIN_WORK_PER_THREAD:
        numba_mmfs.attend_lanes(at, 0, plan.lanes, 0, queries)
        return
    by_query = not plan.pack and plan.lanes < torch.get_num_threads()
    size = queries if by_query else plan.lanes
    threads = threads_for(size, form.work)
    if threads > 1 and numba_team.available():
        numba_team.attend(at, plan.lanes, queries, by_query, threads)
    elif by_query:
        in_pool(lambda a, b: numba_mmfs.attend_lanes(at, 0, plan.lanes, a, b), size, threads, owners)
    else:
        in_pool(lambda a, b: numba_mmfs.attend_lanes(at, a, b, 0, queries), size, threads, owners)


def _fitting(
    shapes: tuple[tuple[int, int], ...], scales: int, given: tuple[torch.Size, ...], visible: torch.Size
) -> tuple[int, bool]:
    """(points, whether every level has its own offsets), after every shape was compared. Raises ValueError."""
    values, offsets, logits, offset_table, logit_table, reference = given[:6]
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
