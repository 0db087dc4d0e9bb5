"""What one sees of a run beyond the loop's own log: rates, memory, time left, trackers, sheets, the best model so far.

Place in the flow: the loop owns one :class:`Watch` and tells it about every step. Trackers (TensorBoard, W&B …) are
accelerate's; their dependencies are the user's.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mmi_engine.errors import UsageError
from mmi_engine.train.curves import read
from mmi_engine.train.recipe import Recipe

GIB = 2**30


class Watch:
    """Rates between log lines, and what is written besides ``metrics.jsonl``.

    Args:
        recipe: whose ``loop`` table says what; accelerator: its trackers; directory: of the run.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, directory: Path) -> None:
        self.recipe, self.accelerator, self.directory = recipe, accelerator, directory
        self.tokens, self.began, self.first = 0, time.monotonic(), -1
        self.trackers = bool(recipe.loop.trackers)
        if self.trackers:
            self._begin()

    def _begin(self) -> None:
        numbers = {"seed": self.recipe.seed, "lr": self.recipe.optim.lr, "steps": self.recipe.loop.steps}
        try:
            self.accelerator.init_trackers("mmi", config=numbers)
        except (ImportError, ValueError) as error:
            names = ", ".join(self.recipe.loop.trackers)
            raise UsageError(f"loop.trackers {names}: {error}", remedy="pip install 'mmi[train]' or wandb") from error
        if len(self.accelerator.trackers) < len(self.recipe.loop.trackers):
            raise UsageError(
                f"a tracker of loop.trackers {', '.join(self.recipe.loop.trackers)} is not installed",
                remedy="pip install 'mmi[train]' for TensorBoard, wandb for W&B",
            )

    def step(self, step: int, tokens: int) -> None:
        """Count one optimizer step of this process."""
        if self.first < 0:  # the first step pays for what later ones find ready
            self.first, self.began = step, time.monotonic()
            return
        self.tokens += tokens

    def figures(self, step: int) -> dict[str, float]:
        """Tokens a second since the start (where the task counts them), memory in GiB, seconds left."""
        found: dict[str, float] = {"memory_gib": round(memory_gib(self.accelerator.device), 3)}
        spent = time.monotonic() - self.began
        done = step - self.first
        if done > 0 and spent > 0:
            if self.tokens:
                found["tokens_per_s"] = round(self.tokens / spent, 1)
            found["eta_s"] = round(spent / done * (self.recipe.loop.steps - step))
        return found

    def track(self, line: dict[str, Any]) -> None:
        """Hand a line of the log to the trackers."""
        if self.trackers:
            values = {k: float(v) for k, v in line.items() if k != "step"}
            self.accelerator.log(values, step=int(line["step"]))

    def end(self) -> None:
        """Flush the trackers."""
        if self.trackers:
            self.accelerator.end_training()

    def best(self, figures: dict[str, float]) -> bool:
        """Whether the figure of ``loop.keep_best`` is lower than at every evaluation logged before this one."""
        name = self.recipe.loop.keep_best
        if not name or name not in figures:
            return False
        path = self.directory / "metrics.jsonl"
        before = [line[f"val_{name}"] for line in read(path) if f"val_{name}" in line] if path.exists() else []
        return all(figures[name] < value for value in before)

    def sheet_due(self, step: int) -> bool:
        """Whether a contact sheet is to be made at this step."""
        every = self.recipe.loop.sample_every
        return bool(every) and step % every == 0


def memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: allocated on a CUDA device, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB
