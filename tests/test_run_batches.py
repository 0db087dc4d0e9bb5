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
from mmi_engine.batches import buckets
from mmi_engine.choices import Choices
from mmi_engine.engine import ModelEngine
from mmi_engine.errors import DeviceError, RowError
from mmi_engine.generate.interleave import Maker
from mmi_engine.pieces import Piece
from mmi_engine.probe import choose, together
from mmi_engine.tasks import Job


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_batch_sizes_give_the_same_tokens_and_pixels_within_one_level(command, data, tmp_path):
    runs = {size: go(data, command, tmp_path / size, "--batch-size", size) for size in ("1", "3", "8")}
    errors = {size: (tmp_path / size / "errors.jsonl").read_text() for size in runs}
    assert command != "ground" or errors["1"].count('the model wrote \\"') == 3  # no boxes: these are its tokens
    for size in ("3", "8"):
        assert errors[size] == errors["1"]
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


@pytest.mark.parametrize(
    ("free", "each", "unit", "bound", "expected"),
    [
        (1000, 10, 8, 8, 8),  # one row at a time, or all eight threads' worth
        (1000, 100, 8, 8, 1),
        (1000, 10, 6, 16, 12),  # multiples of the threads alone
        (1000, 40, 6, 24, 12),  # 24 × 40 would be too much
        (1000, 10, 8, 7, 1),  # fewer rows than threads: each by itself
        (1000, 10, 1, 7, 7),
    ],
)
def test_on_a_cpu_the_size_is_a_multiple_of_the_threads(free, each, unit, bound, expected):
    """Fewer rows than threads are computed one by one, so only a multiple shows what an item costs."""
    memory = Memory(free, 0, each)

    def run(size: int) -> None:
        memory.run(together(size, unit))

    assert choose(run, bound, memory, unit=unit) == expected


def test_auto_has_at_least_as_many_rows_as_threads_and_says_how_many_are_computed_together(data):
    fixed = {"model": str(data / "model"), "device": "cpu", "kernel": "torch"}
    for threads, rows, expected in ((2, 100, 4), (6, 100, 6), (64, 100, 64), (8, 100, 8), (3, 100, 3), (8, 5, 1)):
        engine = ModelEngine(Choices(**fixed, threads=threads))
        engine.identity(rows, {})
        assert engine.batch_size == together(engine.batch_size, threads) == expected
    for size, computed in ((4, 1), (20, 16), (8, 8)):
        said: list[str] = []
        engine = ModelEngine(Choices(**fixed, threads=8, batch_size=size), said.append)
        engine.identity(100, {})
        assert engine.record()["settings"]["rows_together"]["value"] == computed
        threads = torch.get_num_threads()
        try:
            engine.load()
            assert Maker(engine._model, engine._settings, size).batch_size == computed  # what is really done
        finally:
            torch.set_num_threads(threads)
        assert (f"batch size {size}, {computed} computed at a time" in said[0]) == (computed != size)


def test_what_auto_came_to_is_taken_over_by_other_parts_where_it_can_be(data, monkeypatch):
    def settings(recorded: dict, **named) -> dict:
        engine = ModelEngine(Choices(str(data / "model"), **named))
        return engine.identity(9, {"settings": recorded} if recorded else {}, None)["settings"]

    first = settings({}, device="cpu", dtype="bf16", kernel="torch", threads=3, batch_size=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # another machine, with devices and other choices
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert settings(first) == first
    assert settings(first, dtype="fp32")["dtype"] == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    moved = settings({**first, "device": "cuda", "dtype": "fp16", "kernel": "cuda"})
    assert (moved["device"], moved["dtype"]) == ("cpu", "fp32")  # what is not here is not pretended


def test_a_fault_of_the_first_item_is_none_of_the_probes(data, monkeypatch):
    engine = ModelEngine(Choices(str(data / "model"), "cpu", kernel="torch", threads=1))
    job = Job(None, [Piece("text", "x"), Piece("image")])
    errors: list[Exception] = [ZeroDivisionError("nobody foresaw it"), RowError("x"), FloatingPointError()]

    def fail(*arguments):
        raise errors[-1]

    monkeypatch.setattr(engine, "load", lambda: None)
    monkeypatch.setattr(engine, "fill", fail)
    while errors:
        engine.identity(100, {}, lambda: job)
        assert engine.batch_size == 4
        errors.pop()
    errors.append(MemoryError())
    engine.identity(100, {}, lambda: job)
    assert engine.batch_size == 1
    errors.append(DeviceError("gone"))
    with pytest.raises(DeviceError):
        engine.identity(100, {}, lambda: job)


def test_what_waits_for_a_batch_is_bounded_in_bytes():
    """Originals that are kept to be drawn on are large; a bucket that is not full is then worked on as it is."""
    picture = Image.new("RGB", (100, 10))

    def job(kept: int) -> Job:
        return Job(None, [Piece("image", picture), Piece("text")], kept=(picture,) * kept)

    assert job(0).weight == 3000 and job(2).weight == 9000
    jobs = [(job(1), index % 4) for index in range(12)]
    assert [len(batch) for batch in buckets(jobs, 3)] == [3, 3, 3, 3]
    held: list[int] = []

    def noted():
        for number, pair in enumerate(jobs, 1):
            held.append(number)
            yield pair

    done = 0
    for batch in buckets(noted(), 3, most=30_000):
        assert 6000 * (len(held) - done) <= 30_000
        done += len(batch)
    assert done == 12


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
