"""The CUDA source on the CPU: compiled by the host's C++ compiler with `emulator.cpp`, one library per specialisation.

`launch` has the signature of `mmi_kernels.cuda_build.launch`. `install` serves the operators for CPU tensors with it,
so that tests run the whole way from torch to the kernel: argument order, grids, strides, gradients, tracing.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from mmi_kernels import cuda_build, cuda_op
from mmi_kernels.cuda_build import Spec

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
_FOLDER = Path(tempfile.gettempdir()) / "mmi-emulator"


@cache
def _library(spec: Spec) -> ctypes.CDLL:
    assert COMPILER is not None
    sources = (HERE / "emulator.cpp").read_bytes() + cuda_build.SOURCE.read_bytes()
    name = hashlib.sha256(sources + repr(spec).encode()).hexdigest()[:24]
    target = _FOLDER / f"{name}.so"
    if not target.exists():
        _FOLDER.mkdir(exist_ok=True)
        draft = target.with_suffix(f".{id(spec)}")
        flags = ["-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-w", "-x", "c++"]
        command = [COMPILER, *flags, *spec.options(), f"-I{cuda_build.SOURCE.parent}", str(HERE / "emulator.cpp")]
        subprocess.run([*command, "-o", str(draft)], check=True, capture_output=True, text=True)
        draft.replace(target)
    library = ctypes.CDLL(str(target))
    library.emulate.restype = ctypes.c_char_p
    library.emulate.argtypes = [ctypes.c_longlong, ctypes.POINTER(ctypes.c_longlong), ctypes.c_longlong]
    return library


def launch(spec: Spec, device: torch.device, blocks: int, arguments: tuple[int, ...]) -> None:
    """`cuda_build.launch` on the host."""
    given = (ctypes.c_longlong * len(arguments))(*arguments)
    failure = _library(spec).emulate(blocks, given, len(arguments))
    if failure:
        raise RuntimeError(failure.decode())


@cache
def install() -> None:
    """Serve `torch.ops.mmi` for CPU tensors, for the rest of the process."""
    cuda_op.register(launch, "CPU")
