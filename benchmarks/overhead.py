"""What our own code costs per item: a manifest of many rows with tiny pictures, and a model that answers at once.

    python benchmarks/overhead.py [--rows 10000] [--task vqa|t2i] [--json]

Everything but the model is real: reading and decoding, batches, rows, media and small copies flushed to disk, the
gallery. ``vqa`` reads a picture per row, ``t2i`` writes one.
Memory is the resident size of the process, looked at between items; flat means that it does not grow with the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("engine", "kernels", ".")]

from PIL import Image  # noqa: E402

from mmi_engine.data.manifest import Manifest  # noqa: E402
from mmi_engine.probe import _status  # noqa: E402
from mmi_engine.run import RunOptions, run  # noqa: E402
from mmi_engine.tasks import Job, Piece, T2iTask, VqaTask  # noqa: E402

ANSWERS = {"text": "blue", "image": Image.effect_noise((32, 32), 50).convert("RGB")}


class InstantEngine:
    """The engine protocol without a model: every answer is the same word or picture."""

    undecided = False
    image_size = input_side = 32
    batch_size = at_once = 16

    def identity(self, rows: int, recorded: dict[str, Any], sample: Any = None) -> dict[str, Any]:
        """Nothing to choose."""
        return {"model": "instant", "settings": {"batch_size": self.batch_size}}

    def record(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {"settings": {}}

    def load(self) -> None:
        """Nothing to load."""

    def shape(self, job: Job) -> int:
        """All rows of this benchmark are alike."""
        return len(job.pieces)

    def fill(self, jobs: Sequence[Job], seeds: Sequence[int], batch_size: int) -> list[list[Piece]]:
        """An answer for each."""
        return [[*job.pieces[:-1], Piece(job.pieces[-1].kind, ANSWERS[job.pieces[-1].kind])] for job in jobs]


class Memory:
    """The run's reporter: notes the resident size as items are finished."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.count = 0

    def begin(self, total: int, done: int) -> None:
        """See `Reporter`."""

    def item(self, place: str, error: Any) -> None:
        """Every fiftieth item."""
        self.count += 1
        if self.count % 50 == 0:
            self.sizes.append(_status("VmRSS"))

    def notice(self, text: str) -> None:
        """See `Reporter`."""


def measure(rows: int, folder: Path, task: VqaTask | T2iTask) -> dict[str, float]:
    """Milliseconds per item and memory in MiB at the first tenth and at the end."""
    for number in range(10):
        Image.new("RGB", (16, 16), (number * 20, 0, 0)).save(folder / f"{number}.png")
    text = "question" if isinstance(task, VqaTask) else "prompt"
    lines = (
        json.dumps({"id": f"q{number:06d}", "image": f"{number % 10}.png", text: f"What is number {number}?"})
        for number in range(rows)
    )
    (folder / "m.jsonl").write_text("".join(line + "\n" for line in lines))
    memory = Memory()
    started, worked = time.perf_counter(), time.process_time()
    summary = run(task, Manifest(folder / "m.jsonl"), folder / "out", InstantEngine(), RunOptions(), reporter=memory)
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    assert summary.done == rows, summary
    early, late = memory.sizes[len(memory.sizes) // 10], max(memory.sizes)
    return {
        "rows": rows,
        "ms_per_item": round(seconds / rows * 1000, 3),
        "cpu_ms_per_item": round(worked / rows * 1000, 3),
        "memory_early_mib": round(early / 2**20, 1),
        "memory_peak_mib": round(late / 2**20, 1),
        "bytes_per_row": round((late - early) / (0.9 * rows)),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--task", choices=["vqa", "t2i"], default="vqa")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    task = VqaTask() if arguments.task == "vqa" else T2iTask()
    with tempfile.TemporaryDirectory() as folder:
        measure(200, Path(folder), task)  # imports and caches
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.rows, Path(folder), task)
    text = json.dumps(found) if arguments.json else "\n".join(f"{name:<18}{value}" for name, value in found.items())
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
