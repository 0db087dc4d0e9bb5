"""Other people's deformable-attention kernels, as samplers for the benchmark; found in a folder, none is shipped.

Place in the flow: `gpu_bench.py` asks `find` for what the folder `.peers/` holds:

    detr/libdetr.so   the CUDA kernels of Deformable-DETR behind two C entries (float32; 16-bit calls are cast to
                      float32 and back, as MM-Interleaved's released code does)
    msda_triton/      the package of that name
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmi_kernels.bench_cuda import Sampler


def find(folder: Path) -> dict[str, Sampler]:
    """Name → sampler of every peer that is there."""
    found: dict[str, Sampler] = {}
    if (folder / "detr/libdetr.so").exists():
        library = ctypes.CDLL(str((folder / "detr/libdetr.so").resolve()))

        def detr(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
            table, starts = _level_tensors(tuple(shapes), value.device)
            single = (value.float(), locations.float(), weights.float())
            return _Detr.apply(library, *single, table, starts).to(value.dtype)

        found["deformable-detr"] = detr
    if (folder / "msda_triton").is_dir():
        sys.path.insert(0, str(folder))
        try:
            from msda_triton.frontend import triton_multiscale_deformable_attention as triton_op
        except ImportError:  # no triton
            return found

        def msda(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
            table, _ = _level_tensors(tuple(shapes), value.device)
            return triton_op(value, table, locations, weights, "zeros", False).flatten(2)

        found["msda-triton"] = msda
    return found


@cache
def _level_tensors(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    table = torch.tensor(shapes, dtype=torch.int64)
    areas = table.prod(1)
    return table.to(device), (areas.cumsum(0) - areas).to(device)


class _Detr(torch.autograd.Function):
    """Deformable-DETR's op with im2col_step = batch."""

    @staticmethod
    def forward(
        ctx: Any, library: Any, value: Tensor, locations: Tensor, weights: Tensor, table: Tensor, starts: Tensor
    ) -> Tensor:
        value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
        ctx.save_for_backward(value, locations, weights, table, starts)
        ctx.library = library
        out = value.new_zeros(value.shape[0], weights.shape[1], value.shape[2], value.shape[3])
        inputs = (value, table, starts, locations, weights)
        library.detr_forward(_stream(), *map(_pointer, inputs), *_sizes(value, weights), _pointer(out))
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights, table, starts = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        gradients = [torch.zeros_like(tensor) for tensor in (value, locations, weights)]
        inputs = (grad_out, value, table, starts, locations, weights)
        sizes = _sizes(value, weights)
        ctx.library.detr_backward(_stream(), *map(_pointer, inputs), *sizes, *map(_pointer, gradients))
        return None, *gradients, None, None


def _stream() -> ctypes.c_longlong:
    return ctypes.c_longlong(torch.cuda.current_stream().cuda_stream)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _sizes(value: Tensor, weights: Tensor) -> tuple[ctypes.c_int, ...]:
    """batch, spatial, heads, channels, levels, queries, points."""
    batch, spatial, heads, channels = value.shape
    return tuple(
        map(ctypes.c_int, (batch, spatial, heads, channels, weights.shape[3], weights.shape[1], weights.shape[4]))
    )
