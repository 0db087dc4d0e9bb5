"""Equal bits for a row, whatever the number of rows: used where pictures are encoded, denoised and decoded."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from mmi_engine.probe import together

Model = TypeVar("Model", bound=nn.Module)
NATIVE_ELEMENTS = 20480
"""Up to so many numbers in one picture torch convolves by its own code, in all other cases by oneDNN's (ATen's
``use_mkldnn``)."""
DRAWN_TOGETHER = 4
"""Pictures that a CPU denoises at a time. More gain it little (6 % at eight), and with the number of rows the library
changes its algorithms and with them the last bits, which stories make visible by feeding their pictures back."""


class SteadyConv2d(nn.Conv2d):
    """A convolution that takes the same algorithm for one picture as for several; see :func:`steady`."""

    def forward(self, input: Tensor) -> Tensor:
        """As its base class; a small picture alone goes in twice."""
        if len(input) == 1 and input.numel() <= NATIVE_ELEMENTS and input.device.type == "cpu":
            return super().forward(torch.cat([input, input]))[:1]
        return super().forward(input)


def steady(model: Model) -> Model:
    """``model`` with every ``nn.Conv2d`` made a `SteadyConv2d` in place; names and weights stay as they are.

    On a CPU torch takes another algorithm for one small picture alone, with other last bits. A story feeds its pictures
    back, which would make visible differences of them between batches of one and of several.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = SteadyConv2d
    return model


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
