"""The compiled inner loops of the numba backend, forward and backward. Importing this file imports numba.

Place in the flow: `numba_cpu.py` cuts the work into ranges of "lanes" and calls these functions, one range per thread.
A lane is one (row n, head h) pair, lane = n·H + h. All arrays are C-contiguous float32:

    value [N, S, H, D]   levels [L, 3] int64 (height, width, first position)
    locations [N, Q, H, L, P, 2]   weights [N, Q, H, L, P]   out, grad_out [N, Q, H, D]

Why lanes: the value gradient of a lane is written by that lane alone, so threads need no atomics, the order of every
sum is fixed, and a result depends neither on the number of threads nor on other rows: equal inputs, equal bits.

Corners outside the map keep weight 0 and a clamped address: memory outside is never read. Samples wholly outside are
skipped. Reassociation is allowed to the compiler (dot products over D vectorise), infinities and NaN are kept.

Source: bilinear sampling and its derivatives as in `grid_sample(align_corners=False, padding_mode="zeros")`.
"""

from __future__ import annotations

from math import floor
from typing import Any

import numpy as np
from numba import njit

_FAST = {"reassoc", "contract", "nsz"}


def _compile(function: Any) -> Any:
    """njit without the GIL, cached on disk: beside this file, else in the user's cache, else not at all."""
    options = {"nogil": True, "fastmath": _FAST, "boundscheck": False, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no writable place for a cache (read-only install, no home)
        return njit(**options)(function)


@_compile
def sample_lanes(value, levels, locations, weights, out, first, last, query_first, query_last):  # type: ignore[no-untyped-def]
    """out for lanes [first, last) and queries [query_first, query_last); out needs no initial value."""
    heads, dim = value.shape[2], value.shape[3]
    level_count, points = weights.shape[3], weights.shape[4]
    for lane in range(first, last):
        n, h = lane // heads, lane % heads
        for q in range(query_first, query_last):
            for d in range(dim):
                out[n, q, h, d] = np.float32(0.0)
            for level in range(level_count):
                height, width, start = levels[level, 0], levels[level, 1], levels[level, 2]
                for p in range(points):
                    w = weights[n, q, h, level, p]
                    if w == 0:
                        continue
                    x = locations[n, q, h, level, p, 0] * np.float32(width) - np.float32(0.5)
                    y = locations[n, q, h, level, p, 1] * np.float32(height) - np.float32(0.5)
                    if x <= -1 or y <= -1 or x >= width or y >= height:
                        continue
                    if not (x == x and y == y):  # a NaN location is an error upstream: show it
                        for d in range(dim):
                            out[n, q, h, d] = np.float32(np.nan)
                        continue
                    x_floor, y_floor = floor(x), floor(y)
                    x0, y0 = int(x_floor), int(y_floor)
                    fx, fy = x - np.float32(x_floor), y - np.float32(y_floor)
                    left = np.float32(0.0) if x0 < 0 else np.float32(1.0) - fx
                    right = np.float32(0.0) if x0 + 1 >= width else fx
                    top = np.float32(0.0) if y0 < 0 else (np.float32(1.0) - fy) * w
                    bottom = np.float32(0.0) if y0 + 1 >= height else fy * w
                    c00, c01, c10, c11 = top * left, top * right, bottom * left, bottom * right
                    row0, row1 = start + max(y0, 0) * width, start + min(y0 + 1, height - 1) * width
                    col0, col1 = max(x0, 0), min(x0 + 1, width - 1)
                    s00, s01, s10, s11 = row0 + col0, row0 + col1, row1 + col0, row1 + col1
                    for d in range(dim):
                        out[n, q, h, d] += (
                            c00 * value[n, s00, h, d]
                            + c01 * value[n, s01, h, d]
                            + c10 * value[n, s10, h, d]
                            + c11 * value[n, s11, h, d]
                        )


@_compile
def sample_lanes_backward(  # type: ignore[no-untyped-def]
    value, levels, locations, weights, grad_out, grad_value, grad_locations, grad_weights, first, last, want_value
):
    """Gradients for lanes [first, last). grad_value (added to) and the other two (assigned) must start at zero."""
    heads, dim = value.shape[2], value.shape[3]
    queries, level_count, points = weights.shape[1], weights.shape[3], weights.shape[4]
    zero, one = np.float32(0.0), np.float32(1.0)
    for lane in range(first, last):
        n, h = lane // heads, lane % heads
        for q in range(queries):
            for level in range(level_count):
                height, width, start = levels[level, 0], levels[level, 1], levels[level, 2]
                for p in range(points):
                    x = locations[n, q, h, level, p, 0] * np.float32(width) - np.float32(0.5)
                    y = locations[n, q, h, level, p, 1] * np.float32(height) - np.float32(0.5)
                    if x <= -1 or y <= -1 or x >= width or y >= height:
                        continue
                    if not (x == x and y == y):
                        grad_weights[n, q, h, level, p] = np.float32(np.nan)
                        continue
                    w = weights[n, q, h, level, p]
                    x_floor, y_floor = floor(x), floor(y)
                    x0, y0 = int(x_floor), int(y_floor)
                    fx, fy = x - np.float32(x_floor), y - np.float32(y_floor)
                    # 1 where the corner column / row exists, else 0
                    has_l, has_r = (zero if x0 < 0 else one), (zero if x0 + 1 >= width else one)
                    has_t, has_b = (zero if y0 < 0 else one), (zero if y0 + 1 >= height else one)
                    row0, row1 = start + max(y0, 0) * width, start + min(y0 + 1, height - 1) * width
                    col0, col1 = max(x0, 0), min(x0 + 1, width - 1)
                    s00, s01, s10, s11 = row0 + col0, row0 + col1, row1 + col0, row1 + col1
                    g00 = g01 = g10 = g11 = zero
                    for d in range(dim):
                        g = grad_out[n, q, h, d]
                        g00 += g * value[n, s00, h, d]
                        g01 += g * value[n, s01, h, d]
                        g10 += g * value[n, s10, h, d]
                        g11 += g * value[n, s11, h, d]
                    g00, g01 = g00 * has_l * has_t, g01 * has_r * has_t
                    g10, g11 = g10 * has_l * has_b, g11 * has_r * has_b
                    upper, lower = g00 * (one - fx) + g01 * fx, g10 * (one - fx) + g11 * fx
                    grad_weights[n, q, h, level, p] = upper * (one - fy) + lower * fy
                    slope_x = (g01 - g00) * (one - fy) + (g11 - g10) * fy
                    grad_locations[n, q, h, level, p, 0] = slope_x * w * np.float32(width)
                    grad_locations[n, q, h, level, p, 1] = (lower - upper) * w * np.float32(height)
                    if want_value and w != 0:
                        left, right = (one - fx) * has_l * w, fx * has_r * w
                        top, bottom = (one - fy) * has_t, fy * has_b
                        c00, c01, c10, c11 = top * left, top * right, bottom * left, bottom * right
                        # one corner after the other: clamped corners may be the same position
                        for d in range(dim):
                            grad_value[n, s00, h, d] += c00 * grad_out[n, q, h, d]
                        for d in range(dim):
                            grad_value[n, s01, h, d] += c01 * grad_out[n, q, h, d]
                        for d in range(dim):
                            grad_value[n, s10, h, d] += c10 * grad_out[n, q, h, d]
                        for d in range(dim):
                            grad_value[n, s11, h, d] += c11 * grad_out[n, q, h, d]
