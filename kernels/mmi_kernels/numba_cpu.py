"""Deformable sampling on the CPU, compiled by numba: the autograd function around `numba_loops.py`.

Place in the flow: `op.deform_sample` imports this file on the first call that the numba backend serves (importing it
imports numba, about a second, and compiles or loads the compiled loops). Shapes were checked there.

Contiguous float32 tensors are handed over by their address, without a copy. 16-bit tensors are widened here and the
result narrowed, so sums and coordinates are always float32. What shapes decide is worked out once per form and looked
up after that: sampling for one generated token takes about as long as ten calls of a Python function.

Threads: as many as `torch.get_num_threads()`, and torch's own (`numba_team.py`); where those cannot be had, a pool
running GIL-free code. numba's threading layers are not used: one of them breaks under concurrent calls, another ends
the process after a fork, and their workers fight torch's over the cores. The result does not depend on the number of
threads.

Source: MM-Interleaved, Eq. 4; Deformable DETR (Zhu et al. 2021), Eq. 3.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from mmi_kernels import numba_loops, numba_team
from mmi_kernels.errors import KernelUnavailable

# Below this many multiply-adds a call stays in its thread: waking a worker costs about as much.
MIN_WORK_PER_THREAD = 1_000_000

BAND = 3 << 19
"""Bytes of one head's maps that are copied together at a time: about a core's second-level cache."""

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def deform_sample_numba(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """`op.deform_sample` for CPU tensors in float32 or 16-bit types; same arguments, same result.

    Returns: [N, Q, H·D] in value's dtype.

    Raises:
        KernelUnavailable: the tensors have no memory (fake tensors), or forward-mode derivatives go through backward.
        RuntimeError: of torch, where forward-mode derivatives are asked for.
    """
    dtype = value.dtype
    value, locations, weights = plain(value), plain(locations), plain(weights)
    wanted = torch.is_grad_enabled() and (value.requires_grad or locations.requires_grad or weights.requires_grad)
    if wanted or forward_ad._current_level >= 0:  # autograd refuses tangents, an address would lose them
        out: Tensor = _DeformSample.apply(value, spatial_shapes, locations, weights)
    else:
        out = _forward(value, spatial_shapes, locations, weights)
    return out if dtype == torch.float32 else out.to(dtype)


deform_sample_untraced = torch.compiler.disable(deform_sample_numba)
"""`deform_sample_numba` for a function that is being traced: a graph has no addresses, so it breaks here."""


def plain(tensor: Tensor) -> Tensor:
    """The tensor in contiguous float32 with its signs in memory."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.float().contiguous().resolve_neg()


def no_memory() -> KernelUnavailable:
    return KernelUnavailable("backend 'numba' serves tensors that have memory, not fake ones", remedy="use 'torch'")


