"""Both attentions whole on the CPU, compiled by numba: from projected queries to sampled values, forward alone.

Place in the flow: `fused.py` comes here without gradients (through `numba_attention.py`); with gradients it makes
locations and weights in torch and samples through `op.deform_sample`. Here they exist for a few queries at a time, in a
buffer that stays in the processor's cache: each thread makes those of a tile, `numba_loops.sweep` reads them, the next
tile overwrites them. Which row of the values a sequence looks at is an index, so nothing is gathered before.

The softmax works on sixteen numbers at once, of one pair of query and head or of several that have up to eight samples.
Its exponential is its own (`numba_simd.exp16`), since numba calls the C library for every single one: e^x = 2^n · e^r
with r = x − n·ln 2 in [−0.35, 0.35], and a polynomial for e^r with a relative error of 3e-9 before rounding.

Source: as `fused.py`; the exponential as in Cody & Waite 1980, with coefficients of our own (smallest largest error).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.np.unsafe.ndarray import to_fixed_tuple

from mmi_kernels.numba_loops import band_maps, band_of, compiled, sweep
from mmi_kernels.numba_samples import CHUNK, ROW, ROWS, copy, part, pointer
from mmi_kernels.numba_simd import (
    divided16,
    exp16,
    filled16,
    first16,
    first_of16,
    larger16,
    less16,
    load_float,
    load_int,
    operations,
    store_float,
    swapped1,
    swapped2,
    swapped4,
    swapped8,
)

FIELDS = (
    *("value", "offsets", "logits", "offset_table", "logit_table", "reference", "visible", "scales", "token", "rows"),
    *("out", "positions", "queries", "heads", "dim", "images", "levels", "points", "references", "seen_by"),
    *("per_level", "ignore", "group", "pack", "tile", "bands", "band_count", "band_samples", "band_positions"),
)
"""What the int64 array that `attend_lanes` reads holds: addresses, then sizes and switches."""
_VALUE, _OFFSETS, _LOGITS, _OFFSET_TABLE, _LOGIT_TABLE, _REFERENCE, _VISIBLE, _SCALES, _TOKEN = range(9)
_SOURCES, _OUT = range(9, 11)
_POSITIONS, _QUERIES, _HEADS, _DIM, _IMAGES, _LEVELS, _POINTS, _REFERENCES, _SEEN_BY = range(11, 20)
_PER_LEVEL, _IGNORE, _GROUP, _PACK, _TILE, _BANDS, _BAND_COUNT, _BAND_SAMPLES, _BAND_POSITIONS = range(20, 29)

_HIDDEN = np.float32(-1e30)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
SLACK = 16
"""Floats that may be written behind a buffer: blocks are written whole, the next pair overwrites what is too much."""
_zero16, load16, store16, add16, multiply16, fma16, pairs16, _ = operations(16)
_zero8, load8, store8, add8, multiply8, fma8, pairs8, _ = operations(8)


@part
def _fold(block, width, largest):
    """Each number becomes the sum (or the largest) of its `width` neighbours, a power of two."""
    if width > 1:
        other = swapped1(block)
        block = larger16(block, other) if largest else add16(block, other)
    if width > 2:
        other = swapped2(block)
        block = larger16(block, other) if largest else add16(block, other)
    if width > 4:
        other = swapped4(block)
        block = larger16(block, other) if largest else add16(block, other)
    if width > 8:
        other = swapped8(block)
        block = larger16(block, other) if largest else add16(block, other)
    return block


@part
def _softmax_short(weights_at, count, each, ignore, left_at):
    """Logits → weights in place for pairs of 1, 2, 4 or 8 samples; with one more logit 0 if `ignore`, whose weight goes
    to `left_at` once per sample."""
    for i in range(0, count, 16):
        x = load16(weights_at + 4 * i)
        top = _fold(x, each, True)
        if ignore:
            top = larger16(top, _zero16())
        grown = exp16(less16(x, top))
        total = _fold(grown, each, False)
        if ignore:
            left = exp16(less16(_zero16(), top))
            total = add16(total, left)
            store16(left_at + 4 * i, divided16(left, total))
        store16(weights_at + 4 * i, divided16(grown, total))


@part
def _softmax(weights_at, count, ignore):
    """Logits of one pair → (largest, one over the sum, weight of the ignore slot); weights in place."""
    top = filled16(_ZERO if ignore else _HIDDEN)
    whole = count - count % 16
    for i in range(0, whole, 16):
        top = larger16(load16(weights_at + 4 * i), top)
    rest = load16(weights_at + 4 * whole) if whole < count else _zero16()
    if whole < count:
        top = larger16(first16(rest, count - whole, filled16(_HIDDEN)), top)
    top = _fold(top, 16, True)
    total, left = _zero16(), _zero16()
    for i in range(0, whole, 16):
        grown = exp16(less16(load16(weights_at + 4 * i), top))
        total = add16(total, grown)
        store16(weights_at + 4 * i, grown)
    last = _zero16()
    if whole < count:
        last = exp16(less16(rest, top))
        total = add16(total, first16(last, count - whole, _zero16()))
    total = _fold(total, 16, False)
    if ignore:
        left = exp16(less16(_zero16(), top))
        total = add16(total, left)
    scale = divided16(filled16(_ONE), total)
    for i in range(0, whole, 16):
        store16(weights_at + 4 * i, multiply16(load16(weights_at + 4 * i), scale))
    if whole < count:  # what lies behind is the next pair's
        store16(weights_at + 4 * whole, first16(multiply16(last, scale), count - whole, rest))
    return first_of16(top), first_of16(scale), first_of16(multiply16(left, scale))


@part
def _weights(weights_at, count, top, scale):
    """Logits → weights in place, of which largest and scale are known."""
    for i in range(0, count, 16):
        logits = load16(weights_at + 4 * i)
        found = multiply16(exp16(less16(logits, filled16(top))), filled16(scale))
        store16(weights_at + 4 * i, first16(found, count - i, logits) if count - i < 16 else found)


@part
def _add(left_at, right_at, count, into_at):
    i = 0
    while i + 16 <= count:
        store16(into_at + 4 * i, add16(load16(left_at + 4 * i), load16(right_at + 4 * i)))
        i += 16
    if i + 8 <= count:
        store8(into_at + 4 * i, add8(load8(left_at + 4 * i), load8(right_at + 4 * i)))
        i += 8
    while i < count:
        store_float(into_at + 4 * i, load_float(left_at + 4 * i) + load_float(right_at + 4 * i))
        i += 1


@part
def _fill(into_at, count, value):
    for i in range(count):
        store_float(into_at + 4 * i, value)


@part
def _move(offsets_at, table_at, count, middle, span, into_at):
    """Locations: middle + (offset + table) · span, as (x, y); count: of numbers, two per location."""
    i = 0
    while i + 16 <= count:
        moved = multiply16(add16(load16(offsets_at + 4 * i), load16(table_at + 4 * i)), pairs16(span[0], span[1]))
        store16(into_at + 4 * i, add16(moved, pairs16(middle[0], middle[1])))
        i += 16
    if i + 8 <= count:
        short = multiply8(add8(load8(offsets_at + 4 * i), load8(table_at + 4 * i)), pairs8(span[0], span[1]))
        store8(into_at + 4 * i, add8(short, pairs8(middle[0], middle[1])))
        i += 8
    while i < count:
        x = middle[0] + (load_float(offsets_at + 4 * i) + load_float(table_at + 4 * i)) * span[0]
        y = middle[1] + (load_float(offsets_at + 4 * i + 4) + load_float(table_at + 4 * i + 4)) * span[1]
        store_float(into_at + 4 * i, x)
        store_float(into_at + 4 * i + 4, y)
        i += 2


@part
def _share(token_at, count, weight, into_at):
    """The ignore slot's share of the output."""
    i = 0
    while i + 16 <= count:
        store16(into_at + 4 * i, multiply16(load16(token_at + 4 * i), filled16(weight)))
        i += 16
    while i < count:
        store_float(into_at + 4 * i, weight * load_float(token_at + 4 * i))
        i += 1


