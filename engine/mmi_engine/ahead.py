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


class _Budget:
    """How much the results that wait may weigh; a thread that would begin another one waits until some are taken."""

    def __init__(self, most: int) -> None:
        self._most, self._held, self._taken, self._closed = most, 0, 0, False
        self._changed = threading.Condition()

    def begin(self, number: int) -> None:
        """Wait until there is room for item `number`; the one that is taken next always has it."""
        with self._changed:
            self._changed.wait_for(lambda: self._held <= self._most or number <= self._taken or self._closed)

    def add(self, weight: int) -> None:
        """A result waits."""
        with self._changed:
            self._held += weight

    def take(self, weight: int) -> None:
        """A result was taken."""
        with self._changed:
            self._held -= weight
            self._taken += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody needs to wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def ahead(
    function: Callable[[T], R], items: Iterable[T], depth: int, weight: Callable[[R], int], most: int
) -> Generator[R]:
    """`function` of every item, in order, computed ahead by `WORKERS` threads.

    Closing the iterator early drops what has not begun.

    Args:
        function, items: what is computed of what.
        depth: how many results may wait.
        weight: of a result; while those that wait weigh more than `most`, nothing further is begun.
    """
    budget = _Budget(most)

    def work(number: int, item: T) -> tuple[R, int]:
        budget.begin(number)
        result = function(item)
        weighs = weight(result)
        budget.add(weighs)
        return result, weighs

    def take(future: Future[tuple[R, int]]) -> R:
        result, weighs = future.result()
        budget.take(weighs)
        return result

    waiting: deque[Future[tuple[R, int]]] = deque()
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="mmi-read")
    try:
        for number, item in enumerate(items):
            waiting.append(pool.submit(work, number, item))
            if len(waiting) >= depth:
                yield take(waiting.popleft())
        while waiting:
            yield take(waiting.popleft())
    finally:
        budget.close()
        pool.shutdown(wait=True, cancel_futures=True)


class Writer:
    """One thread that does what it is given, in order. The first exception ends it and is raised to the giver.

    Args:
        depth: how many actions may wait; most: what they may weigh. Beyond either `do` blocks.
    """

    def __init__(self, depth: int, most: int = 2**62) -> None:
        self._waiting: queue.Queue[tuple[Callable[[], None], int] | None] = queue.Queue(depth)
        self._budget = _Budget(most)
        self._given = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mmi-write", daemon=True)
        self._thread.start()

    def do(self, action: Callable[[], None], weight: int = 0) -> None:
        """Queue an action that holds on to `weight` bytes.

        Raises:
            whatever an earlier action raised.
        """
        self._raise()
        self._budget.begin(self._given)
        self._budget.add(weight)
        self._given += 1
        self._waiting.put((action, weight))

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
        while (given := self._waiting.get()) is not None:
            action, weight = given
            if self._error is None:
                try:
                    action()
                except BaseException as error:  # kept for the giver, who raises it in the main thread
                    self._error = error
            del action, given
            self._budget.take(weight)
