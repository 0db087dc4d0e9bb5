"""kill -9 at any moment, run again: the directory ends byte-identical to an undisturbed run (run.json excepted)."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from PIL import Image

from mmi_engine.data.manifest import Manifest
from mmi_engine.locks import Part
from mmi_engine.run import RunOptions, run
from mmi_engine.tasks import GroundTask, StoryTask

# what the operating system is asked to do, as seen by Python's audit hooks; killing before each covers every state
EVENTS = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir", "shutil.rmtree"}
SCRIPT = Path(__file__).with_name("fake_engine.py")


def tree(directory: Path) -> dict[str, bytes | None]:
    """Everything in a directory by relative path; None for folders; without run.json."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
        if path.name != "run.json"
    }


@pytest.fixture
def manifest(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(
        os, "fsync", lambda handle: None
    )  # matters for a power cut, not for a kill; costs most of the time
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (20, 10), (1, 2, 3)).save(folder / "a.png")
    rows = [
        {"id": "one", "frames": [{"text": "x", "image": "a.png"}, {"text": None}]},
        {"id": "lost", "frames": [{"image": "missing.png"}]},
        {"id": "two", "frames": [{}]},
        {"id": "given", "frames": [{"image": "a.png"}]},
    ]
    path = folder / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\nbroken\n")
    run(StoryTask(), Manifest(path), tmp_path / "warm", FakeEngine(), RunOptions())  # imports, once for all children
    return path


def forked(out: Path, manifest: Path, options: RunOptions, kill_at: int | None = None, task=None) -> int:
    """One run in a child process that kills itself before its `kill_at`-th change to the disk; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            if kill_at is not None:
                seen = itertools.count()

                def hook(event: str, args: tuple) -> None:
                    if event in EVENTS and next(seen) == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(hook)
            engine = FakeEngine(answer="(100,100)(500,500)" if task else None)
            summary = run(task or StoryTask(), Manifest(manifest), out, engine, options)
            os._exit(summary.exit_code)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_before_every_single_disk_operation_and_resumed(tmp_path, manifest):
    reference = tmp_path / "reference"
    assert forked(reference, manifest, RunOptions()) == 3
    expected = tree(reference)
    assert {"results.jsonl", "errors.jsonl", "index.html", "one/00.png", "one/01.png"} <= expected.keys()
    killed = 0
    for moment in itertools.count():
        out = tmp_path / f"out{moment}"
        status = forked(out, manifest, RunOptions(), kill_at=moment)
        if status == 3:
            break
        assert status == -signal.SIGKILL
        killed += 1
        assert forked(out, manifest, RunOptions()) == 3
        assert tree(out) == expected, f"killed before operation {moment}"
    assert killed > 60  # the run really does this much; a hook that never fires would prove nothing


def test_killed_while_drawing_boxes_with_small_copies_of_inputs(tmp_path, manifest):
    """Small copies lie beside rows and media and are swept at the end; a kill between any two must not show."""
    rows = [{"id": name, "image": "a.png", "expression": "it"} for name in ("one", "two/three")]
    manifest.write_text("\n".join(map(json.dumps, [*rows, {"id": "lost", "image": "gone.png"}])) + "\n")
    reference = tmp_path / "reference"
    task = GroundTask(draw=True)
    assert forked(reference, manifest, RunOptions(), task=task) == 3
    expected = tree(reference)
    assert sum(name.startswith("index_files/") for name in expected) == 2 and "one.png" in expected
    killed = 0
    for moment in itertools.count():
        out = tmp_path / f"out{moment}"
        if forked(out, manifest, RunOptions(), kill_at=moment, task=task) == 3:
            break
        killed += 1
        assert forked(out, manifest, RunOptions(), task=task) == 3
        assert tree(out) == expected, f"killed before operation {moment}"
    assert killed > 40


def test_killed_again_and_again_with_shards_in_any_order(tmp_path, manifest):
    reference = tmp_path / "reference"
    assert forked(reference, manifest, RunOptions()) == 3
    expected = tree(reference)
    rng = random.Random(5)
    for trial in range(6):
        out = tmp_path / f"out{trial}"
        parts = [RunOptions(part=Part(shard, 3)) for shard in (1, 2, 3)]
        for _ in range(8):
            forked(out, manifest, rng.choice(parts), kill_at=rng.randrange(70))
        statuses = [forked(out, manifest, part) for part in rng.sample(parts, 3)]
        assert set(statuses) <= {0, 3}
        assert tree(out) == expected


def test_overwriting_after_a_kill_leaves_nothing_of_the_former_run(tmp_path, manifest):
    other = manifest.with_name("other.jsonl")
    other.write_text('{"id": "z", "frames": [{}]}\n')
    reference = tmp_path / "reference"
    assert forked(reference, other, RunOptions()) == 0
    for moment in range(5, 100, 9):
        out = tmp_path / f"out{moment}"
        forked(out, manifest, RunOptions(), kill_at=moment)
        assert forked(out, other, RunOptions(overwrite=True)) == 0
        assert tree(out) == tree(reference)


def test_a_last_line_torn_by_a_crash_is_cut_off(tmp_path, manifest):
    reference = tmp_path / "reference"
    forked(reference, manifest, RunOptions())
    whole = (reference / "results.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (first + 1, first + 30, len(whole) - 1):
        out = tmp_path / f"out{cut}"
        forked(out, manifest, RunOptions())
        (out / "results.jsonl").write_bytes(whole[:cut])
        assert forked(out, manifest, RunOptions()) == 3
        assert tree(out) == tree(reference)


def test_a_process_killed_from_outside_at_random_times(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"id": f"s{n}", "frames": [{}, {"text": None}]}) + "\n" for n in range(12)))
    command = [sys.executable, str(SCRIPT), str(path)]
    reference, out = tmp_path / "reference", tmp_path / "out"
    subprocess.run([*command, str(reference)], check=True)
    rng = random.Random(1)
    for _ in range(4):
        process = subprocess.Popen([*command, str(out), "--delay", "0.03"])
        deadline = time.monotonic() + 30
        while not (out / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.wait()
    subprocess.run([*command, str(out)], check=True)
    subprocess.run(["diff", "-r", "--exclude=run.json", str(reference), str(out)], check=True)
