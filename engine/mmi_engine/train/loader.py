"""Micro-batches ahead of time: from the task's ``batch(index)`` to the loop, in order.

Between :mod:`mmi_engine.train.data` and :mod:`mmi_engine.train.loop`. A batch is a function of its index alone, so any
number of processes gives the same stream, and a run that resumes simply starts at a later index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch.utils.data import DataLoader, Dataset

from mmi_engine.errors import MMIError

Make = Callable[[int], Any]
AHEAD = 3
"""Batches that are kept ready (per process, where there are several)."""


class _Indexed(Dataset[Any]):
    """``make`` over ``indices`` as a map-style dataset, one batch an item."""

    def __init__(self, make: Make, indices: Sequence[int]) -> None:
        self.make, self.indices = make, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Any]:
        if position >= len(self.indices):
            raise IndexError(position)
        index = self.indices[position]
        try:
            return index, self.make(index)
        except MMIError as error:  # torch would wrap it into a traceback; it is raised as it is by `stream`
            return index, error


def stream(make: Make, indices: Sequence[int], *, workers: int, pin: bool) -> Iterator[tuple[int, Any]]:
    """``(index, make(index))`` for every index, in order.

    Args:
        make: builds one micro-batch.
        indices: which ones.
        workers: processes that build them; 0 builds them in a thread of this process.
        pin: have batches moved to page-locked memory (``batch.pin_memory()``), for copies that do not wait.
    """
    if workers == 0:
        yield from _from_thread(make, indices)
        return
    # fork: the workers share the memory-mapped pictures and start at once; they never touch a device
    loaded = DataLoader(
        _Indexed(make, indices),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=AHEAD,
        pin_memory=pin,
        multiprocessing_context="fork",
    )
    for index, batch in loaded:
        if isinstance(batch, MMIError):
            raise batch
        yield index, batch


def _from_thread(make: Make, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
    pending: list[tuple[int, Future[Any]]] = []
    upcoming = iter(indices)
    with ThreadPoolExecutor(1) as pool:
        try:
            for _ in indices:
                while len(pending) < AHEAD and (index := next(upcoming, None)) is not None:
                    pending.append((index, pool.submit(make, index)))
                index, future = pending.pop(0)
                yield index, future.result()
        finally:
            for _, future in pending:
                future.cancel()
