"""The compiled inner loops of the numba backend, forward and backward. Importing this file imports numba.

Place in the flow: `numba_cpu.py` cuts the work into ranges of "lanes" and calls these functions, one range per thread.
A lane is one (row n, head h) pair, lane = n·H + h. Tensors are C-contiguous float32 and named by their address:

    value [N, S, H, D]   locations [N, Q, H, L, P, 2]   weights [N, Q, H, L, P]   out, grad_out [N, Q, H, D]
    slots [3, heads of a group · L·P]: width, height and first position of the level of each sample

Heads are taken in groups that have up to 64 samples together, neighbours in memory. Per query and group: (1) `place`
turns the locations into corner positions and fractions, branch-free so that the compiler vectorises it, all in float32
(positions stay exact below 2²⁴); (2) per head, the corners are summed in blocks of 64, 32, 16 and 1 channels; backward
also takes the dot products of the corners with the output gradient and (3) folds them into the gradients of weight and
location. With enough queries the group's maps are first copied together, since a stride of H·D floats between
neighbouring positions would waste most of the cache; with few, one query takes all its heads before the next one
starts, so that it touches few pages, and corners are fetched a group ahead (a fetch may name any address). Forward, a
single head's maps are copied in bands of levels that fit a core's cache, and all queries pass a band before the next.

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
from numba import carray, njit

from mmi_kernels import numba_samples, numba_simd
from mmi_kernels.numba_samples import (
    CHUNK,
    DOTS_AT,
    OPTIONS,
    ROW,
    ROWS,
    copy,
    fold,
    gather_channels,
    part,
    place,
    pointer,
    scatter_channels,
)


def named_after(function: Any, *sources: str) -> None:
    """Lets the name that numba files the code of `function` under tell of the files `sources`, too.

    numba itself notices only when the function's own file changes. Raises OSError where a file cannot be read.
    """
    content = b"".join(Path(source).read_bytes() for source in sources)
    function.__qualname__ += f"_{hashlib.sha256(content).hexdigest()[:16]}"


def compiled(function: Any) -> Any:
    """njit without the GIL, cached on disk: beside its file, else in the user's cache, else not at all."""
    try:
        named_after(function, __file__, numba_samples.__file__, numba_simd.__file__)
        return njit(cache=True, **OPTIONS)(function)
    except (OSError, RuntimeError):  # no source, or no writable place (read-only install without a home)
        return njit(**OPTIONS)(function)


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
    """`place` for one step."""
    _, queries, heads, _, samples = sizes
    locations, weights, slots = tensors[0], tensors[1], tensors[2]
    at = ((n * queries + q) * heads + h) * samples + slot
    count = min(group, stop - h) * min(CHUNK, samples - slot)
    place(locations + 8 * at, weights + 4 * at, count, slots + 4 * slot, group * samples, zeros, scratch)


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
            place(tensors[0] + 8 * at, tensors[1] + 4 * at, count, slots + 4 * next_slot, columns, False, into)
        ahead_h = next_h
        for j in range(together):
            k, many = j * min(CHUNK, samples - slot), min(CHUNK, samples - slot)
            out = tensors[2] + 4 * ((n * queries + q) * heads + h) * dim
            if fresh and slot == 0:
                copy(0, 0, out, 0, 1, dim)
            here, soon = maps + 4 * (h - start) * dim, 0
            if fetch and next_together > 0:
                soon = maps + 4 * (ahead_h - start) * dim
            gather_channels(here, stride, k, k + many, scratch, out, dim, soon, later)
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
def band_maps(maps, stride, pack, packed, wide, first, positions):
    """(where position 0 of the row is, bytes from one position to the next) of a band's maps, `wide` bytes a position,
    which are copied together to `packed` first if `pack`."""
    if pack:
        copy(maps + first * stride, stride, packed, wide, positions, wide // 4)
        return packed - first * wide, wide
    return maps, stride


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
                at, wide = value + 4 * (n * positions * heads + start) * dim, 4 * (stop - start) * dim
                maps, stride = band_maps(at, 4 * heads * dim, pack, packed_at, wide, place, places)
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
        copy(0, 0, scratch + DOTS_AT, 0, 1, 4 * together * each)
        for j in range(together):
            away, pull = 4 * (h - start + j) * dim, grad_out + 4 * (lane + j) * dim
            onto = grad_maps + away if grad_maps != 0 else 0
            scatter_channels(maps + away, onto, stride, j * each, (j + 1) * each, scratch, pull, dim)
        at = lane * samples + slot
        count, into = together * each, (grad_locations + 8 * at, grad_weights + 4 * at)
        fold(weights + 4 * at, count, slots + 4 * slot, group * samples, scratch, into)
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