@part
def _seen(a, n, q, m):
    """Whether query q of row n sees image m."""
    place = (n * a[_SEEN_BY] + (q if a[_SEEN_BY] > 1 else 0)) * a[_IMAGES] + m
    return load_int(a[_VISIBLE] + 4 * place) != 0


@part
def _levels_of(a, m, levels_of):
    """Which levels of image m are among those asked for, of all images."""
    levels = a[_LEVELS]
    return max(levels_of[0] - m * levels, 0), min(levels_of[1] - m * levels, levels)


@part
def _logits(a, n, q, heads_of, levels_of, into_at):
    """Logits [heads, levels, P] of query q."""
    images, heads, levels, points, start = a[_IMAGES], a[_HEADS], a[_LEVELS], a[_POINTS], heads_of[0]
    given, each = levels * points, (levels_of[1] - levels_of[0]) * points
    lane, nearer = (n * a[_QUERIES] + q) * heads + start, 0  # visible images at or after this one
    for back in range(images):
        m = images - 1 - back
        first, last = _levels_of(a, m, levels_of)
        visible = _seen(a, n, q, m)
        nearer += visible
        if last <= first:
            continue
        into, count = into_at + 4 * (m * levels + first - levels_of[0]) * points, (last - first) * points
        many, away = heads_of[1] - start, 4 * first * points
        if count == each and count == given:
            many, count = 1, many * count
        logits, table = (
            a[_LOGITS] + 4 * lane * given + away,
            a[_LOGIT_TABLE] + 4 * (nearer * heads + start) * given + away,
        )
        for j in range(many):
            if visible:
                _add(logits + 4 * j * given, table + 4 * j * given, count, into + 4 * j * each)
            else:
                _fill(into + 4 * j * each, count, _HIDDEN)


