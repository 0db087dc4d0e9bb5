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
starts, so that the pages it touches are few.

Why lanes: the value gradient of a lane is written by one thread, queries in order, so threads need no atomics, the
order of every sum is fixed, and a result depends neither on the number of threads nor on other rows: equal inputs,
equal bits.

Corners outside the map get weight 0 and the address of their neighbour inside, so memory outside is never read and no
other value can leak in. Samples wholly outside or (forward) with weight 0 are skipped. NaN locations give NaN.

Source: bilinear sampling and its derivatives as in `grid_sample(align_corners=False, padding_mode="zeros")`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from mmi_kernels.numba_simd import add4, load4, load_float, load_int, operations, store4

CHUNK = 64
"""Samples placed at once."""

_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
# Rows of the scratch array [_ROWS, CHUNK]: the corners' bilinear factors times the weight (top left … bottom right),
# fractions, existing columns and rows (1 or 0), then four dot products per sample (backward). Rows of the scratch array
# of integers: the corners' positions, and whether the sample is to be read at all.
_C00, _C01, _C10, _C11, _FX, _FY, _LEFT, _RIGHT, _TOP, _BOTTOM, _DOTS = (np.uint64(i * CHUNK) for i in range(11))
_ROWS = 14
_AT00, _AT01, _AT10, _AT11, _LIVE = (np.uint64(i * CHUNK) for i in range(5))
_ROW = 4 * CHUNK  # bytes
_OPTIONS = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


def _compile(function: Any) -> Any:
    """njit without the GIL, cached on disk: beside this file, else in the user's cache, else not at all."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no writable place for a cache (read-only install without a home)
        return njit(**_OPTIONS)(function)


_part = njit(**_OPTIONS)
"""A part of the two entry points, which is compiled into them."""


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@_part
def _floats(address, count):
    return carray(_pointer(address), count, np.float32)


@_part
def _place(locations_at, weights_at, count, slots_at, columns, zeros, scratch_at, places_at):
    """Fills the scratch arrays for `count` samples in a row. zeros: whether samples of weight 0 are live."""
    locations, weights = _floats(locations_at, 2 * count), _floats(weights_at, count)
    slots, scratch = _floats(slots_at, 3 * columns), _floats(scratch_at, _ROWS * CHUNK)
    places, columns = carray(_pointer(places_at), 5 * CHUNK, np.int32), np.uint64(columns)
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


@_part
def _corner(maps, place, corner, stride):
    return maps + np.int64(load_int(place + corner * _ROW)) * stride


def _channel_loops(width: int) -> tuple[Any, Any]:
    """(gather, scatter) for `width` channels of the samples [first, last) that are placed."""
    zero, load, store, add, multiply, fma, sum4 = operations(width)

    @_part
    def gather(maps, stride, first, last, scratch, places, out):
        """out += the samples, weighted."""
        total, lower = load(out), zero()  # two sums, for the CPU to work on side by side
        for k in range(first, last):
            place, factor = places + 4 * k, scratch + 4 * k
            if load_int(place + 4 * _ROW) == 0:
                continue
            total = fma(load_float(factor), load(_corner(maps, place, 0, stride)), total)
            lower = fma(load_float(factor + 2 * _ROW), load(_corner(maps, place, 2, stride)), lower)
            total = fma(load_float(factor + _ROW), load(_corner(maps, place, 1, stride)), total)
            lower = fma(load_float(factor + 3 * _ROW), load(_corner(maps, place, 3, stride)), lower)
        store(out, add(total, lower))

    @_part
    def spread(at, factor, grad):
        store(at, fma(load_float(factor), grad, load(at)))

    @_part
    def scatter(maps, grad_maps, stride, first, last, scratch, places, grad_out):
        """Adds to the samples' dot products and, unless its address is 0, to grad_maps."""
        grad = load(grad_out)
        for k in range(first, last):
            place, factor, dots = places + 4 * k, scratch + 4 * k, scratch + 10 * _ROW + 16 * k
            if load_int(place + 4 * _ROW) == 0:
                continue
            at00, at01 = _corner(0, place, 0, stride), _corner(0, place, 1, stride)
            at10, at11 = _corner(0, place, 2, stride), _corner(0, place, 3, stride)
            upper0, upper1 = multiply(grad, load(maps + at00)), multiply(grad, load(maps + at01))
            lower0, lower1 = multiply(grad, load(maps + at10)), multiply(grad, load(maps + at11))
            store4(dots, add4(load4(dots), sum4(upper0, upper1, lower0, lower1)))
            if grad_maps != 0:  # one corner after the other: clamped corners may be the same position
                spread(grad_maps + at00, factor, grad)
                spread(grad_maps + at01, factor + _ROW, grad)
                spread(grad_maps + at10, factor + 2 * _ROW, grad)
                spread(grad_maps + at11, factor + 3 * _ROW, grad)

    return gather, scatter


