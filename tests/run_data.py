"""Manifests for tests of the loop and the output directory, run on the fake engine."""

from __future__ import annotations

import json
from pathlib import Path

from fake_engine import FakeEngine

from mmi_engine.data.manifest import Manifest
from mmi_engine.run import RunOptions, run
from mmi_engine.tasks import StoryTask


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def stories(count: int) -> list[dict]:
    return [{"id": f"s{n}", "frames": [{}, {"text": None}]} for n in range(count)]


def go(manifest: Path, out: Path, engine: FakeEngine | None = None, task: StoryTask | None = None, **options):
    return run(task or StoryTask(), Manifest(manifest), out, engine or FakeEngine(), RunOptions(**options))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
