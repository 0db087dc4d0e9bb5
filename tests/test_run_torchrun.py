"""Two real processes of torchrun, with gloo: the directory of one, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_data import FIXED, OPTIONS, go, make_data
from test_run_kill import tree

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def torchrun(processes: int, arguments: list[str], program: tuple[str, ...] = ("-m", "mmi_cli")):
    """The command under torchrun."""
    path = os.pathsep.join(str(REPOSITORY / name) for name in (".", "engine", "kernels"))
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *program]
    return subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_of_torchrun_give_the_bytes_of_one(data, tmp_path):
    """With a failing row: the launcher ends everyone when one process returns an error, so that one must wait."""
    command = "story"
    go(data, command, tmp_path / "one", "--batch-size", "2")
    fixed = ["--model", str(data / "model"), *FIXED, *OPTIONS[command], "--batch-size", "2"]
    done = torchrun(2, [command, str(data / f"{command}.jsonl"), "--out", str(tmp_path / "two"), *fixed])
    assert done.returncode == 1, "the launcher's own code for a process that returned 3"
    parts = json.loads((tmp_path / "two/run.json").read_text())["parts"]
    assert parts.keys() == {"1-of-1.0-of-2", "1-of-1.1-of-2"}, done.stderr  # the world really had two processes
    assert all(part["state"] == "finished" and part["new"] + part["failed"] == 2 for part in parts.values())
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@pytest.mark.parametrize("chosen", ["limit", "ids", "one"])
def test_two_processes_of_torchrun_share_a_selection(chosen, tmp_path):
    """On the fake engine: what `--limit` and `--ids` choose is chosen of the manifest, then dealt to the processes."""
    rows = [{"id": f"s{n}", "frames": [{"text": "A."}, {"text": None}]} for n in range(9)]
    lines = [json.dumps(row) for row in rows]
    lines.insert(2, "broken")
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    (tmp_path / "ids.txt").write_text("s7\ns1\ns4\nnobody\n")
    selection, failed = {
        "limit": (["--limit", "5"], 1),
        "ids": (["--ids", str(tmp_path / "ids.txt")], 0),
        "one": (["--limit", "1"], 0),  # nothing is left for the second process
    }[chosen]
    fake = str(REPOSITORY / "tests/fake_mmi.py")
    command = ["story", str(tmp_path / "m.jsonl"), *selection, "-q", "--out"]
    alone = subprocess.run([sys.executable, fake, *command, str(tmp_path / "one")], timeout=60)
    assert alone.returncode == (3 if failed else 0)
    done = torchrun(2, [*command, str(tmp_path / "two")], (fake,))
    assert done.returncode == (1 if failed else 0), done.stderr
    parts = json.loads((tmp_path / "two/run.json").read_text())["parts"]
    counts = {"limit": [2, 3], "ids": [1, 2], "one": [0, 1]}[chosen]
    assert sorted(part["new"] + part["failed"] for part in parts.values()) == counts
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
