"""Ctrl-C and SIGTERM: the first asks the loop to end after the batch at work, the second ends it at once.

Place in the flow: `run.py` works inside one `Interrupt` and looks at `requested` between batches.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from typing import Any

log = logging.getLogger(__name__)


class Interrupt(contextlib.AbstractContextManager["Interrupt"]):
    """The first Ctrl-C (or SIGTERM) asks the loop to end after the batch at work; the second ends it at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: the embedding program decides
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("finishing the batch at work; press Ctrl-C again to quit at once")
