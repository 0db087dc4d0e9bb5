"""Reading ahead and writing behind, so that images, model and disk overlap.

Place in the flow: `run.py` reads rows through `ahead` (worker threads decode images while the model computes) and hands
finished items to a `Writer` (one thread, in order). Order is never changed, so neither leaves a trace in the output.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORKERS = 2


def ahead(function: Callable[[T], R], items: Iterable[T], depth: int) -> Generator[R]:
    """`function` of every item, in order, computed up to `depth` items ahead by `WORKERS` threads.

    Closing the iterator early drops what has not begun.
    """
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="mmi-read")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Writer:
    """One thread that does what it is given, in order. The first exception ends it and is raised to the giver.

    Args:
        depth: how many actions may wait; beyond it `do` blocks.
    """

    def __init__(self, depth: int) -> None:
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mmi-write", daemon=True)
        self._thread.start()

    def do(self, action: Callable[[], None]) -> None:
        """Queue an action.

        Raises:
            whatever an earlier action raised.
        """
        self._raise()
        self._waiting.put(action)

    def finish(self) -> None:
        """Wait until all is done; raises what an action raised."""
        self._stop()
        self._raise()

    def abandon(self) -> None:
        """Drop what has not begun and wait for the action at work."""
        while True:
            try:
                self._waiting.get_nowait()
            except queue.Empty:
                break
        self._stop()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (action := self._waiting.get()) is not None:
            if self._error is None:
                try:
                    action()
                except BaseException as error:  # kept for the giver, who raises it in the main thread
                    self._error = error
