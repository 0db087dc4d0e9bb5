"""The CUDA source compiles for real devices, without one: every specialisation by NVRTC, spills by ptxas.

NVRTC is that of the wheel nvidia-cuda-nvrtc, called through ctypes with CuPy's options; nvcc serves without it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from mmi_kernels.cuda_build import ATTENTION, MMFS, SAMPLE, SOURCE, Spec, source

CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# (mode, D, P) of the released model's LLM and U-Net and of its adapter, of the embedded model's, and odd ones
SHAPES = ((MMFS, 64, 8), (MMFS, 16, 4), (ATTENTION, 32, 4), (ATTENTION, 16, 4), (SAMPLE, 64, 8), (SAMPLE, 37, 5))
KINDS = ({}, {"split": True}, {"backward": True}, {"backward": True, "deterministic": True})
SPECS = [
    Spec(value, query, dim, points, mode, **kind)
    for mode, dim, points in SHAPES
    for value, query in ((FP32, FP32), (FP16, FP16), (BF16, BF16), (BF16, FP32))
    for kind in KINDS
]


def _folder() -> Path | None:
    found = importlib.util.find_spec("nvidia")
    for place in found.submodule_search_locations or () if found else ():
        for library in sorted(Path(place).glob("**/libnvrtc.so.*")):
            return library.parent
    return None


FOLDER = _folder()
NVCC = shutil.which("nvcc")
needs_compiler = pytest.mark.skipif(
    FOLDER is None and NVCC is None, reason="needs NVRTC (pip install nvidia-cuda-nvrtc) or nvcc"
)


@cache
def nvrtc() -> ctypes.CDLL:
    assert FOLDER is not None
    for builtins in FOLDER.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(next(FOLDER.glob("libnvrtc.so.*"))))


@cache
def newest() -> int:
    """The newest architecture that the compiler knows."""
    if FOLDER is None:
        listed = subprocess.run([str(NVCC), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        return max(int(number) for number in re.findall(r"sm_(\d+)\b", listed))
    count = ctypes.c_int()
    nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc().nvrtcGetSupportedArchs(known)
    return max(known)


def compiled(spec: Spec, architecture: str) -> bytes:
    """The cubin ("sm_90") or PTX ("compute_90"). Fails with the compiler's log."""
    if FOLDER is None:
        return compiled_by_nvcc(spec, architecture)
    options = [*spec.options(), *CUPY_OPTIONS, f"-arch={architecture}"]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc().nvrtcCreateProgram(ctypes.byref(program), source().encode(), b"mmfs.cu", 0, None, None)
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc().nvrtcCompileProgram(program, len(options), array)
    nvrtc().nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc().nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    kind = "CUBIN" if architecture.startswith("sm_") else "PTX"
    getattr(nvrtc(), f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    getattr(nvrtc(), f"nvrtcGet{kind}")(program, code)
    nvrtc().nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def compiled_by_nvcc(spec: Spec, architecture: str) -> bytes:
    kind = "-cubin" if architecture.startswith("sm_") else "-ptx"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "mmfs.out"
        command = [
            str(NVCC),
            *spec.options(),
            "-ftz=true",
            f"-arch={architecture}",
            kind,
            str(SOURCE),
            "-o",
            str(target),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target.read_bytes()


@needs_compiler
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_specialisation_compiles_for_hopper(spec: Spec) -> None:
    assert spec.entry.encode() in compiled(spec, "sm_90")


@needs_compiler
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_source_compiles_for_the_oldest_and_the_newest(kind: dict[str, bool]) -> None:
    for architecture in (75, 80, newest()):
        assert compiled(Spec(BF16, BF16, 64, 8, MMFS, **kind), f"sm_{architecture}")


@needs_compiler
@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas")
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
@pytest.mark.parametrize(("mode", "dim", "points"), SHAPES[:3])
def test_registers_hardly_spill(
    mode: int, dim: int, points: int, kind: dict[str, bool], tmp_path: Path, record_property: object
) -> None:
    """Two blocks of 256 threads must fit a multiprocessor: at most 128 registers and a few spilled bytes."""
    text = compiled(Spec(BF16, BF16, dim, points, mode, **kind), "compute_90").rstrip(b"\0").decode()
    (tmp_path / "mmfs.ptx").write_text(re.sub(r"\.version \d+\.\d+", ".version 9.0", text))
    command = ["ptxas", "-arch=sm_90", "-v", str(tmp_path / "mmfs.ptx"), "-o", str(tmp_path / "mmfs.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill loads", report)
    assert registers and spilled
    record_property("registers", int(registers[1]))  # type: ignore[operator]
    assert int(registers[1]) <= 128 and int(spilled[1]) <= 64
