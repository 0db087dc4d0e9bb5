"""The compiled inner loops of the numba backend, forward and backward. Importing this file imports numba.

Place in the flow: `numba_cpu.py` cuts the work into ranges of "lanes" and calls these functions, one range per thread.
A lane is one (row n, head h) pair, lane = n·H + h. Tensors are C-contiguous float32 and named by their address:

    value [N, S, H, D]   locations [N, Q, H, L, P, 2]   weights [N, Q, H, L, P]   out, grad_out [N, Q, H, D]
    slots [3, heads of a group · L·P]: width, height and first position of the level of each sample

Heads are taken in groups that have up to 64 samples together, neighbours in memory. Per query and group: (1) `_place`
turns the locations into corner positions and fractions, branch-free so that the compiler vectorises it, all in float32
(positions stay exact below 2²⁴); (2) per head, the corners are summed in blocks of 64, 32, 16 and 1 channels; backward
also takes the dot products of the corners with the output gradient and (3) folds them into the gradients of weight and
location. With enough queries the group's maps are first copied together, since a stride of H·D floats between
neighbouring positions would waste most of the cache; with few, one query takes all its heads before the next one
starts, so that it touches few pages, and corners are fetched a group ahead (a fetch may name any address).

Why lanes: the value gradient of a lane is written by one thread, queries in order, so threads need no atomics, the
order of every sum is fixed, and a result depends neither on the number of threads nor on other rows: equal inputs,
equal bits.

Corners outside the map get weight 0 and the address of their neighbour inside, so memory outside is never read and no
other value can leak in. Samples wholly outside or (forward) with weight 0 are skipped. NaN locations give NaN.

Source: bilinear sampling and its derivatives as in `grid_sample(align_corners=False, padding_mode="zeros")`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from mmi_kernels import numba_simd
from mmi_kernels.numba_simd import add4, load4, load_float, load_int, operations, prefetch, store4

CHUNK = 64
"""Samples placed at once."""

_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
# Rows of a scratch array [ROWS, CHUNK]. As int32: the corners' positions (top left … bottom right), and whether the
# sample is to be read at all. As float32: the corners' bilinear factors times the weight, fractions, existing columns
# and rows (1 or 0), then four dot products per sample (backward).
_AT00, _AT01, _AT10, _AT11, _LIVE, _C00, _C01, _C10, _C11 = (np.uint64(i * CHUNK) for i in range(9))
_FX, _FY, _LEFT, _RIGHT, _TOP, _BOTTOM, _DOTS = (np.uint64(i * CHUNK) for i in range(9, 16))
ROWS = 19
ROW = 4 * CHUNK  # bytes
_LIVE_AT, _FACTORS_AT, _DOTS_AT = 4 * ROW, 5 * ROW, 15 * ROW  # bytes
OPTIONS = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


def named_after(function: Any, *sources: str) -> None:
    """Lets the name that numba files the code of `function` under tell of the files `sources`, too.

    numba itself notices only when the function's own file changes. Raises OSError where a file cannot be read.
    """
    content = b"".join(Path(source).read_bytes() for source in sources)
    function.__qualname__ += f"_{hashlib.sha256(content).hexdigest()[:16]}"


def compiled(function: Any) -> Any:
    """njit without the GIL, cached on disk: beside its file, else in the user's cache, else not at all."""
    try:
        named_after(function, __file__, numba_simd.__file__)
        return njit(cache=True, **OPTIONS)(function)
    except (OSError, RuntimeError):  # no source, or no writable place (read-only install without a home)
        return njit(**OPTIONS)(function)


part = njit(**OPTIONS)
"""A part of an entry point, which is compiled into it."""


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@part
def floats(address, count):
    return carray(pointer(address), count, np.float32)


