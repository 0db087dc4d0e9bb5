"""mmi_kernels: the sampling operation under MMFS, in pure torch and in faster forms.

    fused.py       mmfs_attention and deform_attention: projected queries in, sampled values out
    op.py          deform_sample: checks, picks a backend, calls it; backends(), resolve() and serving() tell which
    reference.py   pure torch, differentiable: the truth and the fallback
    numba_cpu.py   compiled CPU form of deform_sample, forward and backward (imported on first use)
    numba_attention.py  compiled CPU form of both attentions, forward alone
    traced.py      mmfs_attention as one torch operator, for functions that torch.compile traces
    mmfs.cu        CUDA source of both attentions and of deform_sample, forward and backward
    cuda_build.py  compiles and launches it through CuPy
    cuda_op.py     registers it as torch operators with gradients
    bench.py       verifies, then times the backends

This package knows torch, numpy, numba and cupy, and nothing of the engine above it.
"""

from __future__ import annotations

from mmi_kernels.errors import KernelUnavailable
from mmi_kernels.fused import deform_attention, mmfs_attention
from mmi_kernels.op import BACKENDS, BackendState, backends, deform_sample, resolve, serving

__all__ = [
    "BACKENDS",
    "BackendState",
    "KernelUnavailable",
    "backends",
    "deform_attention",
    "deform_sample",
    "mmfs_attention",
    "resolve",
    "serving",
]
