"""Compiles the CUDA source for one specialisation and launches it, through CuPy.

Place in the flow: `cuda_op.py` describes a call by a `Spec` and 8-byte arguments; `launch` here compiles `mmfs.cu` for
the spec on first use (NVRTC, a third of a second, kept in memory per device and in CuPy's cache on disk) and starts it
on torch's current stream. `state` tells whether all that works on a device; `op.resolve` asks it.

The source includes no header, so nothing of a CUDA toolkit beyond NVRTC is needed, which CuPy's ``[ctk]`` extra brings.
All memory is torch's; CuPy allocates none.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

THREADS = 256
"""Threads of a block, the same for every specialisation."""

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Dtypes of the kernel, as its macros number them."""

MMFS, ATTENTION, SAMPLE = 0, 1, 2
"""Modes of the kernel, see `mmfs.cu`."""

OLDEST = (7, 0)
MOST_CHANNELS, MOST_IMAGES, MOST_CELLS = 512, 64, 2**28

_INSTALL = "pip install 'mmi[cuda13]' or 'mmi[cuda12]', whichever CUDA torch was built for"
SOURCE = Path(__file__).with_name("mmfs.cu")


def layout(dim: int, dtype: torch.dtype, backward: bool = False) -> tuple[int, int]:
    """(lanes of a group, channels per load) for ``dim`` channels per head.

    A load is at most 16 bytes and divides a head; eight lanes share a head unless it is small (one load per lane) or a
    lane would hold more than 32 channels. Backward, a load is at most four channels in every dtype: lanes add that many
    float32 gradients at once, and only if neighbours' lie side by side does each addition fill the memory's sectors.
    """
    size = 4 if backward else dtype.itemsize
    wide = next(n for n in (16 // size, 8 // size, 4 // size, 1) if dim % n == 0)
    chunks, lanes = dim // wide, 1
    while lanes < min(chunks, 8):
        lanes *= 2
    while lanes < 32 and -(-chunks // lanes) * wide > 32:
        lanes *= 2
    return lanes, wide


@dataclass(frozen=True)
class Spec:
    """What the source is compiled for.

    Attributes:
        value, query: dtypes of the values (and the output) and of offsets, logits and tables.
        dim, points: D, P.
        mode: `MMFS`, `ATTENTION` or `SAMPLE`.
        backward: which of the two kernels.
        split: forward in which several groups share a query.
        deterministic: backward whose value gradient does not depend on the order of additions.
    """

    value: torch.dtype
    query: torch.dtype
    dim: int
    points: int
    mode: int
    backward: bool = False
    split: bool = False
    deterministic: bool = False

    @property
    def entry(self) -> str:
        """Name of the kernel."""
        return "mmi_backward" if self.backward else "mmi_forward"

    def options(self) -> tuple[str, ...]:
        """Compiler options: the macros of `mmfs.cu`."""
        lanes, wide = layout(self.dim, self.value, self.backward)
        macros = {
            "VT": KINDS[self.value],
            "QT": KINDS[self.query],
            "D": self.dim,
            "P": self.points,
            "G": lanes,
            "V": wide,
            "MODE": self.mode,
            "SPLIT": int(self.split),
            "DET": int(self.deterministic),
            "BACKWARD": int(self.backward),
        }
        return ("-std=c++17", *(f"-DMMI_{name}={number}" for name, number in macros.items()))


@cache
def source() -> str:
    """The CUDA source."""
    return SOURCE.read_text(encoding="utf-8")


class _TorchStream:
    """A stream of torch's as CuPy wants to be handed it (CUDA stream protocol)."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@cache
def _stream(pointer: int) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_TorchStream(pointer))


@cache
def _kernel(spec: Spec, device: int) -> Any:
    """The compiled kernel; call it with that device current."""
    import cupy

    kernel = cupy.RawModule(code=source(), options=spec.options(), backend="nvrtc").get_function(spec.entry)
    kernel.compile()
    return kernel


def launch(spec: Spec, device: torch.device, blocks: int, arguments: tuple[int, ...]) -> None:
    """Start the kernel on torch's current stream of ``device``; compiles on the first call of a specialisation.

    Every argument is an 8-byte integer or a pointer. Raises nothing of its own: CuPy's errors pass.
    """
    current = torch.cuda.current_device()
    index = current if device.index is None else device.index
    if index == current:
        _start(spec, index, blocks, arguments)
    else:
        with torch.cuda.device(index):
            _start(spec, index, blocks, arguments)


def _start(spec: Spec, index: int, blocks: int, arguments: tuple[int, ...]) -> None:
    """`launch` with device number ``index`` current."""
    stream = _stream(torch.cuda.current_stream(index).cuda_stream)
    _kernel(spec, index)((blocks,), (THREADS,), arguments, stream=stream)


@cache
def levels_table(
    shapes: tuple[tuple[int, int], ...], scales: tuple[tuple[float, float], ...], device: torch.device
) -> torch.Tensor:
    """[L, 8] int32 on the device: width, height, first cell of the level in an image, cells per unit of offset in x
    and y (as bits of a float), padding. Kept for good: captured graphs point to it."""
    table = np.zeros((len(shapes), 8), dtype=np.int32)
    sizes = np.asarray(shapes, dtype=np.int64)
    areas = sizes[:, 0] * sizes[:, 1]
    table[:, 0], table[:, 1], table[:, 2] = sizes[:, 1], sizes[:, 0], np.cumsum(areas) - areas
    table[:, 3:5] = np.asarray(scales, dtype=np.float32).view(np.int32)
    return torch.from_numpy(table).to(device)


@cache
def installed() -> bool:
    """Whether CuPy can be found. Looked up without importing it, which takes a second."""
    return importlib.util.find_spec("cupy") is not None


@cache
def state(device: int) -> tuple[bool, str, str]:
    """(works, what was found, remedy) for CUDA device number ``device``. Compiles and runs a small kernel, once."""
    if not torch.backends.cuda.is_built():
        return False, "this torch has no CUDA support", "install a CUDA build of torch, or use 'torch' (or 'auto')"
    if not torch.cuda.is_available():
        return False, "no CUDA driver or device", "run `nvidia-smi` to see the driver, or use 'torch' (or 'auto')"
    if device >= torch.cuda.device_count():
        return False, f"there is no CUDA device {device}", f"choose one of 0 … {torch.cuda.device_count() - 1}"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        found = f"{name} is of compute capability {capability[0]}.{capability[1]}, the kernel needs 7.0"
        return False, found, "use 'torch' (or 'auto')"
    if not installed():
        return False, "CuPy is not installed", f"{_INSTALL}, or use 'torch' (or 'auto')"
    try:
        _probe(device)
    except Exception as error:  # whatever a broken installation throws is the reason to tell
        first = (str(error).strip() or repr(error)).splitlines()[0]
        found = f"CuPy cannot compile or run a kernel here ({type(error).__name__}: {first})"
        return False, found, f"{_INSTALL}; or use 'torch' (or 'auto')"
    return True, f"CuPy kernel on {name}", ""


def _probe(device: int) -> None:
    """Compile and run a kernel that writes one number. Raises if the number is not there afterwards."""
    import cupy

    code = 'extern "C" __global__ void mmi_probe(int* to, long long number) { *to = (int)number; }'
    with torch.cuda.device(device):
        target = torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")
        kernel = cupy.RawModule(code=code, backend="nvrtc").get_function("mmi_probe")
        pointer = torch.cuda.current_stream(device).cuda_stream
        kernel((1,), (1,), (target.data_ptr(), 42), stream=_stream(pointer))
        if target.item() != 42:
            raise RuntimeError("a test kernel left no trace")