@part
def _place(locations_at, weights_at, count, slots_at, columns, zeros, scratch_at):
    """Fills a scratch array for `count` samples in a row. zeros: whether samples of weight 0 are live."""
    locations, weights = floats(locations_at, 2 * count), floats(weights_at, count)
    slots, scratch = floats(slots_at, 3 * columns), floats(scratch_at, ROWS * CHUNK)
    places, columns = carray(pointer(scratch_at), ROWS * CHUNK, np.int32), np.uint64(columns)
    for i in range(count):
        k = np.uint64(i)
        width, height, start = slots[k], slots[columns + k], slots[columns + columns + k]
        x = locations[k + k] * width - _HALF
        y = locations[k + k + np.uint64(1)] * height - _HALF
        outside = (x <= -_ONE) | (y <= -_ONE) | (x >= width) | (y >= height)
        column, row = np.floor(x), np.floor(y)
        # comparisons with NaN are false, so a NaN location reads position 0 and carries the NaN in its fractions
        column0 = column if column > _ZERO else _ZERO
        column1 = column + _ONE if column > -_ONE else _ZERO
        row0 = row if row > _ZERO else _ZERO
        row1 = row + _ONE if row > -_ONE else _ZERO
        column0 = column0 if column0 < width else width - _ONE
        column1 = column1 if column1 < width else width - _ONE
        upper = start + (row0 if row0 < height else height - _ONE) * width
        lower = start + (row1 if row1 < height else height - _ONE) * width
        fx, fy, weight = x - column, y - row, weights[k]
        left = _ONE if column >= _ZERO else _ZERO
        right = _ONE if column + _ONE < width else _ZERO
        top = _ONE if row >= _ZERO else _ZERO
        bottom = _ONE if row + _ONE < height else _ZERO
        places[_AT00 + k], places[_AT01 + k] = np.int32(upper + column0), np.int32(upper + column1)
        places[_AT10 + k], places[_AT11 + k] = np.int32(lower + column0), np.int32(lower + column1)
        places[_LIVE + k] = np.int32(0) if outside | (weight == _ZERO) & (not zeros) else np.int32(1)
        scratch[_C00 + k], scratch[_C01 + k] = (
            (_ONE - fy) * (_ONE - fx) * top * left * weight,
            (_ONE - fy) * fx * top * right * weight,
        )
        scratch[_C10 + k], scratch[_C11 + k] = (
            fy * (_ONE - fx) * bottom * left * weight,
            fy * fx * bottom * right * weight,
        )
        scratch[_FX + k], scratch[_FY + k] = fx, fy
        scratch[_LEFT + k], scratch[_RIGHT + k], scratch[_TOP + k], scratch[_BOTTOM + k] = left, right, top, bottom


@part
def _corner(maps, sample, corner, stride):
    return maps + np.int64(load_int(sample + corner * ROW)) * stride


def _channel_loops(width: int) -> tuple[Any, Any]:
    """(gather, scatter) for `width` channels of the samples [first, last) that are placed."""
    zero, load, store, add, multiply, fma, _, sum4 = operations(width)

    @part
    def fetch(maps, sample, stride):
        for corner in range(4):
            at = _corner(maps, sample, corner, stride)
            for line in range(0, 4 * width, 64):
                prefetch(at + line)

    @part
    def gather(maps, stride, first, last, scratch, out, ahead, later):
        """out += the samples, weighted; unless `ahead` is 0, fetches those of `later` on these maps."""
        total, lower = load(out), zero()  # two sums, for the CPU to work on side by side
        for k in range(first, last):
            sample, factor = scratch + 4 * k, scratch + 4 * k + _FACTORS_AT
            if load_int(sample + _LIVE_AT) != 0:
                total = fma(load_float(factor), load(_corner(maps, sample, 0, stride)), total)
                lower = fma(load_float(factor + 2 * ROW), load(_corner(maps, sample, 2, stride)), lower)
                total = fma(load_float(factor + ROW), load(_corner(maps, sample, 1, stride)), total)
                lower = fma(load_float(factor + 3 * ROW), load(_corner(maps, sample, 3, stride)), lower)
            if ahead != 0 and load_int(later + 4 * k + _LIVE_AT) != 0:
                fetch(ahead, later + 4 * k, stride)
        store(out, add(total, lower))

    @part
    def spread(at, factor, grad):
        store(at, fma(load_float(factor), grad, load(at)))

    @part
    def scatter(maps, grad_maps, stride, first, last, scratch, grad_out):
        """Adds to the samples' dot products and, unless its address is 0, to grad_maps."""
        grad = load(grad_out)
        for k in range(first, last):
            sample, factor, dots = scratch + 4 * k, scratch + 4 * k + _FACTORS_AT, scratch + 16 * k + _DOTS_AT
            if load_int(sample + _LIVE_AT) == 0:
                continue
            at00, at01 = _corner(0, sample, 0, stride), _corner(0, sample, 1, stride)
            at10, at11 = _corner(0, sample, 2, stride), _corner(0, sample, 3, stride)
            upper0, upper1 = multiply(grad, load(maps + at00)), multiply(grad, load(maps + at01))
            lower0, lower1 = multiply(grad, load(maps + at10)), multiply(grad, load(maps + at11))
            store4(dots, add4(load4(dots), sum4(upper0, upper1, lower0, lower1)))
            if grad_maps != 0:  # one corner after the other: clamped corners may be the same position
                spread(grad_maps + at00, factor, grad)
                spread(grad_maps + at01, factor + ROW, grad)
                spread(grad_maps + at10, factor + 2 * ROW, grad)
                spread(grad_maps + at11, factor + 3 * ROW, grad)

    return gather, scatter


