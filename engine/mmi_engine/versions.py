"""What this machine and installation are: versions, devices, cores, memory, kernels; and what to do about problems.

Place in the flow: `run.json` records `versions`, `mmi doctor` shows `examine`. Only `examine` imports torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmi_engine import __version__
from mmi_engine.errors import MMIError

PACKAGES = (
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "numba",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "scipy",
    "torchmetrics",
)
REQUIRED = PACKAGES[:8]
LOW_MEMORY_BYTES = 2 * 2**30  # the toon model runs in less, but little else will


@dataclass(frozen=True)
class Finding:
    """One line of `mmi doctor`.

    Attributes:
        name: what was looked at.
        value: what was found.
        problem: whether something should be done.
        remedy: what.
    """

    name: str
    value: str
    problem: bool = False
    remedy: str | None = None


def versions() -> dict[str, str]:
    """Versions of mmi, Python and the packages that compute; read from metadata, nothing is imported."""
    found = {"mmi": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        version = package_version(name)
        if version is not None:
            found[name] = version
    return found


def package_version(name: str) -> str | None:
    """Version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def physical_cores() -> int:
    """Physical CPU cores this process may use: hyper-threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(((folder / "physical_package_id").read_text(), (folder / "core_id").read_text()))
        except OSError:
            cores.add((str(cpu), ""))
    return max(1, len(cores))


MOST_THREADS = 1024


def default_threads() -> int:
    """Threads of a CPU where the user names none: OMP_NUM_THREADS where it is set, else the physical cores."""
    return _said_threads() or physical_cores()


def _said_threads() -> int:
    """What OMP_NUM_THREADS says of the outermost team, at most what ``--threads`` takes; 0 where it is no number."""
    outermost = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(outermost), MOST_THREADS) if outermost.isdecimal() else 0


def free_memory_bytes() -> int | None:
    """Main memory that can be had without swapping: the smaller of the machine's and the control group's."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        pass
    return free


def examine() -> list[Finding]:
    """Everything `mmi doctor` looks at. Imports torch and the kernels; never raises."""
    findings = [Finding("mmi", __version__), Finding("python", f"{platform.python_version()} ({sys.executable})")]
    findings += _packages()
    findings += _shadowed()
    findings += _guarded("torch", _devices)
    findings += _guarded("kernels", _kernels)
    findings += _guarded("embedded model", _embedded_model)
    findings.append(_memory())
    findings.append(Finding("cores", f"{physical_cores()} physical, {os.cpu_count()} logical"))
    source = "OMP_NUM_THREADS" if _said_threads() else "the physical cores"
    findings.append(Finding("threads", f"{default_threads()} without --threads: {source}"))
    return findings


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        version = package_version(name)
        if version is not None:
            findings.append(Finding(name, version))
        elif name in REQUIRED:
            findings.append(Finding(name, "not installed", True, f"pip install {name}"))
    return findings


def _shadowed() -> list[Finding]:
    """Files in the working directory or on the path that hide a library by carrying its name."""
    findings = []
    for name in ("torch", "transformers", "diffusers", "accelerate", "kernels", "PIL", "numpy"):
        for folder in (Path.cwd(), *map(Path, os.environ.get("PYTHONPATH", "").split(os.pathsep))):
            if (folder / f"{name}.py").is_file():
                remedy = f'rename "{folder / name}.py": Python may import it instead of the library'
                findings.append(Finding("import clash", f"{name}.py", True, remedy))
                break
    return findings


def _guarded(name: str, look: Any) -> list[Finding]:
    try:
        return look()
    except MMIError as error:
        return [Finding(name, error.message, True, error.remedy)]
    except Exception as error:  # a broken installation is what the doctor is for
        remedy = "reinstall mmi and its dependencies in a fresh environment"
        return [Finding(name, f"{type(error).__name__}: {error}", True, remedy)]


def _devices() -> list[Finding]:
    import torch

    findings = [Finding("cpu", platform.processor() or platform.machine())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            text = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            findings.append(Finding(f"cuda:{index}", text))
    elif torch.version.cuda is not None and Path("/proc/driver/nvidia").exists():
        remedy = "install a driver for CUDA " + torch.version.cuda + ", or a torch build for your driver"
        findings.append(Finding("cuda", "a GPU driver is there but torch cannot use it", True, remedy))
    else:
        findings.append(Finding("cuda", "none; everything runs on the CPU"))
    return findings


def _kernels() -> list[Finding]:
    """Per device the backend that serves it and why; what each backend could do."""
    import torch

    import mmi_kernels

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    findings = []
    for device in ("cpu", *(f"cuda:{index}" for index in range(count))):
        name, why = mmi_kernels.serving(device)
        findings.append(Finding(f"kernel on {device}", f"{name}: {why}"))
    findings += [Finding(f"kernel {name}", str(reason)) for name, reason in mmi_kernels.backends().items()]
    return findings


def _embedded_model() -> list[Finding]:
    from mmi_engine.model_info import describe

    parts = describe("toon")
    return [
        Finding("embedded model", f"toon, {parts.parameters / 1e6:.1f} M parameters, {parts.bytes / 2**20:.1f} MiB")
    ]


def _memory() -> Finding:
    free = free_memory_bytes()
    if free is None:
        return Finding("free memory", "unknown")
    low = free < LOW_MEMORY_BYTES
    return Finding("free memory", f"{free / 2**30:.1f} GiB", low, "close other programs" if low else None)
