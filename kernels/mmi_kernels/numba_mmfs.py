"""Both attentions whole on the CPU, compiled by numba: from projected queries to sampled values, forward alone.

Place in the flow: `fused.py` comes here without gradients (through `numba_attention.py`); with gradients it makes
locations and weights in torch and samples through `op.deform_sample`. Here they exist for a few queries at a time, in a
buffer that stays in the processor's cache: each thread makes those of a tile, `numba_loops.sweep` reads them, the next
tile overwrites them. Which row of the values a sequence looks at is an index, so nothing is gathered before.

The softmax has its own exponential, since numba calls the C library for every single one: e^x = 2^n · e^r with
r = x − n·ln 2 in [−0.35, 0.35], and a polynomial for e^r with a relative error of 3e-9 before rounding.

Source: as `fused.py`; the exponential as in Cody & Waite 1980, with coefficients of our own (smallest largest error).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from mmi_kernels.numba_loops import CHUNK, ROW, ROWS, compiled, copy, floats, part, pointer, sweep

FIELDS = (
    *("value", "offsets", "logits", "offset_table", "logit_table", "reference", "visible", "scales", "token", "rows"),
    *("slots", "out", "positions", "queries", "heads", "dim", "images", "levels", "points", "references", "seen_by"),
    *("per_level", "ignore", "group", "pack", "tile"),
)
"""What the int64 array that `attend_lanes` reads holds: addresses, then sizes and switches."""
_VALUE, _OFFSETS, _LOGITS, _OFFSET_TABLE, _LOGIT_TABLE, _REFERENCE, _VISIBLE, _SCALES, _TOKEN = range(9)
_SOURCES, _SLOTS, _OUT = range(9, 12)
_POSITIONS, _QUERIES, _HEADS, _DIM, _IMAGES, _LEVELS, _POINTS, _REFERENCES, _SEEN_BY = range(12, 21)
_PER_LEVEL, _IGNORE, _GROUP, _PACK, _TILE = range(21, 26)

_LOG2E, _LN2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
_LOWEST = np.float32(-87.0)
"""Below this e^x counts as 0 (of a hidden image it is)."""
_HIDDEN = np.float32(-1e30)
_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
_C2, _C3, _C4, _C5, _C6 = (np.float32(c) for c in (0.49999993, 0.16666521, 0.04166839, 0.00836871, 0.00138146))


@intrinsic
def _power_of_two(typing_context: Any, exponent: Any) -> Any:
    """int32 n in [−126, 127] → 2^n, put together from its bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.IntType(32)
        biased = builder.add(args[0], ir.Constant(kind, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(kind, 23)), ir.FloatType())

    return types.float32(types.int32), generate


@part
def _exp(x):
    """e^x for x ≤ 0; 0 below `_LOWEST`."""
    n = np.floor(x * _LOG2E + _HALF)
    r = x - n * _LN2
    tail = _C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))
    grown = (_ONE + r + r * r * tail) * _power_of_two(np.int32(n))
    return grown if x > _LOWEST else _ZERO


@part
def _softmax(weights, first, count, ignore):
    """Logits [first, first + count) → weights, with one more logit 0 if `ignore`; returns that one's weight."""
    top = _ZERO if ignore else weights[first]
    for k in range(first, first + count):
        top = weights[k] if weights[k] > top else top
    total = _ZERO
    for k in range(first, first + count):
        one = _exp(weights[k] - top if weights[k] - top > _LOWEST else _LOWEST)
        weights[k] = one
        total += one
    left = _exp(-top if -top > _LOWEST else _LOWEST) if ignore else _ZERO
    scale = _ONE / (total + left)
    for k in range(first, first + count):
        weights[k] *= scale
    return left * scale


