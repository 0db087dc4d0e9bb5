"""What the loop needs to know about a training task, and nothing else.

A task bundles the module to train, its data and what is done with the result. :mod:`mmi_engine.train.vae` and
:mod:`mmi_engine.train.interleaved` are the two implementations; the loop is the same for both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Task(Protocol):
    """One kind of training."""

    module: nn.Module
    """``module(batch) -> (loss, parts)``: scalar loss with gradient and detached scalars by name for the log."""

    def batch(self, index: int) -> Any:
        """Micro-batch ``index``: a pure function of the recipe's seed and ``index``. Called from a loader thread."""

    def to_device(self, batch: Any, device: Any) -> Any:
        """The batch on ``device``."""

    def ids(self, batch: Any) -> list[str]:
        """Names of the batch's samples, for the report of a non-finite loss."""

    def size(self, batch: Any) -> int:
        """What ``samples_per_s`` counts: pictures."""

    def evaluate(self, samples: int) -> dict[str, Tensor | float]:
        """Figures on held-out data with the weights that ``module`` carries at the moment (the averaged ones)."""

    def preview(self, path: Path) -> None:
        """Write a picture that shows the state of training to ``path`` (PNG)."""

    def export(self, directory: Path) -> None:
        """Write the trained result from the weights that ``module`` carries at the moment."""
