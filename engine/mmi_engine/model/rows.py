"""Equal bits for a row, whatever the number of rows: used where pictures are encoded, denoised and decoded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmi_engine.probe import together

DRAWN_TOGETHER = 4
"""Pictures that a CPU denoises at a time. More gain it little (6 % at eight), and with the number of rows the library
changes its algorithms and with them the last bits, which stories make visible by feeding their pictures back."""


def paired(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``function(rows)`` ``[N, …]``, where on a CPU a single row goes in twice.

    For a convolution of one small picture alone torch takes another algorithm than for several, with other last bits.
    A story feeds its pictures back, which would make visible differences of them.
    """
    if len(rows) == 1 and rows.device.type == "cpu":
        return function(torch.cat([rows, rows]))[:1]
    return function(rows)


def invariant_rows(batch_size: int, device: torch.device) -> int:
    """Rows that are computed together so that an item's bytes do not depend on its place among them.

    On a CPU torch deals the rows of a matrix product out to its threads; where a thread's share ends inside an item,
    that item takes another path through the library and its last bits change. So the rows are a multiple of the threads
    (at most ``batch_size``), or one where there are fewer rows than threads.
    """
    if device.type != "cpu":
        return batch_size
    return together(batch_size, torch.get_num_threads())


def drawn_together(rows: int, device: torch.device) -> int:
    """Rows of each of the equal parts in which so many pictures are denoised; see ``DRAWN_TOGETHER``.

    On a CPU a multiple of the threads, as in `invariant_rows`, so that an item's place leaves no trace.
    """
    if device.type != "cpu":
        return rows
    threads = torch.get_num_threads()
    shares = -(-rows // threads)
    parts = -(-shares // max(1, DRAWN_TOGETHER // threads))
    return min(rows, -(-shares // parts) * threads)
