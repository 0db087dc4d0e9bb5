"""`--batch-size auto`: how many items fit, found by running the first one before the work begins.

Place in the flow: `engine.py` calls `choose` once per output directory, with the model loaded; the size is recorded
there, and resumed runs and other processes take it over. Two sizes are run with a single denoising step, the growth of
the peak memory between them is what an item costs, and the largest size below the bound that fits is taken. Sizes
double from `unit` on: the threads of a CPU, among which the rows of a batch are dealt out evenly.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mmi_engine.errors import is_out_of_memory

SHARE = 0.6  # of the free memory; the rest is for longer items than the one probed


class Meter(Protocol):
    """Memory of a device."""

    def used(self, work: Callable[[], None]) -> int:
        """Bytes by which the peak rose above the level at the meter's creation while `work` ran."""
        ...

    def free(self) -> int:
        """Bytes that were free at the meter's creation."""
        ...


def together(batch_size: int, unit: int) -> int:
    """Rows that are computed at a time in a batch: a multiple of `unit`, or one where there are fewer."""
    return max(1, batch_size // unit * unit)


def choose(run: Callable[[int], None], bound: int, meter: Meter, share: float = SHARE, unit: int = 1) -> int:
    """The batch size.

    Args:
        run: computes the sample in a batch of this size; may run out of memory, see `is_out_of_memory`.
        bound: never more.
        meter: of the device.
        share: part of the free memory that may be used.
        unit: sizes above 1 are multiples of it; see `together`.

    Returns:
        1, or `unit` doubled a few times, or the largest size up to `bound`.
    """
    bound, more = together(bound, unit), max(2, unit)
    try:
        one = meter.used(lambda: run(1))
        many = meter.used(lambda: run(more)) if bound > 1 else one
    except Exception as error:
        if is_out_of_memory(error):
            return 1
        raise
    each = max(0, many - one) / (more - 1)
    room = meter.free() * share
    size = 1
    while size < bound and one + each * (_next(size, bound, unit) - 1) <= room:
        size = _next(size, bound, unit)
    return size


def _next(size: int, bound: int, unit: int) -> int:
    return min(bound, 2 * size if size >= unit else unit)


class HostMeter:
    """Resident memory of this process. Several processes of one launch share the machine's.

    Args:
        free: bytes available to this process; default what the system reports, divided by the local processes.
    """

    def __init__(self, free: int | None = None) -> None:
        from mmi_engine.versions import free_memory_bytes

        processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._free = free if free is not None else (free_memory_bytes() or 4 * 2**30) // processes
        self._level = _status("VmRSS")

    def used(self, work: Callable[[], None]) -> int:
        """See `Meter`; where the kernel does not tell, 0."""
        _reset_peak()
        work()
        return max(0, _status("VmHWM") - self._level)

    def free(self) -> int:
        """See `Meter`."""
        return self._free


class CudaMeter:
    """Memory of a CUDA device."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda: Any = torch.cuda
        self._device = device
        self._level = int(self._cuda.memory_allocated(device))
        self._free = int(self._cuda.mem_get_info(device)[0])

    def used(self, work: Callable[[], None]) -> int:
        """See `Meter`."""
        self._cuda.reset_peak_memory_stats(self._device)
        work()
        return max(0, int(self._cuda.max_memory_allocated(self._device)) - self._level)

    def free(self) -> int:
        """See `Meter`."""
        return self._free


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _reset_peak() -> None:
    """Let VmHWM start again from the present level."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
