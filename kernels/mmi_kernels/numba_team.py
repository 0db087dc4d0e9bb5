"""The compiled loops on the threads of torch: one call runs `numba_loops.py` in all of them.

Place in the flow: `numba_cpu.py` calls `forward` and `backward` where the work is worth more than one thread and
`available()` says so; else it uses a pool of its own. Importing this file imports numba.

torch computes in a team of OpenMP threads, which after every operation watch for the next one for about a millisecond
instead of sleeping. Threads of another pool would have to be woken, and would share the cores with those that watch: of
two cores nothing would be left to gain on calls of a millisecond. So the loops go to the same team, through the
function that compilers emit for `#pragma omp parallel`, in the very library that torch is linked against. Each thread
takes its range; a call returns when all have done theirs, so nothing it reads or writes can be freed meanwhile.

A child process has inherited the team's memory but none of its threads: `forget` marks it as gone.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import ctypes
import os
import threading
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import binding
from numba import carray, cfunc, types

from mmi_kernels import numba_loops, numba_mmfs, numba_samples, numba_simd
from mmi_kernels.numba_loops import OPTIONS, named_after, sample_lanes, sample_lanes_backward
from mmi_kernels.numba_mmfs import attend_lanes

_LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
_SYMBOLS = {"omp_get_thread_num": "mmi_omp_thread", "omp_get_num_threads": "mmi_omp_threads"}
"""Names under which compiled code finds functions of that library, which others that are loaded may have, too."""
_thread = types.ExternalFunction("mmi_omp_thread", types.int32())
_threads = types.ExternalFunction("mmi_omp_threads", types.int32())
_first = threading.Lock()
_gone = False


@lru_cache(maxsize=1)
def _library() -> Any | None:
    """torch's library, through which its OpenMP is found (Linux); `None` elsewhere."""
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        for name, alias in _SYMBOLS.items():
            binding.add_symbol(alias, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
        library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return library


def available() -> bool:
    """Whether this process can use torch's threads."""
    return not _gone and _library() is not None


def forget() -> None:
    """What a child process calls after a fork."""
    global _gone
    _gone = True


def _forward(data):
    """One thread's share of `sample_lanes`: a range of lanes, or of queries."""
    a = carray(data, 18)
    thread, threads = _thread(), _threads()
    size = a[17]
    first, last = size * thread // threads, size * (thread + 1) // threads
    sizes, bands = (a[4], a[5], a[6], a[7], a[8]), (a[11], a[12], a[13], a[14])
    call = a[0], (a[1], a[2], a[3]), sizes, a[9], a[10] != 0, bands
    if last > first and a[15] != 0:
        sample_lanes(*call, 0, a[16], first, last)
    elif last > first:
        sample_lanes(*call, first, last, 0, a[5])


def _backward(data):
    """One thread's share of `sample_lanes_backward`."""
    a = carray(data, 16)
    thread, threads = _thread(), _threads()
    size = a[15]
    first, last = size * thread // threads, size * (thread + 1) // threads
    tensors, sizes = (a[2], a[3], a[4], a[5], a[6], a[7]), (a[8], a[9], a[10], a[11], a[12])
    if last > first:
        sample_lanes_backward(a[0], a[1], tensors, sizes, a[13], a[14] != 0, first, last)


def _attend(data):
    """One thread's share of `attend_lanes`."""
    a = carray(data, 5)
    thread, threads = _thread(), _threads()
    size = a[4]
    first, last = size * thread // threads, size * (thread + 1) // threads
    if last > first and a[1] != 0:
        attend_lanes(a[0], 0, a[2], first, last)
    elif last > first:
        attend_lanes(a[0], first, last, 0, a[3])


@lru_cache(maxsize=3)
def _compiled(function: Any) -> Any:
    """A share as a C function of one address."""
    make = partial(cfunc, types.void(types.CPointer(types.int64)), error_model=OPTIONS["error_model"])
    try:
        named_after(function, *(file.__file__ for file in (numba_loops, numba_samples, numba_simd, numba_mmfs)))
        return make(cache=True)(function)
    except (OSError, RuntimeError):  # as in `numba_loops`
        return make()(function)


def _run(function: Any, numbers: tuple[int, ...], threads: int) -> None:
    library = _library()
    assert library is not None
    data = np.array(numbers, np.int64)
    with _first:  # two of Python's threads may come at once, and a name is made once
        share = _compiled(function)
    library.GOMP_parallel(share.address, data.ctypes.data, threads, 0)


def forward(call: tuple[Any, ...], lanes: int, queries: int, by_query: bool, threads: int) -> None:
    """`sample_lanes(*call, …)` over all lanes and queries.

    Args:
        call: (value, tensors, sizes, group, pack, bands).
        by_query: cut along the queries, not along the lanes.
        threads: at most so many; OpenMP may give fewer.
    """
    value, tensors, sizes, group, pack, bands = call
    numbers = (value, *tensors, *sizes, group, pack, *bands, by_query, lanes, queries if by_query else lanes)
    _run(_forward, numbers, threads)


def backward(call: tuple[Any, ...], lanes: int, threads: int) -> None:
    """`sample_lanes_backward(*call, …)` over all lanes; call: (value, grad_value, tensors, sizes, group, pack)."""
    value, grad_value, tensors, sizes, group, pack = call
    _run(_backward, (value, grad_value, *tensors, *sizes, group, pack, lanes), threads)


def attend(fields: int, lanes: int, queries: int, by_query: bool, threads: int) -> None:
    """`attend_lanes` over all lanes and queries; fields: the address of its array. The rest as for `forward`."""
    _run(_attend, (fields, by_query, lanes, queries, queries if by_query else lanes), threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
