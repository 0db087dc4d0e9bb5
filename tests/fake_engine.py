"""A deterministic stand-in for the model, for tests of everything around it.

Pictures are a hash of the seed and of all that came before, so a test can tell a right seed or order from a wrong one.
Run as a script it is one `mmi story` with this engine, to be killed at will:

    python fake_engine.py MANIFEST OUT [--delay S] [--shard I/N] [--limit N] [--fail-on WORD]
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 16


class FakeEngine:
    """Engine protocol; `delay` seconds per image, `fail` decides which jobs raise, `log` keeps the batches."""

    image_size = input_side = SIDE
    undecided = False

    def __init__(self, batch_size: int = 2, delay: float = 0.0, fail=None, identity=None, answer=None) -> None:
        self.batch_size = batch_size
        self.delay = delay
        self.fail = fail or (lambda job, count: None)
        self.extra = identity or {}
        self.answer = answer  # what every missing text comes to, in place of a hash
        self.loads = 0
        self.batches: list[tuple[int, int]] = []

    def identity(self, rows, recorded, sample=None):
        return {"model": "fake", "settings": {"steps": 3, **self.extra}}

    def record(self):
        return {"settings": {"steps": {"value": 3, "origin": "default"}}}

    def load(self) -> None:
        self.loads += 1

    def shape(self, job):
        return tuple((piece.kind, piece.value is None) for piece in job.pieces)

    @property
    def at_once(self) -> int:
        return self.batch_size

    def fill(self, jobs: Sequence, seeds: Sequence[int], batch_size: int):
        self.batches.append((len(jobs), batch_size))
        for job in jobs:
            error = self.fail(job, len(jobs))
            if error is not None:
                raise error
        return [self._one(job, seed) for job, seed in zip(jobs, seeds, strict=True)]

    def _one(self, job, seed: int):
        from mmi_engine.tasks import Piece

        filled = self._made(job, seed)
        for number in range(1, job.candidates):
            filled.append(self._made(job, seed + number)[-1])
        if job.candidates > 1 and job.rank is not None:
            first = len(filled) - job.candidates
            ranked = enumerate(filled[first:])
            filled[first:] = [Piece("image", made.value, scores=(-abs(k - 1.0),)) for k, made in ranked]
        return filled

    def _made(self, job, seed: int):
        from mmi_engine.tasks import Piece

        digest = hashlib.sha256(str(seed).encode())
        filled = []
        pieces = list(job.pieces)
        for _ in range(job.free):
            pieces += [Piece("text"), Piece("image")]
        for piece in pieces:
            value, scores = piece.value, ()
            if value is None and piece.options:
                scores = tuple(-float(digest.digest()[k % 32]) for k in range(len(piece.options)))
                value = piece.options[scores.index(max(scores))]
            elif value is None and self.answer is not None and piece.kind == "text":
                value = self.answer
            elif value is None and piece.kind == "text":
                value = f"made {digest.hexdigest()[:6]}"
            elif value is None:
                time.sleep(self.delay)
                block = np.frombuffer((digest.digest() * 24)[: SIDE * SIDE * 3], np.uint8)
                value = Image.fromarray(block.reshape(SIDE, SIDE, 3).copy())
            digest.update(value.encode() if piece.kind == "text" else value.tobytes())
            filled.append(Piece(piece.kind, value, scores=scores))
        return filled


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("manifest")
    parser.add_argument("out")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--shard", default="1/1")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--world", default="0/1")
    arguments = parser.parse_args()
    from mmi_engine.data.manifest import Manifest
    from mmi_engine.errors import MMIError
    from mmi_engine.locks import Part
    from mmi_engine.run import RunOptions, run
    from mmi_engine.tasks import StoryTask

    rank, world = map(int, arguments.world.split("/"))
    options = RunOptions(part=Part.parse(arguments.shard, rank=rank, world=world), limit=arguments.limit)
    try:
        summary = run(
            StoryTask(), Manifest(arguments.manifest), Path(arguments.out), FakeEngine(delay=arguments.delay), options
        )
    except MMIError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return error.exit_code
    return summary.exit_code


if __name__ == "__main__":
    for folder in ("engine", "kernels", "."):
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / folder))
    sys.exit(main())