@part
def _locations(a, n, q, heads_of, levels_of, into_at):
    """Locations [heads, levels, P, 2] of query q."""
    images, heads, levels, pairs, start = a[_IMAGES], a[_HEADS], a[_LEVELS], 2 * a[_POINTS], heads_of[0]
    lane, nearer = (n * a[_QUERIES] + q) * heads + start, 0
    reference = a[_REFERENCE] + 8 * ((n if a[_REFERENCES] > 1 else 0) * a[_QUERIES] + q)
    middle = load_float(reference), load_float(reference + 4)
    moved, between = (pairs * levels, pairs) if a[_PER_LEVEL] else (pairs, 0)
    each = (levels_of[1] - levels_of[0]) * pairs
    many, count = heads_of[1] - start, pairs
    if each == pairs and moved == pairs:
        many, count = 1, many * pairs
    for back in range(images):
        m = images - 1 - back
        first, last = _levels_of(a, m, levels_of)
        visible = _seen(a, n, q, m)
        nearer += visible
        r = nearer if visible else 0
        for level in range(first, last):
            scales, away = a[_SCALES] + 8 * level, 4 * level * between
            offsets, table = (
                a[_OFFSETS] + 4 * lane * moved + away,
                a[_OFFSET_TABLE] + 4 * (r * heads + start) * moved + away,
            )
            into = into_at + 4 * (m * levels + level - levels_of[0]) * pairs
            span = load_float(scales), load_float(scales + 4)
            for j in range(many):
                _move(offsets + 4 * j * moved, table + 4 * j * moved, count, middle, span, into + 4 * j * each)


@part
def _begin(a, n, q, h, weight):
    """The ignore slot's share of the output, or zeros."""
    dim = a[_DIM]
    out = a[_OUT] + 4 * ((n * a[_QUERIES] + q) * a[_HEADS] + h) * dim
    if a[_IGNORE] != 0:
        _share(a[_TOKEN] + 4 * h * dim, dim, weight, out)
    else:
        copy(0, 0, out, 0, 1, dim)


@part
def _statistics(a, n, heads_of, queries_of, row_at, into_at):
    """Largest logit and scale of every pair, and what out begins with: a first pass if there are several bands."""
    levels, samples = a[_IMAGES] * a[_LEVELS], a[_IMAGES] * a[_LEVELS] * a[_POINTS]
    for q in range(queries_of[0], queries_of[1]):
        for h in range(heads_of[0], heads_of[1]):
            _logits(a, n, q, (h, h + 1), (0, levels), row_at)
            top, scale, left = _softmax(row_at, samples, a[_IGNORE] != 0)
            store_float(into_at, top)
            store_float(into_at + 4, scale)
            into_at += 8
            _begin(a, n, q, h, left)


