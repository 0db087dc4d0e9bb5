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
from mmi_kernels.numba_simd import load_float, load_int

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
    """e^x for x ≤ 0, NaN for NaN; 0 below `_LOWEST`."""
    n = np.floor(x * _LOG2E + _HALF)
    r = x - n * _LN2
    tail = _C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))
    grown = (_ONE + r + r * r * tail) * _power_of_two(np.int32(n))
    return _ZERO if x <= _LOWEST else grown


# Indices are unsigned: with signed ones numba asks of each whether it counts from the end, and nothing is vectorised.


@part
def _softmax(weights_at, count, ignore):
    """Logits → weights in place, with one more logit 0 if `ignore`; returns that one's weight."""
    weights = floats(weights_at, count)
    top = _ZERO if ignore else weights[np.uint64(0)]
    for i in range(count):
        one = weights[np.uint64(i)]
        top = one if one > top else top
    total = _ZERO
    for i in range(count):
        below = weights[np.uint64(i)] - top
        one = _exp(_LOWEST if below < _LOWEST else below)
        weights[np.uint64(i)] = one
        total += one
    left = _exp(_LOWEST if -top < _LOWEST else -top) if ignore else _ZERO
    scale = _ONE / (total + left)
    for i in range(count):
        weights[np.uint64(i)] *= scale
    return left * scale


@part
def _move(offsets_at, table_at, points, middle, span, into_at):
    """Locations of one level's points: the middle + (offset + table) · span, as (x, y)."""
    offsets, table, into = floats(offsets_at, 2 * points), floats(table_at, 2 * points), floats(into_at, 2 * points)
    for i in range(points):
        x, y = np.uint64(2 * i), np.uint64(2 * i + 1)
        into[x] = middle[0] + (offsets[x] + table[x]) * span[0]
        into[y] = middle[1] + (offsets[y] + table[y]) * span[1]


@part
def _add(left_at, right_at, count, into_at):
    left, right, into = floats(left_at, count), floats(right_at, count), floats(into_at, count)
    for i in range(count):
        into[np.uint64(i)] = left[np.uint64(i)] + right[np.uint64(i)]


@part
def _fill(into_at, count, value):
    into = floats(into_at, count)
    for i in range(count):
        into[np.uint64(i)] = value


@part
def _share(token_at, count, weight, into_at):
    """The ignore slot's share of the output."""
    token, into = floats(token_at, count), floats(into_at, count)
    for i in range(count):
        into[np.uint64(i)] = weight * token[np.uint64(i)]


@part
def _tile(a, n, heads_of, queries_of, locations_at, weights_at):
    """Locations and weights of a few queries into their buffers, the ignore slot's share into out."""
    queries, heads, dim, images = a[_QUERIES], a[_HEADS], a[_DIM], a[_IMAGES]
    levels, points, ignore = a[_LEVELS], a[_POINTS], a[_IGNORE] != 0
    each, samples, pairs = levels * points, images * levels * points, 2 * points
    moved = pairs * levels if a[_PER_LEVEL] else pairs
    between = pairs if a[_PER_LEVEL] else 0
    start, stop = heads_of
    first, last = queries_of
    for q in range(first, last):
        reference = a[_REFERENCE] + 8 * ((n if a[_REFERENCES] > 1 else 0) * queries + q)
        middle = load_float(reference), load_float(reference + 4)
        seen = a[_VISIBLE] + 4 * (n * a[_SEEN_BY] + (q if a[_SEEN_BY] > 1 else 0)) * images
        for h in range(start, stop):
            lane = (n * queries + q) * heads + h
            base = ((q - first) * heads + h) * samples
            nearer = 0  # visible images at or after this one
            for back in range(images):
                m = images - 1 - back
                visible = load_int(seen + 4 * m) != 0
                nearer += visible
                r, at = nearer if visible else 0, base + m * each
                if visible:
                    table = a[_LOGIT_TABLE] + 4 * (r * heads + h) * each
                    _add(a[_LOGITS] + 4 * lane * each, table, each, weights_at + 4 * at)
                else:
                    _fill(weights_at + 4 * at, each, _HIDDEN)
                offsets, table = a[_OFFSETS] + 4 * lane * moved, a[_OFFSET_TABLE] + 4 * (r * heads + h) * moved
                for level in range(levels):
                    scales, away = a[_SCALES] + 8 * level, 4 * level * between
                    span, into = (load_float(scales), load_float(scales + 4)), locations_at + 8 * (at + level * points)
                    _move(offsets + away, table + away, points, middle, span, into)
            left = _softmax(weights_at + 4 * base, samples, ignore)
            if ignore:
                _share(a[_TOKEN] + 4 * h * dim, dim, left, a[_OUT] + 4 * lane * dim)
            else:
                _fill(a[_OUT] + 4 * lane * dim, dim, _ZERO)


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
