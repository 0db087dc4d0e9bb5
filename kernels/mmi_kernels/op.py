"""`deform_sample`: the door of this package. Checks the shapes, picks a backend, calls it.

Place in the flow: every MMFS module (language model, image decoder, vision adapter) comes here with projected
values and finished locations and weights, and gets sampled features back. Nothing else of the package is needed.

    value [N, S, H, D] + locations [N, Q, H, L, P, 2] + weights [N, Q, H, L, P]  →  [N, Q, H·D]

Backends (asked for by name they serve or fail, nothing falls back silently; "auto" takes the best that serves):

    torch   `reference.py`, any device and dtype, always there
    numba   `numba_cpu.py`, CPU tensors, float32 (and 16-bit, computed in float32), forward and backward
    cuda    `mmfs.cu` through `cuda_op.py`: a CuPy RawKernel for CUDA tensors in float32 and 16-bit types

Source: MM-Interleaved, Eq. 4; Deformable DETR (Zhu et al. 2021), Eq. 3.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmi_kernels import cuda_build
from mmi_kernels.errors import KernelUnavailable
from mmi_kernels.reference import deform_sample_reference

BACKENDS = ("auto", "torch", "numba", "cuda")

_LOG = logging.getLogger(__name__)
_told: set[str] = set()
_NUMBA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NUMBA_POSITIONS = 2**24  # it holds positions in float32, which counts exactly up to here
_NUMBA_MISSING = "numba is not installed"


class BackendState(NamedTuple):
    """Whether a backend can serve calls on this machine, and why (one clause, for people)."""

    available: bool
    reason: str

    def __str__(self) -> str:
        return self.reason if self.available else f"unavailable: {self.reason}"


@torch.compiler.assume_constant_result
def _numba_present() -> bool:
    return _installed("numba")


@cache
def _installed(package: str) -> bool:
    # Looks the package up without importing it: importing numba costs about a second.
    return importlib.util.find_spec(package) is not None


@torch.compiler.assume_constant_result
def _cuda_state(index: int | None) -> tuple[bool, str, str]:
    """(works, what was found, remedy) for a CUDA device; ``None`` is the current one."""
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return cuda_build.state(index)


@torch.compiler.assume_constant_result
def _tell(reason: str) -> None:
    """Log once per reason that "auto" leaves a CUDA device to torch."""
    if reason not in _told:
        _told.add(reason)
        _LOG.warning("deformable sampling on CUDA runs in torch, not in the kernel: %s", reason)


def backends() -> dict[str, BackendState]:
    """What each backend can do here: name → (available, reason). Imports numba never, cupy where there is CUDA only."""
    numba = (
        BackendState(True, "CPU tensors in float32 and 16-bit types")
        if _numba_present()
        else BackendState(False, f"{_NUMBA_MISSING} (pip install 'mmi[fast]')")
    )
    works, found, remedy = _cuda_state(None)
    cuda = BackendState(works, found if works else f"{found}; {remedy}")
    return {"torch": BackendState(True, "every device and dtype"), "numba": numba, "cuda": cuda}


def resolve(backend: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The name of the backend that will serve a call: "torch", "numba" or "cuda".

    Args:
        backend: one of `BACKENDS`. "auto" means numba for CPU tensors and cuda for CUDA tensors that they can serve,
            torch for everything else; that a CUDA device is left to torch is logged once, with the reason.
        device: where the tensors are.
        dtype: the widest dtype among value, locations and weights.

    Raises:
        KernelUnavailable: the named backend cannot serve this device and dtype on this machine.
        ValueError: no such backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    device = device if isinstance(device, torch.device) else torch.device(device)
    if backend == "torch":
        return "torch"
    if backend == "auto":
        name = {"cpu": "numba", "cuda": "cuda"}.get(device.type, "torch")
        refusal = _refusal(name, device, dtype)
        if refusal and name == "cuda" and dtype in cuda_build.KINDS:
            _tell(refusal[0].lstrip(": "))
        return "torch" if refusal else name
    refusal = _refusal(backend, device, dtype)
    if refusal:
        raise KernelUnavailable(f"backend {backend!r}{refusal[0]}", remedy=refusal[1])
    return backend


def serving(device: torch.device | str) -> tuple[str, str]:
    """(backend, why) that "auto" takes for float32 tensors on a device; if it is torch, why and the remedy."""
    device = torch.device(device)
    name = {"cpu": "numba", "cuda": "cuda"}.get(device.type, "torch")
    refusal = _refusal(name, device, torch.float32)
    if refusal:
        return "torch", f"{refusal[0].lstrip(': ')}; {refusal[1]}"
    return name, _cuda_state(device.index)[1] if name == "cuda" else backends()[name].reason


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str] | None:
    """Why a backend cannot serve tensors of this kind here, and the remedy; ``None`` if it can."""
    other = "use 'torch' (or 'auto')"
    if name == "numba":
        if not _numba_present():
            return f": {_NUMBA_MISSING}", f"pip install 'mmi[fast]', or {other}"
        if device.type != "cpu":
            return f" serves CPU tensors, not {device.type}", other
        if dtype not in _NUMBA_DTYPES:
            return f" computes in float32, not {dtype}", other
    if name == "cuda":
        works, found, remedy = _cuda_state(device.index if device.type == "cuda" else None)
        if not works:
            return f": {found}", remedy
        if device.type != "cuda":
            return f" serves CUDA tensors, not {device.type}", f"move them, or {other}"
        if dtype not in cuda_build.KINDS:
            return f" computes in float32, not {dtype}", other
    return None


def backend_for(backend: str, value: Tensor, dtypes: Sequence[torch.dtype], images: int = 1) -> str:
    """`resolve` for a call with ``value`` [R, S, H, D] and tensors of ``dtypes``, sizes considered too."""
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        if dtype != widest:
            widest = torch.promote_types(widest, dtype)
    served_by = resolve(backend, value.device, widest)
    most, refusal = cuda_build.MOST_CHANNELS, ""
    if served_by == "numba" and value.shape[1] > _NUMBA_POSITIONS:
        refusal = f"at most {_NUMBA_POSITIONS} positions, not {value.shape[1]}"
    elif served_by == "cuda" and value.shape[3] > most:
        refusal = f"at most {most} channels per head, not {value.shape[3]}"
    elif served_by == "cuda" and images > cuda_build.MOST_IMAGES:
        refusal = f"at most {cuda_build.MOST_IMAGES} images, not {images}"
    if refusal and backend == "auto":
        return "torch"
    if refusal:
        raise KernelUnavailable(f"backend {backend!r} serves {refusal}", remedy="use 'torch' (or 'auto')")
    return served_by


def deform_sample(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Weighted bilinear samples of multi-level maps, differentiable in all three tensors.

    Args:
        value: [N, S, H, D], levels concatenated along S, each in row-major order.
        spatial_shapes: (height, width) in positions of each of the L levels; Σ height·width = S.
        locations: [N, Q, H, L, P, 2], (x, y) relative to the map: [0, 1] inside, outside samples zeros. Pixel i's
            centre is at (i + 0.5) / size.
        weights: [N, Q, H, L, P], used as they are (softmax is the caller's). A weight of exactly 0 contributes
            nothing, whatever the value there.
        backend: "auto", "torch", "numba" or "cuda", see `resolve`.

    Returns:
        [N, Q, H·D], value's dtype, contiguous. Row n depends on row n of the inputs alone, and equal inputs give
        equal bits on one machine.

    Raises:
        ValueError: shapes or devices do not fit together, or no such backend.
        KernelUnavailable: the named backend cannot serve this call.
    """
    shapes = _checked_shapes(value, spatial_shapes, locations, weights)
    served_by = backend_for(backend, value, (value.dtype, locations.dtype, weights.dtype))
    if served_by == "cuda":
        from mmi_kernels import cuda_op

        in_cells = [(width, height) for height, width in shapes]
        return cuda_op.sample(value, shapes, locations.flatten(2), weights.flatten(2), in_cells, cuda_build.SAMPLE)
    if served_by == "numba":
        if torch.compiler.is_compiling():
            from mmi_kernels.numba_cpu import deform_sample_untraced

            return deform_sample_untraced(value, shapes, locations, weights)
        return _numba_sample()(value, shapes, locations, weights)
    return deform_sample_reference(value, shapes, locations, weights)