_gather64, _scatter64 = _channel_loops(64)
_gather32, _scatter32 = _channel_loops(32)
_gather16, _scatter16 = _channel_loops(16)
_gather1, _scatter1 = _channel_loops(1)
_zero1, _load1, _store1, *_ = operations(1)
_zero16, _load16, _store16, *_ = operations(16)


@part
def copy(source, stride, target, target_stride, positions, count):
    """count floats of each position, from one stride (bytes) to another; zeros if source is 0."""
    for i in range(positions):
        a, b, end = source + i * stride, target + i * target_stride, target + i * target_stride + 4 * count
        while b + 64 <= end:
            _store16(b, _load16(a) if source != 0 else _zero16())
            a, b = a + 64, b + 64
        while b < end:
            _store1(b, _load1(a) if source != 0 else _zero1())
            a, b = a + 4, b + 4


@part
def _gather(maps, stride, first, last, scratch, out, dim, ahead, later):
    done, total = 0, 4 * dim
    while done < total:
        at, into, soon = maps + done, out + done, ahead + done if ahead != 0 else 0
        if done + 256 <= total:
            _gather64(at, stride, first, last, scratch, into, soon, later)
            done += 256
        elif done + 128 <= total:
            _gather32(at, stride, first, last, scratch, into, soon, later)
            done += 128
        elif done + 64 <= total:
            _gather16(at, stride, first, last, scratch, into, soon, later)
            done += 64
        else:
            _gather1(at, stride, first, last, scratch, into, 0, 0)
            done += 4


@part
def _scatter(maps, grad_maps, stride, first, last, scratch, grad_out, dim):
    done, total, wanted = 0, 4 * dim, grad_maps != 0
    while done < total:
        at, into, pull = maps + done, grad_maps + done if wanted else 0, grad_out + done
        if done + 256 <= total:
            _scatter64(at, into, stride, first, last, scratch, pull)
            done += 256
        elif done + 128 <= total:
            _scatter32(at, into, stride, first, last, scratch, pull)
            done += 128
        elif done + 64 <= total:
            _scatter16(at, into, stride, first, last, scratch, pull)
            done += 64
        else:
            _scatter1(at, into, stride, first, last, scratch, pull)
            done += 4


@part
def _fold(weights_at, count, slots_at, columns, scratch_at, into):
    """Dot products and fractions of the placed samples → their gradients of location and weight, addresses `into`."""
    weights, slots = floats(weights_at, count), floats(slots_at, 3 * columns)
    scratch, columns = floats(scratch_at, ROWS * CHUNK), np.uint64(columns)
    grad_locations, grad_weights = floats(into[0], 2 * count), floats(into[1], count)
    for i in range(count):
        k = np.uint64(i)
        fx, fy, weight = scratch[_FX + k], scratch[_FY + k], weights[k]
        dots = _DOTS + np.uint64(4) * k
        dot00 = scratch[dots] * scratch[_LEFT + k] * scratch[_TOP + k]
        dot01 = scratch[dots + np.uint64(1)] * scratch[_RIGHT + k] * scratch[_TOP + k]
        dot10 = scratch[dots + np.uint64(2)] * scratch[_LEFT + k] * scratch[_BOTTOM + k]
        dot11 = scratch[dots + np.uint64(3)] * scratch[_RIGHT + k] * scratch[_BOTTOM + k]
        upper, lower = dot00 * (_ONE - fx) + dot01 * fx, dot10 * (_ONE - fx) + dot11 * fx
        slope = (dot01 - dot00) * (_ONE - fy) + (dot11 - dot10) * fy
        grad_weights[k] = upper * (_ONE - fy) + lower * fy
        grad_locations[k + k] = slope * weight * slots[k]
        grad_locations[k + k + np.uint64(1)] = (lower - upper) * weight * slots[columns + k]


@part
def _after(q, h, slot, start, stop, group, samples):
    """(query, first head, first sample) of the next step; a step is a chunk of samples of one query and group."""
    if slot + CHUNK < samples:
        return q, h, slot + CHUNK
    if h + group < stop:
        return q, h + group, 0
    return q + 1, start, 0


