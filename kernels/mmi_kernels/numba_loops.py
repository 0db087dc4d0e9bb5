"""The compiled inner loops of the numba backend, forward and backward. Importing this file imports numba.

Place in the flow: `numba_cpu.py` cuts the work into ranges of "lanes" and calls these functions, one range per thread.
A lane is one (row n, head h) pair, lane = n·H + h. All arrays are flat views of C-contiguous float32 tensors:

    value [N, S, H, D]   locations [N, Q, H, L, P, 2]   weights [N, Q, H, L, P]   out, grad_out [N, Q, H, D]
    slots [3, L·P]: width, height and first position of the level of each of a query's L·P samples

Per query: (1) `_place` turns up to 64 locations at once into corner positions and fractions, branch-free so that the
compiler vectorises it, all in float32 (positions stay exact below 2²⁴); (2) the channels of the corners are summed in
blocks of 16; backward also takes the dot products of the corners with the output gradient and (3) folds them into the
gradients of weight and location. With enough queries a lane's maps are first copied together, since a stride of
H·D floats between neighbouring positions would waste most of the cache.

Why lanes: the value gradient of a lane is written by that lane alone, so threads need no atomics, the order of every
sum is fixed, and a result depends neither on the number of threads nor on other rows: equal inputs, equal bits.

Corners outside the map get weight 0 and the address of their neighbour inside, so memory outside is never read and no
other value can leak in. Samples wholly outside or with weight 0 are skipped. NaN locations give NaN.

Source: bilinear sampling and its derivatives as in `grid_sample(align_corners=False, padding_mode="zeros")`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from mmi_kernels.numba_simd import dot16, fma16, load16, store16, zero16

_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
_CHUNK = 64  # samples placed at once
# Rows of the scratch array [_ROWS, _CHUNK]: corner positions (top left … bottom right), the corners' bilinear factors
# times the weight, fractions, existing columns and rows (1 or 0), inside at all (1 or 0), dot products (backward).
_AT00, _AT01, _AT10, _AT11, _C00, _C01, _C10, _C11 = (np.uint64(i * _CHUNK) for i in range(8))
_FX, _FY, _LEFT, _RIGHT, _TOP, _BOTTOM, _INSIDE = (np.uint64(i * _CHUNK) for i in range(8, 15))
_DOT00, _DOT01, _DOT10, _DOT11 = (np.uint64(i * _CHUNK) for i in range(15, 19))
_ROWS = 19
_OPTIONS = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}


def _compile(function: Any) -> Any:
    """njit without the GIL, cached on disk: beside this file, else in the user's cache, else not at all."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no writable place for a cache (read-only install without a home)
        return njit(**_OPTIONS)(function)


def _inline(function: Any) -> Any:
    """A part of the two entry points, merged into them: a call would count references of every array it passes."""
    return njit(inline="always", **_OPTIONS)(function)


@_inline
def _place(locations, weights, first, count, slots, slot, samples, scratch):
    """Fills rows _AT00 … _INSIDE of scratch for samples [first, first + count), the query's slots from `slot` on."""
    first, slot, samples = np.uint64(first), np.uint64(slot), np.uint64(samples)
    for i in range(count):
        k = np.uint64(i)
        at, of_slot = first + k, slot + k
        width, height, start = slots[of_slot], slots[samples + of_slot], slots[samples + samples + of_slot]
        x = locations[at + at] * width - _HALF
        y = locations[at + at + np.uint64(1)] * height - _HALF
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
        fx, fy, weight = x - column, y - row, weights[at]
        left = _ONE if column >= _ZERO else _ZERO
        right = _ONE if column + _ONE < width else _ZERO
        top = _ONE if row >= _ZERO else _ZERO
        bottom = _ONE if row + _ONE < height else _ZERO
        scratch[_AT00 + k], scratch[_AT01 + k] = upper + column0, upper + column1
        scratch[_AT10 + k], scratch[_AT11 + k] = lower + column0, lower + column1
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
        scratch[_INSIDE + k] = _ZERO if outside else _ONE


@_inline
def _address(base, position, stride):
    # through a signed integer, which CPUs convert in one instruction; unsigned, so numba omits its test for negatives
    return np.uint64(base + np.int64(position) * stride)


