"""What rows become and what failing models leave behind; with a fake engine in place of the model."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from fake_engine import FakeEngine
from PIL import Image
from run_data import go, lines, stories, write
from test_run_kill import tree

from mmi_engine.data.manifest import Manifest
from mmi_engine.errors import DeviceError, StoppedError
from mmi_engine.outdir import OutputDir
from mmi_engine.run import RunOptions, run
from mmi_engine.tasks import StoryTask

# -- what a row becomes ------------------------------------------------------------------------------------------------


def test_frames_say_what_was_given_and_what_was_made(tmp_path):
    Image.new("RGB", (64, 32), (10, 20, 30)).save(tmp_path / "a.png")
    frames = [{"text": "A.", "image": "a.png"}, {"text": "B."}, {"image": None, "text": None}, {}, {"text": " "}]
    manifest = write(tmp_path / "m.jsonl", {"id": "s", "frames": frames, "meta": {"k": [1]}, "seed": 9})
    go(manifest, tmp_path / "out")
    (row,) = lines(tmp_path / "out/results.jsonl")
    assert [frame["generated"] for frame in row["frames"]] == [[], ["image"], ["text", "image"], ["image"], ["image"]]
    assert ["text" in frame for frame in row["frames"]] == [True, True, True, False, False]
    assert row["frames"][1]["text"] == "B."
    assert (row["meta"], row["seed"], row["status"]) == ({"k": [1]}, 9, "ok")
    for number, frame in enumerate(row["frames"]):
        assert frame["image"] == f"s/{number:02d}.png"
        with Image.open(tmp_path / "out" / frame["image"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (16, 16))
    with Image.open(tmp_path / "out/s/00.png") as given:
        assert np.asarray(given)[8, 8].tolist() == [10, 20, 30]


def test_a_chat_gets_its_missing_turn(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = [{"type": "text", "text": "go on"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    manifest = write(
        tmp_path / "m.jsonl",
        {"id": "c", "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": content}]},
        {"id": "d", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
        {"id": "e", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "done"}]},
        {"id": "f", "messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        {"id": "g", "messages": []},
    )
    assert go(manifest, tmp_path / "out", task=StoryTask(free=2)).exit_code == 3
    first, second = lines(tmp_path / "out/results.jsonl")
    assert [message["role"] for message in first["messages"]] == ["system", "user", "assistant"]
    assert first["messages"][1]["content"][1] == {"type": "image", "image": "c/00.png"}
    assert [part["type"] for part in first["messages"][2]["content"]] == ["text", "image"] * 2
    assert [message["role"] for message in second["messages"]] == ["user", "assistant"]
    assert {row["error"] for row in lines(tmp_path / "out/errors.jsonl")} == {"bad_messages"}


def test_free_frames_follow_the_given_ones(tmp_path):
    manifest = write(tmp_path / "m.jsonl", {"id": "s", "frames": [{"text": "A."}]})
    go(manifest, tmp_path / "out", task=StoryTask(free=2))
    (row,) = lines(tmp_path / "out/results.jsonl")
    assert [frame["generated"] for frame in row["frames"]] == [["image"], ["text", "image"], ["text", "image"]]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({}, "no_frames"),
        ({"frames": []}, "no_frames"),
        ({"frames": "x"}, "bad_frames"),
        ({"frames": ["x"]}, "bad_frames"),
        ({"frames": [{"text": 3}]}, "bad_frames"),
        ({"frames": [{"image": 3}]}, "bad_frames"),
        ({"frames": [{"image": ""}]}, "bad_image"),
        ({"frames": [{"image": "no.png"}]}, "image_not_found"),
        ({"frames": [{"image": "http://x/y.png"}]}, "url_refused"),
        ({"frames": [{}] * 5000}, "bad_row"),
    ],
)
def test_broken_rows_have_stable_codes_and_the_others_are_done(tmp_path, row, code):
    good = {"id": "good", "frames": [{}]}
    manifest = write(tmp_path / "m.jsonl", {"id": "bad", **row}, good, "{not json\n", {"id": "good", "frames": [{}]})
    summary = go(manifest, tmp_path / "out")
    assert (summary.exit_code, summary.done, summary.failed) == (3, 1, 3)
    errors = lines(tmp_path / "out/errors.jsonl")
    assert [(error["line"], error["error"]) for error in errors] == [(1, code), (3, "bad_json"), (4, "duplicate_id")]
    assert [result["id"] for result in lines(tmp_path / "out/results.jsonl")] == ["good"]


# -- failing models ----------------------------------------------------------------------------------------------------


def test_a_failing_item_does_not_take_its_batch_down(tmp_path):
    def fail(job, count):
        bad = {"s1": ValueError("bad /home/me/x.py at 0x7f00aa"), "s2": FloatingPointError(), "s4": MemoryError()}
        return bad.get(job.row.id)

    manifest = write(tmp_path / "m.jsonl", *stories(6))
    engine = FakeEngine(batch_size=3, fail=fail)
    assert go(manifest, tmp_path / "out", engine).failed == 3
    go(manifest, tmp_path / "clean", FakeEngine(batch_size=3))
    clean = {row["id"]: row for row in lines(tmp_path / "clean/results.jsonl")}
    assert [row for row in lines(tmp_path / "out/results.jsonl") if "batch_reduced" not in row] == [clean["s0"]]
    reduced = [row["id"] for row in lines(tmp_path / "out/results.jsonl") if row.get("batch_reduced")]
    assert reduced == ["s3", "s5"]  # the neighbours of the item that ran out of memory, marked
    errors = lines(tmp_path / "out/errors.jsonl")
    assert [error["error"] for error in errors] == ["generation_failed", "not_finite", "out_of_memory"]
    assert "/home" not in errors[0]["message"] and "7f00aa" not in errors[0]["message"]


def test_a_fault_nobody_foresaw_while_reading_or_writing_is_that_rows_alone(tmp_path):
    class Odd(StoryTask):
        def read(self, row, loader):
            if row.id == "s1":
                raise ZeroDivisionError("reading")
            return super().read(row, loader)

        def output(self, job, filled, stem, image_size):
            if job.row.id == "s3":
                raise MemoryError
            return super().output(job, filled, stem, image_size)

    manifest = write(tmp_path / "m.jsonl", *stories(6))
    assert go(manifest, tmp_path / "out", task=Odd()).failed == 2
    errors = lines(tmp_path / "out/errors.jsonl")
    assert [(error["id"], error["error"]) for error in errors] == [("s1", "generation_failed"), ("s3", "out_of_memory")]
    assert [row["id"] for row in lines(tmp_path / "out/results.jsonl")] == ["s0", "s2", "s4", "s5"]


class OutOfMemoryError(RuntimeError):
    """As torch names it on a GPU."""


ON_A_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


FURTHER = [RuntimeError("std::bad_alloc"), RuntimeError("could not create a primitive")]


@pytest.mark.parametrize("error", [OutOfMemoryError(), ON_A_CPU, MemoryError(), *FURTHER])
def test_out_of_memory_reduces_only_the_failing_batch(error, tmp_path):
    manifest = write(tmp_path / "m.jsonl", *stories(8))
    engine = FakeEngine(batch_size=4, fail=lambda job, n: error if job.row.id == "s1" and n > 1 else None)
    assert go(manifest, tmp_path / "out", engine).exit_code == 0
    assert engine.batches == [(4, 4), (2, 2), (1, 1), (1, 1), (2, 2), (4, 4)]
    marked = [bool(row.get("batch_reduced")) for row in lines(tmp_path / "out/results.jsonl")]
    assert marked == [True] * 4 + [False] * 4


def test_what_failed_is_let_go_of_before_the_next_attempt(tmp_path):
    """Its tensors hang on the frames of the traceback: kept, they would take the memory that half the batch needs."""

    class Tensor:
        pass

    class Engine(FakeEngine):
        alive: weakref.ref | None = None
        seen: tuple = ()

        def fill(self, jobs, seeds, batch_size):
            self.seen += (self.alive is not None and self.alive() is not None,)
            if batch_size > 1:
                big = Tensor()
                self.alive = weakref.ref(big)
                raise MemoryError
            return super().fill(jobs, seeds, batch_size)

    engine = Engine(batch_size=4)
    assert go(write(tmp_path / "m.jsonl", *stories(4)), tmp_path / "out", engine).done == 4
    assert len(engine.seen) == 7 and not any(engine.seen)


def test_an_error_that_is_not_the_items_fault_ends_the_run(tmp_path):
    manifest = write(tmp_path / "m.jsonl", *stories(2))
    with pytest.raises(DeviceError):
        go(manifest, tmp_path / "out", FakeEngine(fail=lambda job, n: DeviceError("gone")))
    assert go(manifest, tmp_path / "out").exit_code == 0


def test_stop_on_the_first_error_and_go_on_later(tmp_path):
    manifest = write(
        tmp_path / "m.jsonl", *stories(2), "broken\n", *({"id": f"t{n}", "frames": [{}]} for n in range(9))
    )
    with pytest.raises(StoppedError, match="m.jsonl:3"):
        go(manifest, tmp_path / "out", stop_on_error=True)
    done = lines(tmp_path / "out/results.jsonl")
    assert len(done) <= 2
    page = (tmp_path / "out/index.html").read_text()
    assert all(f"{row['id']}/01.png" in page for row in done) and "t0/00.png" not in page
    assert go(manifest, tmp_path / "out").done == 11
    assert "t8/00.png" in (tmp_path / "out/index.html").read_text()


def test_a_gallery_that_cannot_be_written_does_not_hide_how_the_run_ended(tmp_path, monkeypatch):
    manifest = write(tmp_path / "m.jsonl", *stories(2), "broken\n")
    said, stopping = [], RunOptions(stop_on_error=True)
    reporter = SimpleNamespace(begin=lambda *_: None, item=lambda *_: None, notice=said.append)
    with monkeypatch.context() as patch:
        patch.setattr(OutputDir, "write_page", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StoppedError, match="m.jsonl:3"):
            run(StoryTask(), Manifest(manifest), tmp_path / "out", FakeEngine(), stopping, reporter=reporter)
    assert any(text.startswith("no gallery:") and "No space left" in text for text in said)
    assert go(manifest, tmp_path / "out").exit_code == 3 and (tmp_path / "out/index.html").exists()


def test_errors_are_kept_on_resume_and_retried_on_request(tmp_path):
    manifest = write(tmp_path / "m.jsonl", {"id": "s", "frames": [{"image": "late.png"}, {}]}, *stories(1))
    assert go(manifest, tmp_path / "out").failed == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "late.png")
    engine = FakeEngine()
    assert go(manifest, tmp_path / "out", engine).failed == 1
    assert engine.loads == 0  # nothing to do: the model stays on the disk
    assert go(manifest, tmp_path / "out", retry_errors=True).exit_code == 0
    go(manifest, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
