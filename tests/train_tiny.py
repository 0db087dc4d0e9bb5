"""A training task of a few numbers, for the tests of the loop; run as a script it trains in a process of its own.

python tests/train_tiny.py DIRECTORY STEPS SLEEP [resume] [exact]      (exact: no dropout)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmi_engine.train.loop import Loop
from mmi_engine.train.recipe import Recipe
from mmi_engine.train.sections import LoopConfig, OptimConfig


class Regression(nn.Module):
    """A regression with dropout, so that a wrong state of the random generator shows in the weights."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch ``[N, 5]``: four inputs and the target."""
        error = self.body(batch[:, :4]).squeeze(1) - batch[:, 4]
        loss = (error**2).mean()
        return loss, {"error": error.detach().abs().mean()}


class TinyTask:
    """Implements :class:`mmi_engine.train.task.Task`; batch ``poisoned`` holds a NaN."""

    def __init__(self, seed: int = 0, sleep: float = 0.0, poisoned: int = -1, dropout: float = 0.3) -> None:
        torch.manual_seed(seed)
        self.module: nn.Module = Regression(dropout)
        self.seed, self.sleep, self.poisoned = seed, sleep, poisoned
        self.asked: list[int] = []

    def batch(self, index: int) -> Tensor:
        time.sleep(self.sleep)
        self.asked.append(index)
        batch = torch.from_numpy(np.random.default_rng((self.seed, index)).standard_normal((6, 5), dtype=np.float32))
        if index == self.poisoned:
            batch[2, 0] = float("nan")
        return batch

    def to_device(self, batch: Tensor, device: Any) -> Tensor:
        return batch.to(device)

    def ids(self, batch: Tensor) -> list[str]:
        return [f"row-{float(row[4]):.4f}" for row in batch]

    def size(self, batch: Tensor) -> int:
        return len(batch)

    def evaluate(self, samples: int) -> dict[str, float]:
        weight = next(self.module.parameters())
        return {"norm": float(weight.detach().norm())}

    def preview(self, path: Path) -> None:
        path.write_bytes(b"preview")

    def export(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(self.module.state_dict(), directory / "weights.pt")


def recipe(steps: int, **loop: Any) -> Recipe:
    """A recipe for the tiny task."""
    numbers = {"checkpoint_steps": 5, "checkpoint_minutes": 1e9, "log_every": 1, "eval_every": 10, "ema": 0.9, **loop}
    return Recipe(
        task="vae",
        seed=3,
        optim=OptimConfig(lr=0.05, warmup=4, clip=0.5, weight_decay=0.1),
        loop=LoopConfig(steps=steps, **numbers),
    )


def main() -> None:
    """Train as the command line says."""
    directory, steps, sleep = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    directory.mkdir(parents=True, exist_ok=True)
    task = TinyTask(sleep=sleep, dropout=0.0 if "exact" in sys.argv else 0.3)
    loop = Loop(recipe(steps), task, directory)
    (directory / f"world-{loop.accelerator.process_index}").write_text(str(loop.accelerator.num_processes))
    loop.run(resume="resume" in sys.argv[4:])


if __name__ == "__main__":
    main()