@part
def _tile(a, n, heads_of, queries_of, locations_at, weights_at):
    """Locations and weights of a few queries into their buffers, the ignore slot's share into out."""
    queries, heads, dim = a[_QUERIES], a[_HEADS], a[_DIM]
    images, levels, points = a[_IMAGES], a[_LEVELS], a[_POINTS]
    each, samples, pairs = levels * points, images * levels * points, 2 * points
    moved = pairs * levels if a[_PER_LEVEL] else pairs
    batch = n + 1
    offsets = floats(a[_OFFSETS], batch * queries * heads * moved)
    logits = floats(a[_LOGITS], batch * queries * heads * each)
    seen_of = carray(pointer(a[_VISIBLE]), batch * a[_SEEN_BY] * images, np.int32)
    scales = floats(a[_SCALES], 2 * levels)
    reference = floats(a[_REFERENCE], batch * queries * 2)
    start, stop = heads_of
    first, last = queries_of
    locations = floats(locations_at, 2 * (last - first) * heads * samples)
    weights = floats(weights_at, (last - first) * heads * samples)
    for q in range(first, last):
        ref = 2 * ((n if a[_REFERENCES] > 1 else 0) * queries + q)
        x0, y0 = reference[ref], reference[ref + 1]
        seen = (n * a[_SEEN_BY] + (q if a[_SEEN_BY] > 1 else 0)) * images
        for h in range(start, stop):
            lane = (n * queries + q) * heads + h
            base = ((q - first) * heads + h) * samples
            nearer = 0  # visible images at or after this one
            for back in range(images):
                m = images - 1 - back
                visible = seen_of[seen + m] != 0
                nearer += visible
                r, at = nearer if visible else 0, base + m * each
                logit_table = floats(a[_LOGIT_TABLE] + 4 * (r * heads + h) * each, each)
                offset_table = floats(a[_OFFSET_TABLE] + 4 * (r * heads + h) * moved, moved)
                for k in range(each):
                    weights[at + k] = logits[lane * each + k] + logit_table[k]
                if r == 0:
                    for k in range(each):
                        weights[at + k] = _HIDDEN
                for level in range(levels):
                    own = level * pairs if a[_PER_LEVEL] else 0
                    width, height = scales[2 * level], scales[2 * level + 1]
                    to = at + level * points
                    for p in range(points):
                        x = offsets[lane * moved + own + 2 * p] + offset_table[own + 2 * p]
                        y = offsets[lane * moved + own + 2 * p + 1] + offset_table[own + 2 * p + 1]
                        locations[2 * (to + p)] = x0 + x * width
                        locations[2 * (to + p) + 1] = y0 + y * height
            left = _softmax(weights, base, samples, a[_IGNORE] != 0)
            into = floats(a[_OUT] + 4 * lane * dim, dim)
            if a[_IGNORE] != 0:
                token = floats(a[_TOKEN] + 4 * h * dim, dim)
                for d in range(dim):
                    into[d] = left * token[d]
            else:
                for d in range(dim):
                    into[d] = _ZERO


@compiled
def attend_lanes(fields, first, last, first_query, last_query):
    """Writes out for lanes [first, last) and queries [first_query, last_query); lanes as in `numba_loops`.

    Args:
        fields: address of an int64 array, see `FIELDS`.
    """
    a = carray(pointer(fields), 32, np.int64)
    positions, queries, heads, dim = a[_POSITIONS], a[_QUERIES], a[_HEADS], a[_DIM]
    samples, group, pack, tile = a[_IMAGES] * a[_LEVELS] * a[_POINTS], a[_GROUP], a[_PACK] != 0, a[_TILE]
    sizes = (positions, queries, heads, dim, samples)
    scratch = np.empty(2 * ROWS * CHUNK, np.float32)
    packed = np.empty(positions * dim * group if pack else 0, np.float32)
    located, weighed = np.empty(2 * tile * heads * samples, np.float32), np.empty(tile * heads * samples, np.float32)
    scratch_at, packed_at = np.int64(scratch.ctypes.data), np.int64(packed.ctypes.data)
    locations_at, weights_at = np.int64(located.ctypes.data), np.int64(weighed.ctypes.data)
    for n in range(first // heads, (last + heads - 1) // heads):
        end = min(last - n * heads, heads)
        source = carray(pointer(a[_SOURCES]), n + 1, np.int64)[n] if a[_SOURCES] != 0 else n
        for start in range(max(first - n * heads, 0), end, group if pack else heads):
            stop = min(start + group, end) if pack else end
            maps, stride = a[_VALUE] + 4 * (source * positions * heads + start) * dim, 4 * heads * dim
            if pack:
                wide = 4 * (stop - start) * dim
                copy(maps, stride, packed_at, wide, positions, wide // 4)
                maps, stride = packed_at, wide
            for q in range(first_query, last_query, tile):
                until = min(q + tile, last_query)
                _tile(a, n, (start, stop), (q, until), locations_at, weights_at)
                before = (n * queries + q) * heads * samples  # the buffers begin at query q of row n
                tensors = (locations_at - 8 * before, weights_at - 4 * before, a[_SLOTS], a[_OUT])
                later = scratch_at + ROWS * ROW
                sweep(
                    maps,
                    stride,
                    tensors,
                    sizes,
                    group,
                    n,
                    (start, stop),
                    (q, until),
                    not pack,
                    False,
                    scratch_at,
                    later,
                )
    return scratch.size + packed.size + located.size + weighed.size  # alive until here: their addresses were in use
