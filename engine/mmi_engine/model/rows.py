"""Equal bits for a row, whatever the number of rows: used where pictures are encoded, denoised and decoded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def paired(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``function(rows)`` ``[N, …]``, where on a CPU a single row goes in twice.

    For a convolution of one small picture alone torch takes another algorithm than for several, with other last bits.
    A story feeds its pictures back, which would make visible differences of them.
    """
    if len(rows) == 1 and rows.device.type == "cpu":
        return function(torch.cat([rows, rows]))[:1]
    return function(rows)
