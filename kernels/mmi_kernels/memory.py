"""By how much a call raises this process's memory.

Place in the flow: `bench.py` asks. Linux keeps a high-water mark of resident memory, which a process may lower to what
it holds at the moment; the mark after the call, less what was held before, is what the call took.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable


def peak_mib(call: Callable[[], object]) -> float | None:
    """Most memory during `call()` above what was resident before, in MiB; `None` where the system does not tell.

    Memory that was freed earlier is handed back first: taken again by the call it would go unseen.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as mark:
            mark.write("5")
        before = _status("VmRSS")
        call()
        return max(0.0, (_status("VmHWM") - before) / 1024)
    except (OSError, LookupError):
        return None


def _status(name: str) -> int:
    """A figure in KiB of this process's status."""
    with open("/proc/self/status", encoding="ascii") as lines:
        found = re.search(rf"^{name}:\s*(\d+) kB", lines.read(), re.MULTILINE)
    if found is None:
        raise LookupError(name)
    return int(found[1])
