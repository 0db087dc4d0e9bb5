"""Batch sizes: the same tokens whatever they are, and how `auto` comes to one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_data import FIXED, OPTIONS, go, make_data
from PIL import Image
from test_run_kill import tree

from mmi_cli.main import main
from mmi_engine.probe import choose


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("command", ["caption", "vqa", "t2i", "story"])
def test_batch_sizes_give_the_same_tokens_and_pixels_within_one_level(command, data, tmp_path):
    runs = {size: go(data, command, tmp_path / size, "--batch-size", size) for size in ("1", "3", "8")}
    for size in ("3", "8"):
        for name, row in runs["1"].items():
            one, many = dict(row), dict(runs[size][name])
            assert np.allclose(one.pop("scores", 0), many.pop("scores", 0), atol=1e-3)
            assert one == many
        for path in (tmp_path / "1").rglob("*.png"):
            pair = (path, tmp_path / size / path.relative_to(tmp_path / "1"))
            first, second = (np.asarray(Image.open(one)).astype(int) for one in pair)
            assert np.abs(first - second).max() <= 1


def test_auto_tries_the_first_item_and_the_size_is_kept(data, tmp_path, capsys):
    out = tmp_path / "auto"
    fixed = ["--model", str(data / "model"), *FIXED, *OPTIONS["caption"]]
    command = ["caption", str(data / "caption.jsonl"), "--out", str(out), *fixed]
    assert main([*command, "--limit", "1"]) == 0
    assert "batch size 4 (auto" in capsys.readouterr().err
    size = json.loads((out / "run.json").read_text())["identity"]["settings"]["batch_size"]
    assert main(command) == 3
    assert "(auto" not in capsys.readouterr().err  # resumed: taken over, not tried again
    assert json.loads((out / "run.json").read_text())["identity"]["settings"]["batch_size"] == size == 4
    go(data, "caption", tmp_path / "named", "--batch-size", "4")
    assert tree(out) == tree(tmp_path / "named")


# -- the size that fits ------------------------------------------------------------------------------------------------


class Memory:
    """A device with `free` bytes on which an item takes `each` and everything else `base`."""

    def __init__(self, free: int, base: int, each: int, error: Exception | None = None) -> None:
        self.error = error or MemoryError()
        self._free, self.base, self.each, self.rows = free, base, each, 0

    def run(self, rows: int) -> None:
        if self.base + rows * self.each > self._free:
            raise self.error
        self.rows = rows

    def used(self, work) -> int:
        work()
        return self.base + self.rows * self.each

    def free(self) -> int:
        return self._free


@pytest.mark.parametrize(
    ("free", "base", "each", "bound", "expected"),
    [
        (1000, 0, 1, 16, 16),
        (1000, 100, 100, 16, 4),  # 100 + 4 × 100 ≤ 600 < 100 + 8 × 100
        (1000, 0, 300, 16, 2),
        (1000, 0, 900, 16, 1),  # two do not fit at all
        (1000, 0, 0, 6, 6),
        (1000, 2000, 1, 16, 1),  # not even one: the run itself will say so
        (1000, 10, 10, 1, 1),
    ],
)
def test_the_batch_size_is_the_largest_that_leaves_room(free, base, each, bound, expected):
    memory = Memory(free, base, each)
    assert choose(memory.run, bound, memory) == expected


def test_memory_that_torch_cannot_have_on_a_cpu_is_no_fault_of_the_probe():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    memory = Memory(1000, 0, 900, caught.value)
    assert choose(memory.run, 16, memory) == 1


@pytest.mark.parametrize("command", ["story", "t2i"])
def test_auto_tries_stories_and_candidates_by_their_last_piece(command, data, tmp_path, capsys):
    """Whatever is tried first, the results are those of the size that is taken."""
    fixed = ["--model", str(data / "model"), *FIXED, *OPTIONS[command]]
    assert main([command, str(data / f"{command}.jsonl"), "--out", str(tmp_path / "auto"), *fixed]) == 3
    assert "batch size 4 (auto" in capsys.readouterr().err
    go(data, command, tmp_path / "named", "--batch-size", "4")
    assert tree(tmp_path / "auto") == tree(tmp_path / "named")