@_inline
def _copy_lane(source, at, stride, target, target_at, target_stride, positions, dim):
    """target[target_at + i · target_stride + d] = source[at + i · stride + d] for i < positions, d < dim."""
    for i in range(positions):
        a, b = np.uint64(at + i * stride), np.uint64(target_at + i * target_stride)
        blocks = dim // 16
        for _ in range(blocks):
            store16(target, b, load16(source, a))
            a, b = a + np.uint64(16), b + np.uint64(16)
        for _ in range(dim - 16 * blocks):
            target[b] = source[a]
            a, b = a + np.uint64(1), b + np.uint64(1)


@_compile
def sample_lanes(value, locations, weights, slots, out, sizes, pack, first, last, first_query, last_query):
    """Writes out for lanes [first, last) and queries [first_query, last_query).

    sizes: (S, Q, H, D, L·P). pack: copy each lane's maps together first (pays when many queries read them).
    """
    positions, queries, heads, dim, samples = sizes
    scratch = np.empty(_ROWS * _CHUNK, np.float32)
    packed = np.empty(positions * dim if pack else 0, np.float32)
    for lane in range(first, last):
        n, h = lane // heads, lane % heads
        maps, base, stride = value, (n * positions * heads + h) * dim, heads * dim
        if pack:
            _copy_lane(value, base, stride, packed, 0, dim, positions, dim)
            maps, base, stride = packed, 0, dim
        for q in range(first_query, last_query):
            row = (n * queries + q) * heads + h
            for d in range(dim):
                out[row * dim + d] = _ZERO
            for slot in range(0, samples, _CHUNK):
                count = min(_CHUNK, samples - slot)
                _place(locations, weights, row * samples + slot, count, slots, slot, samples, scratch)
                _gather(maps, base, stride, weights, row * samples + slot, count, scratch, out, row * dim, dim)


@_inline
def _gather(maps, base, stride, weights, first, count, scratch, out, out_at, dim):
    """out[out_at : out_at + dim] += the placed samples, weighted."""
    first, out_at, whole = np.uint64(first), np.uint64(out_at), dim // 16 * 16
    for start in range(0, whole, 16):
        at, into = base + start, out_at + np.uint64(start)
        total, lower = load16(out, into), zero16()  # two sums, for the CPU to work on side by side
        for i in range(count):
            k = np.uint64(i)
            if scratch[_INSIDE + k] == _ZERO or weights[first + k] == _ZERO:
                continue
            total = fma16(scratch[_C00 + k], load16(maps, _address(at, scratch[_AT00 + k], stride)), total)
            lower = fma16(scratch[_C10 + k], load16(maps, _address(at, scratch[_AT10 + k], stride)), lower)
            total = fma16(scratch[_C01 + k], load16(maps, _address(at, scratch[_AT01 + k], stride)), total)
            lower = fma16(scratch[_C11 + k], load16(maps, _address(at, scratch[_AT11 + k], stride)), lower)
        store16(out, into, fma16(_ONE, total, lower))
    for d in range(whole, dim):
        at, into = base + d, out_at + np.uint64(d)
        for i in range(count):
            k = np.uint64(i)
            if scratch[_INSIDE + k] == _ZERO or weights[first + k] == _ZERO:
                continue
            out[into] += (
                scratch[_C00 + k] * maps[_address(at, scratch[_AT00 + k], stride)]
                + scratch[_C01 + k] * maps[_address(at, scratch[_AT01 + k], stride)]
                + scratch[_C10 + k] * maps[_address(at, scratch[_AT10 + k], stride)]
                + scratch[_C11 + k] * maps[_address(at, scratch[_AT11 + k], stride)]
            )


@_compile
def sample_lanes_backward(
    value,
    locations,
    weights,
    slots,
    grad_out,
    grad_value,
    grad_locations,
    grad_weights,
    sizes,
    pack,
    first,
    last,
    want_value,
):
    """Gradients for lanes [first, last). All three must start at zero; grad_value may be empty without want_value."""
    positions, queries, heads, dim, samples = sizes
    scratch = np.empty(_ROWS * _CHUNK, np.float32)
    room = positions * dim if pack else 0
    packed, packed_grad = np.empty(room, np.float32), np.empty(room if want_value else 0, np.float32)
    for lane in range(first, last):
        n, h = lane // heads, lane % heads
        maps, grad_maps, base, stride = value, grad_value, (n * positions * heads + h) * dim, heads * dim
        if pack:
            _copy_lane(value, base, stride, packed, 0, dim, positions, dim)
            packed_grad[:] = _ZERO
            maps, grad_maps, base, stride = packed, packed_grad, 0, dim
        for q in range(queries):
            row = (n * queries + q) * heads + h
            for slot in range(0, samples, _CHUNK):
                begin, count = row * samples + slot, min(_CHUNK, samples - slot)
                _place(locations, weights, begin, count, slots, slot, samples, scratch)
                _scatter(maps, grad_maps, base, stride, count, scratch, grad_out, row * dim, dim, want_value)
                _fold(weights, begin, count, slots, slot, samples, scratch, grad_locations, grad_weights)
        if pack and want_value:
            _copy_lane(packed_grad, 0, dim, grad_value, (n * positions * heads + h) * dim, heads * dim, positions, dim)


