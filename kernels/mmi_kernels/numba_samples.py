"""Placing samples and summing their corners: the inner parts of the loops in `numba_loops.py`, compiled into those.

Place in the flow: `numba_loops.py` tells how samples are placed 64 at a time in a scratch array, then read or scattered
head by head; the parts are here. Importing this file imports numba.

Source: bilinear sampling and its derivatives as in `grid_sample(align_corners=False, padding_mode="zeros")`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

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
_LIVE_AT, _FACTORS_AT, DOTS_AT = 4 * ROW, 5 * ROW, 15 * ROW  # bytes
OPTIONS = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}

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
def place(locations_at, weights_at, count, slots_at, columns, zeros, scratch_at):
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
            sample, factor, dots = scratch + 4 * k, scratch + 4 * k + _FACTORS_AT, scratch + 16 * k + DOTS_AT
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
def gather_channels(maps, stride, first, last, scratch, out, dim, ahead, later):
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
def scatter_channels(maps, grad_maps, stride, first, last, scratch, grad_out, dim):
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
def fold(weights_at, count, slots_at, columns, scratch_at, into):
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
