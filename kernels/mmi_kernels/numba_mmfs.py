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

import numpy as np
from numba import carray
from numba.np.unsafe.ndarray import to_fixed_tuple

from mmi_kernels.numba_loops import CHUNK, ROW, ROWS, band_of, compiled, copy, pack_band, part, pointer, sweep
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

_LOWEST = np.float32(-87.0)
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
    """Logits of one pair → (largest, one over the sum, weight of the ignore slot); their exponentials in place."""
    top = filled16(_ZERO if ignore else _HIDDEN)
    for i in range(0, count, 16):
        block = load16(weights_at + 4 * i)
        if count - i < 16:
            block = first16(block, count - i, _HIDDEN)
            store16(weights_at + 4 * i, block)
        top = larger16(block, top)
    top = _fold(top, 16, True)
    total = _zero16()
    for i in range(0, count, 16):
        grown = exp16(less16(load16(weights_at + 4 * i), top))
        total = add16(total, grown)
        store16(weights_at + 4 * i, grown)
    total = _fold(total, 16, False)
    left = _zero16()
    if ignore:
        left = exp16(less16(_zero16(), top))
        total = add16(total, left)
    scale = divided16(filled16(_ONE), total)
    return first_of16(top), first_of16(scale), first_of16(multiply16(left, scale))


@part
def _scaled(weights_at, count, scale):
    for i in range(0, count, 16):
        store16(weights_at + 4 * i, multiply16(load16(weights_at + 4 * i), filled16(scale)))


@part
def _weights(weights_at, count, top, scale):
    """Logits → weights in place, of which largest and scale are known."""
    for i in range(0, count, 16):
        grown = exp16(less16(load16(weights_at + 4 * i), filled16(top)))
        store16(weights_at + 4 * i, multiply16(grown, filled16(scale)))


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
    for i in range(0, count, 16):
        store16(into_at + 4 * i, filled16(value))


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
def _logits(a, n, q, h, heads_once, levels_of, into_at):
    """Logits of head h of query q in a range of levels; of `heads_once` heads if there is one image, all its levels."""
    images, heads, levels, points = a[_IMAGES], a[_HEADS], a[_LEVELS], a[_POINTS]
    lane, nearer = (n * a[_QUERIES] + q) * heads + h, 0  # visible images at or after this one
    for back in range(images):
        m = images - 1 - back
        first, last = _levels_of(a, m, levels_of)
        visible = _seen(a, n, q, m)
        nearer += visible
        if last <= first:
            continue
        into, count = into_at + 4 * (m * levels + first - levels_of[0]) * points, (last - first) * points * heads_once
        if visible:
            away = 4 * first * points
            table = a[_LOGIT_TABLE] + 4 * (nearer * heads + h) * levels * points + away
            _add(a[_LOGITS] + 4 * lane * levels * points + away, table, count, into)
        else:
            for i in range(count):
                store_float(into + 4 * i, _HIDDEN)


@part
def _locations(a, n, q, h, heads_once, levels_of, into_at):
    """As `_logits`, locations."""
    images, heads, levels, points = a[_IMAGES], a[_HEADS], a[_LEVELS], a[_POINTS]
    lane, nearer = (n * a[_QUERIES] + q) * heads + h, 0
    reference = a[_REFERENCE] + 8 * ((n if a[_REFERENCES] > 1 else 0) * a[_QUERIES] + q)
    middle = load_float(reference), load_float(reference + 4)
    pairs = 2 * points
    moved, between = (pairs * levels, pairs) if a[_PER_LEVEL] else (pairs, 0)
    for back in range(images):
        m = images - 1 - back
        first, last = _levels_of(a, m, levels_of)
        visible = _seen(a, n, q, m)
        nearer += visible
        r = nearer if visible else 0
        offsets, table = a[_OFFSETS] + 4 * lane * moved, a[_OFFSET_TABLE] + 4 * (r * heads + h) * moved
        for level in range(first, last):
            scales, away = a[_SCALES] + 8 * level, 4 * level * between
            into = into_at + 4 * (m * levels + level - levels_of[0]) * pairs
            span = load_float(scales), load_float(scales + 4)
            _move(offsets + away, table + away, pairs * heads_once, middle, span, into)


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
            _logits(a, n, q, h, 1, (0, levels), row_at)
            top, scale, left = _softmax(row_at, samples, a[_IGNORE] != 0)
            store_float(into_at, top)
            store_float(into_at + 4, scale)
            into_at += 8
            _begin(a, n, q, h, left)


@part
def _tile(a, n, heads_of, queries_of, levels_of, statistics_at, locations_at, weights_at):
    """Locations and weights of a few queries into their buffers; without statistics, out's beginning, too."""
    start, stop = heads_of
    points, ignore = a[_POINTS], a[_IGNORE] != 0
    each, group = (levels_of[1] - levels_of[0]) * points, stop - start
    short = statistics_at == 0 and (each == 1 or each == 2 or each == 4 or each == 8)
    at_once = group if short and a[_IMAGES] == 1 else 1
    flat = group if a[_IMAGES] == 1 and a[_LEVELS] == 1 else 1
    into, moved, left_at = weights_at, locations_at, locations_at
    for q in range(queries_of[0], queries_of[1]):
        begun = into
        for h in range(start, stop, at_once):
            _logits(a, n, q, h, at_once, levels_of, into)
            if statistics_at != 0:
                _weights(into, each, load_float(statistics_at), load_float(statistics_at + 4))
                statistics_at += 8
            elif not short:
                _, scale, left = _softmax(into, each, ignore)
                _scaled(into, each, scale)
                _begin(a, n, q, h, left)
            into += 4 * each * at_once
        if short:
            left_at = moved  # where locations come later
            _softmax_short(begun, group * each, each, ignore, left_at)
            for h in range(start, stop):
                _begin(a, n, q, h, load_float(left_at + 4 * (h - start) * each) if ignore else _ZERO)
        for h in range(start, stop, flat):
            _locations(a, n, q, h, flat, levels_of, moved)
            moved += 8 * each * flat


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
                maps, stride = a[_VALUE] + 4 * (source * positions * heads + start) * dim, 4 * heads * dim
                if pack:
                    wide = 4 * (stop - start) * dim
                    maps, stride = pack_band(maps, stride, packed_at, wide, place, places), wide
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