@cache
def _numba_sample() -> Callable[..., Tensor]:
    # An import statement in a function costs a tenth of a short call, each time.
    from mmi_kernels.numba_cpu import deform_sample_numba

    return deform_sample_numba


def _checked_shapes(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[tuple[int, int], ...]:
    """The level shapes as plain ints, after every dimension was compared. Raises ValueError."""
    if not all(t.is_floating_point() for t in (value, locations, weights)):
        raise ValueError("value, locations and weights must be floating-point tensors")
    if not value.device == locations.device == weights.device:
        raise ValueError(f"tensors on different devices: {value.device}, {locations.device}, {weights.device}")
    fitting = _fitting.__wrapped__ if torch.compiler.is_compiling() else _fitting  # tracing looks through no cache
    return fitting(tuple(map(tuple, spatial_shapes)), value.shape, locations.shape, weights.shape)


@lru_cache(maxsize=256)
def _fitting(
    spatial_shapes: tuple[tuple[int, ...], ...], value: torch.Size, locations: torch.Size, weights: torch.Size
) -> tuple[tuple[int, int], ...]:
    """`_checked_shapes` for the tensors' shapes, worked out once: a short call takes no longer than these checks."""
    shapes = tuple((int(height), int(width)) for height, width in spatial_shapes)
    if not shapes or any(height < 1 or width < 1 for height, width in shapes):
        raise ValueError(f"spatial_shapes must hold one (height, width) ≥ 1 per level, got {shapes}")
    if len(value) != 4 or 0 in value[2:]:
        raise ValueError(f"value must be [N, S, H, D] with H, D ≥ 1, got {tuple(value)}")
    rows, positions, heads, _ = value
    if positions != sum(height * width for height, width in shapes):
        raise ValueError(f"value has {positions} positions, spatial_shapes {shapes} add up to another number")
    if len(weights) != 5 or (weights[0], *weights[2:4]) != (rows, heads, len(shapes)):
        raise ValueError(
            f"weights must be [N, Q, H, L, P] with N {rows}, H {heads}, L {len(shapes)}, got {tuple(weights)}"
        )
    if weights[4] < 1:
        raise ValueError("weights must hold at least one point per level")
    if tuple(locations) != (*weights, 2):
        raise ValueError(f"locations must be {(*weights, 2)} to match weights, got {tuple(locations)}")
    return shapes
