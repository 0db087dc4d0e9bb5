"""Deformable sampling on the CPU, compiled by numba: the autograd function around `numba_loops.py`.

Place in the flow: `op.deform_sample` imports this file on the first call that the numba backend serves (importing it
imports numba, about a second, and compiles or loads the compiled loops). Shapes were checked there.

Tensors are handed over as numpy views without a copy when they are contiguous float32. 16-bit tensors are widened
here and the result narrowed, so sums and coordinates are always float32.

Threads: as many as `torch.get_num_threads()`, from a pool of our own running GIL-free code. numba's own threading
layers are not used: one of them breaks under concurrent calls, another ends the process after a fork, and their
workers fight torch's over the cores. The result does not depend on the number of threads.

Source: MM-Interleaved, Eq. 4; Deformable DETR (Zhu et al. 2021), Eq. 3.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmi_kernels import numba_loops

# Below this many multiply-adds a call stays in its thread: waking a worker costs about as much.
_MIN_WORK_PER_THREAD = 200_000

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def deform_sample_numba(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """`op.deform_sample` for CPU tensors in float32 or 16-bit types; same arguments, same result.

    Returns: [N, Q, H·D] in value's dtype.
    """
    dtype = value.dtype
    out: Tensor = _DeformSample.apply(value.float(), spatial_shapes, locations.float(), weights.float())
    return out.to(dtype)


class _DeformSample(torch.autograd.Function):
    """Once differentiable in value, locations and weights (float32, any strides)."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor
    ) -> Tensor:
        value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
        ctx.save_for_backward(value, locations, weights)
        ctx.spatial_shapes = spatial_shapes
        rows, _, heads, dim = value.shape
        queries = locations.shape[1]
        out = value.new_empty(rows, queries, heads, dim)
        flat = (_flat(value), _flat(locations), _flat(weights), _slots(spatial_shapes, weights.shape[4]), _flat(out))
        sizes = _sizes(value, weights)

        lanes, work = rows * heads, weights.numel() * dim * 4
        pack = _worth_packing(sizes)
        if lanes >= torch.get_num_threads() or pack:
            _in_parallel(lambda a, b: numba_loops.sample_lanes(*flat, sizes, pack, a, b, 0, queries), lanes, work)
        else:  # few lanes, so cut along the queries instead
            _in_parallel(lambda a, b: numba_loops.sample_lanes(*flat, sizes, pack, 0, lanes, a, b), queries, work)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        value, locations, weights = ctx.saved_tensors
        rows, _, heads, dim = value.shape
        want_value = ctx.needs_input_grad[0]
        grad_value = torch.zeros_like(value) if want_value else value.new_empty(0)
        grad_locations, grad_weights = torch.zeros_like(locations), torch.zeros_like(weights)
        slots = _slots(ctx.spatial_shapes, weights.shape[4])
        inputs = (_flat(value), _flat(locations), _flat(weights), slots, _flat(grad_out.contiguous()))
        outputs = (_flat(grad_value), _flat(grad_locations), _flat(grad_weights))
        sizes = _sizes(value, weights)
        pack = _worth_packing(sizes)
        _in_parallel(
            lambda a, b: numba_loops.sample_lanes_backward(*inputs, *outputs, sizes, pack, a, b, want_value),
            rows * heads,
            weights.numel() * dim * 12,
        )
        return grad_value if want_value else None, None, grad_locations, grad_weights


def _flat(tensor: Tensor) -> np.ndarray:
    """A one-dimensional numpy view of a contiguous CPU tensor; no copy."""
    return tensor.detach().view(-1).numpy()


def _sizes(value: Tensor, weights: Tensor) -> tuple[int, int, int, int, int]:
    """(S, Q, H, D, L·P)."""
    return value.shape[1], weights.shape[1], value.shape[2], value.shape[3], weights.shape[3] * weights.shape[4]


def _worth_packing(sizes: tuple[int, int, int, int, int]) -> bool:
    """Whether a lane's queries read its maps often enough to pay for one copy of them."""
    positions, queries, _, _, samples = sizes
    return queries * samples >= positions


@lru_cache(maxsize=256)
def _slots(spatial_shapes: tuple[tuple[int, int], ...], points: int) -> np.ndarray:
    """[3 · L·P] float32: width, height and first position of the level of each sample of a query."""
    shapes = np.asarray(spatial_shapes, dtype=np.int64)
    areas = shapes[:, 0] * shapes[:, 1]
    table = np.stack([shapes[:, 1], shapes[:, 0], np.cumsum(areas) - areas])  # [3, L]
    return np.repeat(table, points, axis=1).astype(np.float32).reshape(-1)


def _in_parallel(call: Callable[[int, int], None], size: int, work: int) -> None:
    """call(a, b) over disjoint ranges that cover [0, size), one range in this thread and one per worker."""
    threads = max(1, min(torch.get_num_threads(), size, work // _MIN_WORK_PER_THREAD))
    bounds = [size * i // threads for i in range(threads + 1)]
    if threads == 1:
        call(0, size)
        return
    pool = _workers(threads - 1)
    pending = [pool.submit(call, bounds[i], bounds[i + 1]) for i in range(1, threads)]
    call(bounds[0], bounds[1])
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
