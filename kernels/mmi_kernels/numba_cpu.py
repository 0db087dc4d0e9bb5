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
        arrays = (_array(value), _levels(spatial_shapes), _array(locations), _array(weights), _array(out))

        lanes, work = rows * heads, weights.numel() * dim * 4
        if lanes >= torch.get_num_threads():
            _in_parallel(lambda a, b: numba_loops.sample_lanes(*arrays, a, b, 0, queries), lanes, work)
        else:  # few lanes, so cut along the queries instead
            _in_parallel(lambda a, b: numba_loops.sample_lanes(*arrays, 0, lanes, a, b), queries, work)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        value, locations, weights = ctx.saved_tensors
        rows, _, heads, dim = value.shape
        want_value = ctx.needs_input_grad[0]
        grad_out = grad_out.contiguous().view(rows, weights.shape[1], heads, dim)
        grad_value = torch.zeros_like(value) if want_value else value.new_zeros(1, 1, 1, 1)
        grad_locations, grad_weights = torch.zeros_like(locations), torch.zeros_like(weights)
        inputs = (_array(value), _levels(ctx.spatial_shapes), _array(locations), _array(weights), _array(grad_out))
        outputs = (_array(grad_value), _array(grad_locations), _array(grad_weights))
        _in_parallel(
            lambda a, b: numba_loops.sample_lanes_backward(*inputs, *outputs, a, b, want_value),
            rows * heads,
            weights.numel() * dim * 12,
        )
        return grad_value if want_value else None, None, grad_locations, grad_weights


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


@lru_cache(maxsize=256)
def _levels(spatial_shapes: tuple[tuple[int, int], ...]) -> np.ndarray:
    """[L, 3] int64: height, width and first position of each level."""
    shapes = np.asarray(spatial_shapes, dtype=np.int64)
    ends = np.cumsum(shapes[:, 0] * shapes[:, 1])
    return np.column_stack([shapes, np.concatenate([[0], ends[:-1]])])


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