@_inline
def _scatter(maps, grad_maps, base, stride, count, scratch, grad_out, grad_at, dim, want_value):
    """Dot products of the corners with grad_out into rows _DOT00 … _DOT11, and grad_out spread over grad_maps."""
    grad_at, whole = np.uint64(grad_at), dim // 16 * 16
    for i in range(count):
        k = np.uint64(i)
        dot00 = dot01 = dot10 = dot11 = _ZERO
        if scratch[_INSIDE + k] != _ZERO:
            at00, at01 = _address(base, scratch[_AT00 + k], stride), _address(base, scratch[_AT01 + k], stride)
            at10, at11 = _address(base, scratch[_AT10 + k], stride), _address(base, scratch[_AT11 + k], stride)
            c00, c01, c10, c11 = scratch[_C00 + k], scratch[_C01 + k], scratch[_C10 + k], scratch[_C11 + k]
            for start in range(0, whole, 16):
                d = np.uint64(start)
                grad = load16(grad_out, grad_at + d)
                dot00 += dot16(grad, load16(maps, at00 + d))
                dot01 += dot16(grad, load16(maps, at01 + d))
                dot10 += dot16(grad, load16(maps, at10 + d))
                dot11 += dot16(grad, load16(maps, at11 + d))
                if want_value:  # one corner after the other: clamped corners may be the same position
                    store16(grad_maps, at00 + d, fma16(c00, grad, load16(grad_maps, at00 + d)))
                    store16(grad_maps, at01 + d, fma16(c01, grad, load16(grad_maps, at01 + d)))
                    store16(grad_maps, at10 + d, fma16(c10, grad, load16(grad_maps, at10 + d)))
                    store16(grad_maps, at11 + d, fma16(c11, grad, load16(grad_maps, at11 + d)))
            for rest in range(whole, dim):
                d = np.uint64(rest)
                single = grad_out[grad_at + d]
                dot00 += single * maps[at00 + d]
                dot01 += single * maps[at01 + d]
                dot10 += single * maps[at10 + d]
                dot11 += single * maps[at11 + d]
                if want_value:
                    grad_maps[at00 + d] += c00 * single
                    grad_maps[at01 + d] += c01 * single
                    grad_maps[at10 + d] += c10 * single
                    grad_maps[at11 + d] += c11 * single
        scratch[_DOT00 + k], scratch[_DOT01 + k], scratch[_DOT10 + k], scratch[_DOT11 + k] = dot00, dot01, dot10, dot11


@_inline
def _fold(weights, first, count, slots, slot, samples, scratch, grad_locations, grad_weights):
    """Dot products and fractions of the placed samples → their gradients of weight and location."""
    first, slot, samples = np.uint64(first), np.uint64(slot), np.uint64(samples)
    for i in range(count):
        k = np.uint64(i)
        at, of_slot = first + k, slot + k
        fx, fy, weight = scratch[_FX + k], scratch[_FY + k], weights[at]
        dot00 = scratch[_DOT00 + k] * scratch[_LEFT + k] * scratch[_TOP + k]
        dot01 = scratch[_DOT01 + k] * scratch[_RIGHT + k] * scratch[_TOP + k]
        dot10 = scratch[_DOT10 + k] * scratch[_LEFT + k] * scratch[_BOTTOM + k]
        dot11 = scratch[_DOT11 + k] * scratch[_RIGHT + k] * scratch[_BOTTOM + k]
        upper, lower = dot00 * (_ONE - fx) + dot01 * fx, dot10 * (_ONE - fx) + dot11 * fx
        slope = (dot01 - dot00) * (_ONE - fy) + (dot11 - dot10) * fy
        grad_weights[at] = upper * (_ONE - fy) + lower * fy
        grad_locations[at + at] = slope * weight * slots[of_slot]
        grad_locations[at + at + np.uint64(1)] = (lower - upper) * weight * slots[samples + of_slot]
