"""Checkpoints that resume exactly, written atomically.

A checkpoint is a directory ``checkpoints/step-00001234`` with everything that the rest of the run depends on: weights,
optimizer moments, averaged weights, generator states (accelerate's ``save_state``) and the position in the data. It is
written beside its place and renamed, so that a directory of that name is always complete, also after ``kill -9``.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass
class Position:
    """Where the run stands. Batch indices and noise seeds follow from ``step`` alone."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Pictures seen by this process."""
    seconds: float = 0.0
    """Training time so far, over all resumptions."""

    def state_dict(self) -> dict[str, Any]:
        """The three numbers."""
        return {"step": self.step, "samples": self.samples, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.step, self.samples, self.seconds = int(state["step"]), int(state["samples"]), float(state["seconds"])


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def save(
    accelerator: Accelerator, folder: Path, step: int, keep: int, extra: Callable[[Path], None] | None = None
) -> Path:
    """Write checkpoint ``step`` into ``folder`` and delete all but the newest ``keep``.

    Args:
        extra: writes what accelerate does not know of; called in every process.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():
        return final
    partial = folder / f".partial-{step:08d}"
    if accelerator.is_main_process:
        for stale in folder.glob(".partial-*"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if extra is not None:
        extra(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in partial.rglob("*"):
            if path.is_file():
                _flush(path)
        os.replace(partial, final)
        _flush(folder)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    logger.info("checkpoint %s", final)
    return final


def _flush(path: Path) -> None:
    """Force a file or directory to the disk before the rename that makes it visible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
