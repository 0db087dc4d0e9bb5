"""Process-wide settings: threads, denormals, what the allocator does with freed memory, Python's collector.

`tune_cpu` is called once by every process that computes (generation, training) before its first tensor; it changes no
result beyond flushing numbers below 1e-38 to zero. `no_collection` stands around every recording of a CUDA graph.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
KEEP_BYTES = 2**31 - 1


def tune_cpu(threads: int | None) -> None:
    """Prepare this process.

    glibc returns every large freed block to the system and asks for it again, so each temporary tensor costs a page
    fault per 4 KiB: up to half the time of a training step on pictures this small. Keeping the memory halves it.

    Args:
        threads: of torch's operations; ``None`` leaves the default.
    """
    import torch

    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large blocks instead of unmapping them; False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, KEEP_BYTES))


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now and not while this lasts: a recording breaks off when an older CUDA graph is freed in it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