class _DeformSample(torch.autograd.Function):
    """Once differentiable in value, locations and weights (float32, contiguous)."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.spatial_shapes = spatial_shapes
        return _forward(value, spatial_shapes, locations, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        if forward_ad.unpack_dual(grad_out).tangent is not None:
            raise KernelUnavailable("backend 'numba' has no forward-mode derivatives (jvp)", remedy="use 'torch'")
        value, locations, weights = ctx.saved_tensors
        plan = plan_of(ctx.spatial_shapes, value.shape, weights.shape)
        grad_value = None
        if ctx.needs_input_grad[0]:  # packed maps are written whole
            grad_value = torch.empty_like(value) if plan.pack else torch.zeros_like(value)
        grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
        grad_out = plain(grad_out)
        maps = value.data_ptr(), 0 if grad_value is None else grad_value.data_ptr()
        outer = grad_out.data_ptr(), grad_locations.data_ptr(), grad_weights.data_ptr()
        tensors = (locations.data_ptr(), weights.data_ptr(), plan.slots_at, *outer)
        if 0 in tensors and grad_out.numel():
            raise no_memory()
        call = (*maps, tensors, plan.sizes, plan.group, plan.pack)
        threads = threads_for(plan.lanes, 3 * plan.work)
        if threads > 1 and numba_team.available():
            numba_team.backward(call, plan.lanes, threads)
            return grad_value, None, grad_locations, grad_weights
        owners = (value, grad_value, locations, weights, plan, grad_out, grad_locations, grad_weights)
        in_pool(lambda a, b: numba_loops.sample_lanes_backward(*call, a, b), plan.lanes, threads, owners)
        return grad_value, None, grad_locations, grad_weights


def _forward(value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor) -> Tensor:
    """[N, Q, H·D] from contiguous float32 tensors."""
    plan = plan_of(spatial_shapes, value.shape, weights.shape)
    queries = weights.shape[1]
    out = value.new_empty(weights.shape[0], queries, plan.sizes[2] * plan.sizes[3])
    tensors = (locations.data_ptr(), weights.data_ptr(), out.data_ptr())
    call = (value.data_ptr(), tensors, plan.sizes, plan.group, plan.pack, plan.bands)
    if 0 in tensors and out.numel():
        raise no_memory()
    if plan.work < 2 * MIN_WORK_PER_THREAD:
        numba_loops.sample_lanes(*call, 0, plan.lanes, 0, queries)
        return out
    by_query = not plan.pack and plan.lanes < torch.get_num_threads()  # few lanes, so cut along the queries instead
    size = queries if by_query else plan.lanes
    threads = threads_for(size, plan.work)
    if threads > 1 and numba_team.available():
        numba_team.forward(call, plan.lanes, queries, by_query, threads)
        return out
    owners = (value, locations, weights, plan, out)
    if by_query:
        in_pool(lambda a, b: numba_loops.sample_lanes(*call, 0, plan.lanes, a, b), size, threads, owners)
    else:
        in_pool(lambda a, b: numba_loops.sample_lanes(*call, a, b, 0, queries), size, threads, owners)
    return out


class Plan(NamedTuple):
    """What the shapes of a call decide.

    Attributes:
        sizes: (S, Q, H, D, L·P).
        lanes: N·H.
        group: heads whose samples are placed at once, `numba_loops.CHUNK` of them at most.
        pack: whether a lane's queries read its maps often enough to pay for one copy of them.
        slots: [3 · group · L·P] float32: width, height and first position of the level of each sample of a group.
        slots_at: its address.
        bands: forward, the levels are taken in bands whose maps of one head fit a core's cache: (address, how many,
            positions of the largest, samples of the largest) of an int64 array [·, 6]: first sample, samples, first
            position, positions, address and columns of the band's own slots. One band unless single heads are packed.
        work: multiply-adds of the forward pass.
        owners: the arrays behind `bands`.
    """

    sizes: tuple[int, int, int, int, int]
    lanes: int
    group: int
    pack: bool
    slots: np.ndarray
    slots_at: int
    bands: tuple[int, int, int, int]
    work: int
    owners: tuple[Any, ...]


@lru_cache(maxsize=256)
def plan_of(
    spatial_shapes: tuple[tuple[int, int], ...], value: torch.Size, weights: torch.Size, lingers: int = 0
) -> Plan:
    """For maps and the shapes of value [N, S, H, D] and weights [N, Q, H, L, P].

    lingers: bytes of a row of values that stay in a core's cache as they are, so that no copy of them is made.
    """
    rows, positions, heads, dim = value
    queries, points = weights[1], weights[4]
    samples = len(spatial_shapes) * points
    pack = queries * samples >= positions and 4 * positions * heads * dim > lingers
    # the copy of a group is best when its positions are no wider than eight cache lines
    group = max(1, min(heads, numba_loops.CHUNK // samples, 128 // dim if pack else heads))
    shapes = np.asarray(spatial_shapes, dtype=np.int64)
    areas = shapes[:, 0] * shapes[:, 1]
    table = np.stack([shapes[:, 1], shapes[:, 0], np.cumsum(areas) - areas])  # [3, L]
    slots = np.tile(np.repeat(table, points, axis=1), group).astype(np.float32).reshape(-1)
    work = rows * queries * heads * samples * dim * 4
    bands, owners = _bands(table, areas, points, _cuts(areas, dim) if pack and group == 1 else [0, len(areas)])
    sizes = positions, queries, heads, dim, samples
    return Plan(sizes, rows * heads, group, pack, slots, slots.ctypes.data, bands, work, owners)


def _bands(
    table: np.ndarray, areas: np.ndarray, points: int, cuts: list[int]
) -> tuple[tuple[int, int, int, int], tuple[Any, ...]]:
    """`Plan.bands` and `Plan.owners` for levels cut where `cuts` says; table: width, height, start of each."""
    bands, owners = np.zeros((len(cuts) - 1, 6), np.int64), []
    for band, first, last in zip(bands, cuts, cuts[1:], strict=False):
        some = (last - first) * points
        slots = np.tile(np.repeat(table[:, first:last], points, axis=1), max(1, numba_loops.CHUNK // some))
        owners.append(slots.astype(np.float32).reshape(-1))
        band[:] = first * points, some, table[2, first], areas[first:last].sum(), owners[-1].ctypes.data, slots.shape[1]
    return (bands.ctypes.data, len(bands), int(bands[:, 3].max()), int(bands[:, 1].max())), (bands, *owners)


def _cuts(areas: np.ndarray, dim: int) -> list[int]:
    """Where the levels are cut into bands whose maps of one head fit a core's cache."""
    cuts, held = [0], 0
    for level, area in enumerate(areas.tolist()):
        if held and held + area > BAND // (4 * dim):
            cuts.append(level)
            held = 0
        held += area
    return [*cuts, len(areas)]


def threads_for(size: int, work: int) -> int:
    """How many threads so much work is worth that can be cut into `size` parts."""
    return max(1, min(torch.get_num_threads(), size, work // MIN_WORK_PER_THREAD))


def in_pool(call: Callable[[int, int], None], size: int, threads: int, owners: tuple[Any, ...]) -> None:
    """call(a, b) over disjoint ranges that cover [0, size), one range in this thread and one per worker.

    owners: whose memory `call` names by address. Every worker holds them until it is done, and this thread waits for
    the workers whatever happens: an error or an interrupt must not free what is still being written.
    """
    bounds = [size * i // threads for i in range(threads + 1)]
    if threads == 1:
        call(0, size)
        return

    def part(a: int, b: int, _owners: tuple[Any, ...] = owners) -> None:
        call(a, b)

    pool, pending = _workers(threads - 1), list[Future[None]]()
    try:
        for i in range(1, threads):
            pending.append(pool.submit(part, bounds[i], bounds[i + 1]))
        call(bounds[0], bounds[1])
    finally:
        wait(pending)
    for future in pending:
        future.result()


def _workers(count: int) -> ThreadPoolExecutor:
    """The pool, grown when more workers are wanted. A pool that is replaced still finishes what it was given."""
    global _pool, _pool_size
    if _pool is None or _pool_size < count:
        _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="mmi_kernels"), count
    return _pool


def _forget_workers() -> None:
    # Threads do not survive a fork: a child (data loader worker) starts its own pool when it needs one.
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