@part
def _tile(a, n, heads_of, queries_of, levels_of, statistics_at, locations_at, weights_at):
    """Locations and weights of a few queries into their buffers; without statistics, out's beginning, too."""
    start, stop = heads_of
    each, ignore = (levels_of[1] - levels_of[0]) * a[_POINTS], a[_IGNORE] != 0
    short = each == 1 or each == 2 or each == 4 or each == 8
    for q in range(queries_of[0], queries_of[1]):
        _logits(a, n, q, heads_of, levels_of, weights_at)
        if statistics_at == 0 and short:  # the ignore slot's weights lie meanwhile where locations come
            _softmax_short(weights_at, each * (stop - start), each, ignore, locations_at)
        for h in range(start, stop):
            into = weights_at + 4 * (h - start) * each
            if statistics_at != 0:
                _weights(into, each, load_float(statistics_at), load_float(statistics_at + 4))
                statistics_at += 8
            elif short:
                _begin(a, n, q, h, load_float(locations_at + 4 * (h - start) * each) if ignore else _ZERO)
            else:
                _begin(a, n, q, h, _softmax(into, each, ignore)[2])
        _locations(a, n, q, heads_of, levels_of, locations_at)
        weights_at += 4 * (stop - start) * each
        locations_at += 8 * (stop - start) * each


@compiled
def attend_lanes(fields, first, last, first_query, last_query):
    """Writes out for lanes [first, last) and queries [first_query, last_query); lanes as in `numba_loops`.

    Args:
        fields: address of an int64 array, see `FIELDS`.
    """
    a = to_fixed_tuple(carray(pointer(fields), 29, np.int64), 29)
    positions, queries, heads, dim, points = a[_POSITIONS], a[_QUERIES], a[_HEADS], a[_DIM], a[_POINTS]
    samples, group, pack, tile = a[_IMAGES] * a[_LEVELS] * points, a[_GROUP], a[_PACK] != 0, a[_TILE]
    most, bands = min(group, heads) if pack else heads, a[_BAND_COUNT]
    room = most * tile * (min(samples, a[_BAND_SAMPLES])) + SLACK
    scratch = np.empty(2 * ROWS * CHUNK, np.float32)
    packed = np.empty(a[_BAND_POSITIONS] * dim * group if pack else 0, np.float32)
    located, weighed = np.empty(2 * room, np.float32), np.empty(room, np.float32)
    known = np.empty((2 * most * (last_query - first_query) + samples + SLACK) if bands > 1 else 0, np.float32)
    scratch_at, packed_at = np.int64(scratch.ctypes.data), np.int64(packed.ctypes.data)
    locations_at, weights_at = np.int64(located.ctypes.data), np.int64(weighed.ctypes.data)
    known_at = np.int64(known.ctypes.data)
    row_at = known_at + 8 * most * (last_query - first_query)
    sizes, later = (positions, queries, heads, dim, samples), scratch_at + ROWS * ROW
    for n in range(first // heads, (last + heads - 1) // heads):
        end = min(last - n * heads, heads)
        source = carray(pointer(a[_SOURCES]), n + 1, np.int64)[n] if a[_SOURCES] != 0 else n
        for start in range(max(first - n * heads, 0), end, most):
            stop = min(start + most, end)
            if bands > 1:
                _statistics(a, n, (start, stop), (first_query, last_query), row_at, known_at)
            for i in range(bands):
                before, some, place, places, slots, columns = band_of(a[_BANDS], i)
                at, wide = a[_VALUE] + 4 * (source * positions * heads + start) * dim, 4 * (stop - start) * dim
                maps, stride = band_maps(at, 4 * heads * dim, pack, packed_at, wide, place, places)
                levels_of = (before // points, (before + some) // points)
                for q in range(first_query, last_query, tile):
                    until = min(q + tile, last_query)
                    statistics_at = known_at + 8 * (q - first_query) * (stop - start) if bands > 1 else 0
                    _tile(a, n, (start, stop), (q, until), levels_of, statistics_at, locations_at, weights_at)
                    gone = q * (stop - start) * some + start * some  # the buffers begin at query q and head start
                    tensors = (locations_at - 8 * gone, weights_at - 4 * gone, a[_OUT])
                    layout = (0, stop - start, some, 0, 0)
                    band = (some, slots, columns)
                    sweep(
                        maps,
                        stride,
                        tensors,
                        sizes,
                        layout,
                        band,
                        n,
                        (start, stop),
                        (q, until),
                        not pack,
                        False,
                        scratch_at,
                        later,
                    )
    return scratch.size + packed.size + located.size + weighed.size + known.size  # alive until here