_gather64, _scatter64 = _channel_loops(64)
_gather32, _scatter32 = _channel_loops(32)
_gather16, _scatter16 = _channel_loops(16)
_gather1, _scatter1 = _channel_loops(1)
_zero1, _load1, _store1, *_ = operations(1)
_zero16, _load16, _store16, *_ = operations(16)


@_part
def _copy(source, stride, target, target_stride, positions, count):
    """count floats of each position, from one stride (bytes) to another; zeros if source is 0."""
    for i in range(positions):
        a, b, end = source + i * stride, target + i * target_stride, target + i * target_stride + 4 * count
        while b + 64 <= end:
            _store16(b, _load16(a) if source != 0 else _zero16())
            a, b = a + 64, b + 64
        while b < end:
            _store1(b, _load1(a) if source != 0 else _zero1())
            a, b = a + 4, b + 4


@_part
def _gather(maps, stride, first, last, scratch, places, out, dim):
    end = out + 4 * dim
    while out + 256 <= end:
        _gather64(maps, stride, first, last, scratch, places, out)
        maps, out = maps + 256, out + 256
    if out + 128 <= end:
        _gather32(maps, stride, first, last, scratch, places, out)
        maps, out = maps + 128, out + 128
    if out + 64 <= end:
        _gather16(maps, stride, first, last, scratch, places, out)
        maps, out = maps + 64, out + 64
    while out < end:
        _gather1(maps, stride, first, last, scratch, places, out)
        maps, out = maps + 4, out + 4


@_part
def _scatter(maps, grad_maps, stride, first, last, scratch, places, grad_out, dim):
    done, total, wanted = 0, 4 * dim, grad_maps != 0
    while done < total:
        at, into, pull = maps + done, grad_maps + done if wanted else 0, grad_out + done
        if done + 256 <= total:
            _scatter64(at, into, stride, first, last, scratch, places, pull)
            done += 256
        elif done + 128 <= total:
            _scatter32(at, into, stride, first, last, scratch, places, pull)
            done += 128
        elif done + 64 <= total:
            _scatter16(at, into, stride, first, last, scratch, places, pull)
            done += 64
        else:
            _scatter1(at, into, stride, first, last, scratch, places, pull)
            done += 4


@_part
def _fold(weights_at, count, slots_at, columns, scratch_at, grad_locations_at, grad_weights_at):
    """Dot products and fractions of the placed samples → their gradients of weight and location."""
    weights, slots, scratch = _floats(weights_at, count), _floats(slots_at, 3 * columns), _floats(scratch_at, _ROWS * CHUNK)
    grad_locations, grad_weights = _floats(grad_locations_at, 2 * count), _floats(grad_weights_at, count)
    columns = np.uint64(columns)
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