@part
def _place_step(tensors, sizes, group, n, q, h, stop, slot, zeros, scratch):
    """`_place` for one step."""
    _, queries, heads, _, samples = sizes
    locations, weights, slots = tensors[0], tensors[1], tensors[2]
    at = ((n * queries + q) * heads + h) * samples + slot
    count = min(group, stop - h) * min(CHUNK, samples - slot)
    _place(locations + 8 * at, weights + 4 * at, count, slots + 4 * slot, group * samples, zeros, scratch)


@part
def _together(q, h, heads_of, last_query, apart, per_step):
    """How many pairs of query and head from (q, h) on are placed at once: those that lie together, if they fit."""
    start, stop = heads_of
    left = stop - h if apart == 1 else (last_query - 1 - q) * (stop - start) + stop - h
    return 1 if apart > 1 else min(per_step, left)


@part
def sweep(maps, stride, tensors, sizes, layout, band, n, heads_of, queries_of, fetch, fresh, scratch, later):
    """Adds the samples of one band to out, for a range of heads and queries of row n; maps: of the first head.

    layout: where a pair's samples are in locations and weights, (Q of a row, heads of a query, samples of a pair, first
        sample of the band), and whether pairs lie apart: 0 never, 1 those of different queries, 2 all.
    band: (samples, address of their slots, columns of those).
    fresh: out starts as zeros, else the samples are added to what stands there.
    scratch and later: two scratch arrays. A step is placed before the one ahead of it is summed, which meanwhile
    fetches its corners, if asked to.
    """
    _, queries, heads, dim, _ = sizes
    rows, across, each, before, apart = layout
    samples, slots, columns = band
    start, stop = heads_of
    first_query, last_query = queries_of
    per_step = max(1, CHUNK // samples)
    q, h, slot, there = first_query, start, 0, 0
    together = 0
    next_q, next_h, next_slot = q, h, slot
    while q < last_query:
        next_together = 0
        if next_q < last_query:
            next_together = _together(next_q, next_h, heads_of, last_query, apart, per_step)
            count = next_together * min(CHUNK, samples - next_slot)
            at = ((n * rows + next_q) * across + next_h) * each + before + next_slot
            into = later if there else scratch
            _place(tensors[0] + 8 * at, tensors[1] + 4 * at, count, slots + 4 * next_slot, columns, False, into)
        ahead_h = next_h
        for j in range(together):
            k, many = j * min(CHUNK, samples - slot), min(CHUNK, samples - slot)
            out = tensors[2] + 4 * ((n * queries + q) * heads + h) * dim
            if fresh and slot == 0:
                copy(0, 0, out, 0, 1, dim)
            here, soon = maps + 4 * (h - start) * dim, 0
            if fetch and next_together > 0:
                soon = maps + 4 * (ahead_h - start) * dim
            _gather(here, stride, k, k + many, scratch, out, dim, soon, later)
            h, ahead_h = h + 1, ahead_h + 1
            if h == stop:
                q, h = q + 1, start
            if ahead_h == stop:
                ahead_h = start
        if together > 0:
            scratch, later = later, scratch
        there = 1
        q, h, slot, together = next_q, next_h, next_slot, next_together
        if slot + CHUNK < samples:
            next_slot = slot + CHUNK
        else:
            ahead = h - start + together
            next_q, next_h, next_slot = q + ahead // (stop - start), start + ahead % (stop - start), 0


@part
def band_of(bands, i):
    """(first sample, samples, first position, positions, address of slots, columns of slots) of band i."""
    a = carray(pointer(bands + i * 48), 6, np.int64)
    return a[0], a[1], a[2], a[3], a[4], a[5]


@part
def pack_band(maps, stride, packed, wide, first, positions):
    """Copies a band's maps together; returns where position 0 of the row would be."""
    copy(maps + first * stride, stride, packed, wide, positions, wide // 4)
    return packed - first * wide


@compiled
def sample_lanes(value, tensors, sizes, group, pack, bands, first, last, first_query, last_query):
    """Writes out for lanes [first, last) and queries [first_query, last_query).

    Args:
        value: address.
        tensors: addresses of locations, weights, out.
        sizes: (S, Q, H, D, L·P).
        group: how many heads make a group: 1, or as many as have at most CHUNK samples.
        pack: copy each group's maps together first (pays when many queries read them).
        bands: see `numba_cpu.Plan`.
    """
    positions, queries, heads, dim, samples = sizes
    bands_at, count, room, _ = bands
    scratch = np.empty(2 * ROWS * CHUNK, np.float32)
    packed = np.empty(room * dim * group if pack else 0, np.float32)
    scratch_at, packed_at = np.int64(scratch.ctypes.data), np.int64(packed.ctypes.data)
    for n in range(first // heads, (last + heads - 1) // heads):
        end = min(last - n * heads, heads)
        for start in range(max(first - n * heads, 0), end, group if pack else heads):
            stop = min(start + group, end) if pack else end
            heads_of, queries_of, later = (start, stop), (first_query, last_query), scratch_at + ROWS * ROW
            for i in range(count):
                before, some, place, places, slots, columns = band_of(bands_at, i)
                maps, stride = value + 4 * (n * positions * heads + start) * dim, 4 * heads * dim
                if pack:
                    wide = 4 * (stop - start) * dim
                    maps, stride = pack_band(maps, stride, packed_at, wide, place, places), wide
                layout = (queries, heads, samples, before, 2 if count > 1 else int(stop - start < heads))
                band = (some, slots, columns)
                fresh = i == 0
                sweep(
                    maps,
                    stride,
                    tensors,
                    sizes,
                    layout,
                    band,
                    n,
                    heads_of,
                    queries_of,
                    not pack,
                    fresh,
                    scratch_at,
                    later,
                )
    return scratch.size + packed.size  # alive until here: their addresses were in use


@part
def _sweep_backward(maps, grad_maps, stride, tensors, sizes, group, n, start, stop, scratch):
    """`sample_lanes_backward` for heads [start, stop) of row n, whose maps are given."""
    _, queries, heads, dim, samples = sizes
    _, weights, slots, grad_out, grad_locations, grad_weights = tensors
    q, h, slot = 0, start, 0
    while q < queries:
        _place_step(tensors, sizes, group, n, q, h, stop, slot, True, scratch)
        lane, together, each = (n * queries + q) * heads + h, min(group, stop - h), min(CHUNK, samples - slot)
        copy(0, 0, scratch + _DOTS_AT, 0, 1, 4 * together * each)
        for j in range(together):
            away, pull = 4 * (h - start + j) * dim, grad_out + 4 * (lane + j) * dim
            onto = grad_maps + away if grad_maps != 0 else 0
            _scatter(maps + away, onto, stride, j * each, (j + 1) * each, scratch, pull, dim)
        at = lane * samples + slot
        count, into = together * each, (grad_locations + 8 * at, grad_weights + 4 * at)
        _fold(weights + 4 * at, count, slots + 4 * slot, group * samples, scratch, into)
        q, h, slot = _after(q, h, slot, start, stop, group, samples)


@compiled
def sample_lanes_backward(value, grad_value, tensors, sizes, group, pack, first, last):
    """Gradients for lanes [first, last); arguments as of `sample_lanes`.

    Args:
        grad_value: address, 0 if not wanted. Must hold zeros unless maps are packed.
        tensors: addresses of locations, weights, slots, grad_out, grad_locations, grad_weights.
    """
    positions, _, heads, dim, _ = sizes
    scratch = np.empty(ROWS * CHUNK, np.float32)
    room = positions * dim * group if pack else 0
    packed, packed_grad = np.empty(room, np.float32), np.empty(room, np.float32)
    for n in range(first // heads, (last + heads - 1) // heads):
        end = min(last - n * heads, heads)
        for start in range(max(first - n * heads, 0), end, group if pack else heads):
            stop = min(start + group, end) if pack else end
            offset, stride = 4 * (n * positions * heads + start) * dim, 4 * heads * dim
            maps, grad_maps = value + offset, grad_value + offset if grad_value != 0 else 0
            if pack:
                wide = 4 * (stop - start) * dim
                maps, grad_maps = np.int64(packed.ctypes.data), np.int64(packed_grad.ctypes.data)
                copy(value + offset, stride, maps, wide, positions, wide // 4)
                copy(0, 0, grad_maps, wide, positions, wide // 4)
                stride = wide
            wanted = grad_maps if grad_value != 0 else 0
            _sweep_backward(maps, wanted, stride, tensors, sizes, group, n, start, stop, np.int64(scratch.ctypes.data))
            if pack and grad_value != 0:
                copy(grad_maps, stride, grad_value + offset, 4 * heads * dim, positions, stride // 4)
    return scratch.size + packed.size + packed_grad.size  # as above
