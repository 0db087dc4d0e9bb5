"""Shards, limits, ids and launched processes end in the same directory; with a fake engine in place of the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from fake_engine import FakeEngine
from run_data import go, lines, stories, write
from test_run_kill import SCRIPT, tree

from mmi_engine.errors import OutputMismatchError, UsageError
from mmi_engine.locks import Part

# -- parts of a manifest -----------------------------------------------------------------------------------------------


def test_shards_limits_and_ids_in_any_order_end_in_the_same_bytes(tmp_path):
    manifest = write(tmp_path / "m.jsonl", *stories(9), "broken\n", {"id": "s3", "frames": [{}]}, *stories(0))
    go(manifest, tmp_path / "whole")
    out = tmp_path / "parts"
    go(manifest, out, limit=2)
    assert [row["id"] for row in lines(out / "results.jsonl")] == ["s0", "s1"]
    go(manifest, out, ids=frozenset({"s7", "s4", "nobody"}))
    assert [row["id"] for row in lines(out / "results.jsonl")] == ["s0", "s1", "s4", "s7"]
    for shard in (3, 1, 2):
        summary = go(manifest, out, part=Part(shard, 3))
        assert summary.merged == (shard == 2)
    assert tree(out) == tree(tmp_path / "whole")
    again = go(manifest, out, part=Part(1, 3))  # a merge can be repeated
    assert again.new == 0 and again.merged
    assert tree(out) == tree(tmp_path / "whole")
    go(manifest, out, part=Part(2, 3), overwrite=True)
    assert tree(out) == tree(tmp_path / "whole")


class Auto(FakeEngine):
    """Leaves its number of threads to ``auto``: the recorded one, or that of this machine."""

    def __init__(self, cores: int) -> None:
        super().__init__()
        self.cores = cores

    def identity(self, rows, recorded, sample=None):
        threads = recorded.get("settings", {}).get("threads", self.cores)
        return {"model": "fake", "settings": {"threads": threads}}


def test_overwriting_a_shard_elsewhere_keeps_the_others(tmp_path):
    """What another machine would choose by itself is no other run; with other inputs it chooses for itself."""
    manifest, out = write(tmp_path / "m.jsonl", *stories(9)), tmp_path / "out"
    go(manifest, out, Auto(2), part=Part(1, 3))
    kept = (out / "results-1-of-3.jsonl").read_bytes()
    for _ in range(2):
        assert not go(manifest, out, Auto(8), part=Part(2, 3), overwrite=True).merged
        assert (out / "results-1-of-3.jsonl").read_bytes() == kept
    assert go(manifest, out, Auto(8), part=Part(3, 3), overwrite=True).merged
    go(manifest, out, Auto(8), part=Part(2, 3), overwrite=True, seed=1)
    assert json.loads((out / "run.json").read_text())["identity"]["settings"] == {"threads": 8}
    assert not (out / "results.jsonl").exists()


class Machine(FakeEngine):
    """A machine whose ``auto`` comes to this device; `named` is what the user asked for."""

    def __init__(self, device: str, named: bool = False) -> None:
        super().__init__()
        self.device, self.named = device, named

    def identity(self, rows, recorded, sample=None):
        return {"model": "fake", "settings": {"device": self.device, "steps": 3}}

    def record(self):
        origin = "command line" if self.named else "default"
        return {"settings": {"device": {"value": self.device, "origin": origin}}}


def test_auto_that_comes_to_another_device_does_not_wipe_the_other_parts(tmp_path):
    manifest, out = write(tmp_path / "m.jsonl", *stories(9)), tmp_path / "out"
    go(manifest, out, Machine("cuda"), part=Part(1, 3))
    before = tree(out)
    with pytest.raises(OutputMismatchError, match=r"device was .*cuda.*--device cpu"):
        go(manifest, out, Machine("cpu"), part=Part(2, 3), overwrite=True)
    assert tree(out) == before
    go(manifest, out, Machine("cpu", named=True), part=Part(2, 3), overwrite=True)  # who names it means it
    assert not (out / "results-1-of-3.jsonl").exists()
    go(manifest, out, Machine("cuda"), overwrite=True)  # and the whole is always made anew
    assert json.loads((out / "run.json").read_text())["identity"]["settings"]["device"] == "cuda"


def test_launched_processes_share_a_shard_evenly(tmp_path):
    manifest = write(tmp_path / "m.jsonl", *stories(10))
    counts = [go(manifest, tmp_path / "out", part=Part(1, 1, rank, 3)).new for rank in range(3)]
    assert sorted(counts) == [3, 3, 4]
    go(manifest, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("chosen", [{"limit": 5}, {"ids": frozenset({"s1", "s4", "s8"})}, {"ids": frozenset({"s2"})}])
def test_launched_processes_leave_what_one_would_of_a_selection(chosen, tmp_path):
    manifest = write(tmp_path / "m.jsonl", *stories(3), "broken\n", *stories(10)[3:])
    go(manifest, tmp_path / "one", **chosen)
    merged = [go(manifest, tmp_path / "out", part=Part(1, 1, rank, 2), **chosen).merged for rank in (0, 1)]
    assert merged[-1] and tree(tmp_path / "out") == tree(tmp_path / "one")
    for options in ({"part": Part(1, 1, 0, 2)}, {"part": Part(1, 1, 1, 2)}):  # and all the rest later
        go(manifest, tmp_path / "out", **options)
    go(manifest, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_shards_at_the_same_time_in_processes_of_their_own(tmp_path):
    manifest = write(tmp_path / "m.jsonl", *stories(12), "broken\n")
    go(manifest, tmp_path / "whole")
    command = [sys.executable, str(SCRIPT), str(manifest), str(tmp_path / "out"), "--delay", "0.02", "--shard"]
    processes = [subprocess.Popen([*command, f"{shard}/3"]) for shard in (1, 2, 3)]
    assert {process.wait(timeout=60) for process in processes} <= {0, 3}
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_every_id_belongs_to_exactly_one_shard():
    for item in ("", "a", "é", "x" * 500, *map(str, range(50))):
        assert sum(Part(shard, 7).owns_id(item) for shard in range(1, 8)) == 1
    for text in ("0/4", "5/4", "x", "1/0", "1", "-1/2", "1/2/3"):
        with pytest.raises(UsageError):
            Part.parse(text)