@_compile
def sample_lanes(value, locations, weights, slots, out, sizes, group, pack, first, last, first_query, last_query):
    """Writes out for lanes [first, last) and queries [first_query, last_query).

    Args:
        value, locations, weights, slots, out: addresses.
        sizes: (S, Q, H, D, L·P).
        group: how many heads make a group: 1, or as many as have at most CHUNK samples.
        pack: copy each group's maps together first (pays when many queries read them).
    """
    positions, queries, heads, dim, samples = sizes
    scratch, places = np.empty(_ROWS * CHUNK, np.float32), np.empty(5 * CHUNK, np.int32)
    packed = np.empty(positions * dim * group if pack else 0, np.float32)
    scratch_at, places_at = np.int64(scratch.ctypes.data), np.int64(places.ctypes.data)
    for n in range(first // heads, (last + heads - 1) // heads):
        end = min(last - n * heads, heads)
        for start in range(max(first - n * heads, 0), end, group if pack else heads):
            stop = min(start + group, end) if pack else end
            maps, stride = value + 4 * (n * positions * heads + start) * dim, 4 * heads * dim
            if pack:
                wide = 4 * (stop - start) * dim
                _copy(maps, stride, np.int64(packed.ctypes.data), wide, positions, wide // 4)
                maps, stride = np.int64(packed.ctypes.data), wide
            for q in range(first_query, last_query):
                for h in range(start, stop, group):
                    lane, together = (n * queries + q) * heads + h, min(group, stop - h)
                    _copy(0, 0, out + 4 * lane * dim, 0, 1, together * dim)
                    for slot in range(0, samples, CHUNK):
                        at, each = lane * samples + slot, min(CHUNK, samples - slot)
                        _place(locations + 8 * at, weights + 4 * at, together * each, slots + 4 * slot, group * samples,
                            False, scratch_at, places_at)
                        for j in range(together):
                            _gather(maps + 4 * (h - start + j) * dim, stride, j * each, (j + 1) * each, scratch_at,
                                places_at, out + 4 * (lane + j) * dim, dim)
    return scratch.size + places.size + packed.size  # alive until here: their addresses were in use


@_compile
def sample_lanes_backward(value, locations, weights, slots, grad_out, grad_value, grad_locations, grad_weights, sizes, group, pack, first, last):
    """Gradients for lanes [first, last), as `sample_lanes`. grad_value: 0 if not wanted; zeros before unless packed."""
    positions, queries, heads, dim, samples = sizes
    scratch, places = np.empty(_ROWS * CHUNK, np.float32), np.empty(5 * CHUNK, np.int32)
    room = positions * dim * group if pack else 0
    packed, packed_grad = np.empty(room, np.float32), np.empty(room if grad_value != 0 else 0, np.float32)
    scratch_at, places_at = np.int64(scratch.ctypes.data), np.int64(places.ctypes.data)
    for n in range(first // heads, (last + heads - 1) // heads):
        end = min(last - n * heads, heads)
        for start in range(max(first - n * heads, 0), end, group if pack else heads):
            stop = min(start + group, end) if pack else end
            offset, stride, wide = 4 * (n * positions * heads + start) * dim, 4 * heads * dim, 4 * (stop - start) * dim
            maps, grad_maps = value + offset, grad_value + offset if grad_value != 0 else 0
            if pack:
                maps = np.int64(packed.ctypes.data)
                _copy(value + offset, stride, maps, wide, positions, wide // 4)
                if grad_value != 0:
                    grad_maps = np.int64(packed_grad.ctypes.data)
                    _copy(0, 0, grad_maps, wide, positions, wide // 4)
                stride = wide
            for q in range(queries):
                for h in range(start, stop, group):
                    lane, together = (n * queries + q) * heads + h, min(group, stop - h)
                    for slot in range(0, samples, CHUNK):
                        at, each = lane * samples + slot, min(CHUNK, samples - slot)
                        count, columns = together * each, group * samples
                        _place(locations + 8 * at, weights + 4 * at, count, slots + 4 * slot, columns, True, scratch_at, places_at)
                        _copy(0, 0, scratch_at + 10 * _ROW, 0, 1, 4 * count)
                        for j in range(together):
                            away = 4 * (h - start + j) * dim
                            _scatter(maps + away, grad_maps + away if grad_maps != 0 else 0, stride, j * each, (j + 1) * each, scratch_at,
                                places_at, grad_out + 4 * (lane + j) * dim, dim)
                        _fold(weights + 4 * at, count, slots + 4 * slot, columns, scratch_at, grad_locations + 8 * at, grad_weights + 4 * at)
            if pack and grad_value != 0:
                _copy(grad_maps, wide, grad_value + offset, 4 * heads * dim, positions, wide // 4)
    return scratch.size + places.size + packed.size + packed_grad.size
