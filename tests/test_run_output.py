"""The output directory: shards, locks, refusals, retries, order, names; with a fake engine in place of the model."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeEngine
from PIL import Image
from test_run_kill import SCRIPT, tree

from mmi_engine.data.manifest import Manifest, item_seed
from mmi_engine.errors import DeviceError, OutputBusyError, OutputMismatchError, StoppedError, UsageError
from mmi_engine.locks import Part, PartLock, guard
from mmi_engine.names import Stems, safe_stem
from mmi_engine.run import RunOptions, run
from mmi_engine.tasks import StoryTask, VqaTask


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def stories(count: int) -> list[dict]:
    return [{"id": f"s{n}", "frames": [{}, {"text": None}]} for n in range(count)]


def go(manifest: Path, out: Path, engine: FakeEngine | None = None, task: StoryTask | None = None, **options):
    return run(task or StoryTask(), Manifest(manifest), out, engine or FakeEngine(), RunOptions(**options))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


@pytest.mark.parametrize("error", [OutOfMemoryError(), ON_A_CPU, MemoryError()])
def test_out_of_memory_reduces_only_the_failing_batch(error, tmp_path):
    manifest = write(tmp_path / "m.jsonl", *stories(8))
    engine = FakeEngine(batch_size=4, fail=lambda job, n: error if job.row.id == "s1" and n > 1 else None)
    assert go(manifest, tmp_path / "out", engine).exit_code == 0
    assert engine.batches == [(4, 4), (2, 2), (1, 1), (1, 1), (2, 2), (4, 4)]
    marked = [bool(row.get("batch_reduced")) for row in lines(tmp_path / "out/results.jsonl")]
    assert marked == [True] * 4 + [False] * 4


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
    assert len(lines(tmp_path / "out/results.jsonl")) <= 2
    assert go(manifest, tmp_path / "out").done == 11


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


# -- locks and refusals ------------------------------------------------------------------------------------------------


def test_overlapping_runs_are_refused_at_once_and_disjoint_ones_are_not(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, stop = context.Event(), context.Event()

    def hold():
        lock = PartLock(tmp_path, Part(1, 2))
        with guard(tmp_path):
            lock.acquire()
        ready.set()
        stop.wait(60)
        os._exit(0)  # without a release, as a killed process

    process = context.Process(target=hold)
    process.start()
    assert ready.wait(30)
    for part in (Part(), Part(1, 2), Part(1, 3), Part(1, 2, 0, 2)):
        with pytest.raises(OutputBusyError), guard(tmp_path):
            PartLock(tmp_path, part).acquire()
    other = PartLock(tmp_path, Part(2, 2))
    with guard(tmp_path):
        assert other.acquire() == ["1-of-2"]
    stop.set()
    process.join()
    with guard(tmp_path):
        other.release()
        again = PartLock(tmp_path, Part())
        assert again.acquire() == []  # the dead process's lock is no obstacle
        again.release()


def test_a_directory_of_another_run_is_refused_with_the_difference_named(tmp_path):
    manifest, out = write(tmp_path / "m.jsonl", *stories(2)), tmp_path / "out"
    go(manifest, out)
    before = tree(out)
    other = write(tmp_path / "other.jsonl", *stories(3))
    for attempt, difference in (
        (lambda: go(other, out), "manifest"),
        (lambda: go(manifest, out, seed=5), "seed was 0, now 5"),
        (lambda: go(manifest, out, FakeEngine(identity={"steps": 9})), "settings.steps was 3, now 9"),
        (lambda: go(manifest, out, FakeEngine(identity={"beams": 2})), "settings.beams"),
        (lambda: go(manifest, out, task=StoryTask(free=1)), "free"),
    ):
        with pytest.raises(OutputMismatchError, match=re.escape(difference)) as caught:
            attempt()
        assert caught.value.exit_code == 2
    assert tree(out) == before
    assert go(other, out, overwrite=True).done == 3
    go(other, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


def test_files_of_the_user_survive_and_unexplained_results_are_refused(tmp_path):
    manifest, out = write(tmp_path / "m.jsonl", *stories(1)), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    go(manifest, out)
    go(manifest, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "run.json").unlink()
    with pytest.raises(OutputMismatchError, match=r"no run\.json"):
        go(manifest, out)


def test_files_named_almost_like_a_runs_own_are_the_users(tmp_path):
    """Neither a merge nor --overwrite reads, cuts or removes them, nor the pictures that they name."""
    manifest, out = write(tmp_path / "m.jsonl", *stories(2)), tmp_path / "out"
    row = json.dumps({"id": "s0", "image": "mine.png"}) + "\nno end"
    names = ("results-backup.jsonl", "errors-old.jsonl", "results-4-of-2.jsonl", "results-1-of-1.jsonl")
    mine = {name: row.encode() for name in (*names, "results2.jsonl", "index-old.html", "mine.png")}
    out.mkdir()
    for name, content in mine.items():
        (out / name).write_bytes(content)
    for options in (
        {"part": Part(1, 2)},
        {"part": Part(2, 2)},
        {},
        {"overwrite": True},
        {"overwrite": True, "seed": 1},
    ):
        go(manifest, out, **options)
        assert {name: (out / name).read_bytes() for name in mine} == mine
    assert [row["id"] for row in lines(out / "results.jsonl")] == ["s0", "s1"]


def test_without_run_json_nothing_that_rows_name_is_removed(tmp_path):
    manifest, out = write(tmp_path / "m.jsonl", *stories(1)), tmp_path / "out"
    out.mkdir()
    write(out / "results.jsonl", {"id": "x", "image": "mine.png"})
    for name in ("mine.png", "index-2.html"):
        (out / name).write_text("mine")
    go(manifest, out, overwrite=True)
    assert [row["id"] for row in lines(out / "results.jsonl")] == ["s0"]
    assert {(out / name).read_text() for name in ("mine.png", "index-2.html")} == {"mine"}


def test_a_gallery_keeps_its_pictures_when_the_next_run_makes_none(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"id": f"s{n}", "image": "a.png", "question": "what?"} for n in range(2)]
    manifest, out = write(tmp_path / "m.jsonl", *rows), tmp_path / "out"
    go(manifest, out, task=VqaTask(), limit=1)
    shown = {name: content for name, content in tree(out).items() if name.startswith("index")}
    assert len(shown) == 3  # the page, the folder of small copies, and one of them
    go(manifest, out, task=VqaTask(), gallery=False)
    assert {name: content for name, content in tree(out).items() if name.startswith("index")} == shown


def test_moving_manifest_and_images_together_changes_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a/x.png")
    write(tmp_path / "a/m.jsonl", {"id": "s", "frames": [{"image": "x.png"}, {"image": "gone.png"}]})
    go(tmp_path / "a/m.jsonl", tmp_path / "out")
    before = tree(tmp_path / "out")
    (tmp_path / "a").rename(tmp_path / "b")
    assert go(tmp_path / "b/m.jsonl", tmp_path / "out").new == 0
    assert tree(tmp_path / "out") == before
    text = b"".join(content for content in before.values() if content)
    assert str(tmp_path).encode() not in text  # no absolute paths in results, errors or gallery


# -- names and seeds ---------------------------------------------------------------------------------------------------

HOSTILE = [
    "../../x", "/etc/passwd", "..", ".", "a/b", "a\\b", "nul\0l", "x" * 300, "😀", "é", "e\u0301", "a", "A", "a.", "a ",
    "CON", "con.png", "results.jsonl", "index.html", "index-2.html", "run.json", "errors-1-of-2.jsonl", ".mmi", "~",
    "-rf", "a\nb", "a%2fb", " ", "\u202e", "00.png", "a~b", "story one", "S-1", "s-1",
]  # fmt: skip


def test_hostile_ids_never_collide_nor_leave_the_directory(tmp_path):
    manifest = write(tmp_path / "m.jsonl", *({"id": name, "frames": [{}]} for name in HOSTILE))
    out = tmp_path / "deep" / "out"
    assert go(manifest, out).exit_code == 0
    rows = lines(out / "results.jsonl")
    assert [row["id"] for row in rows] == HOSTILE
    paths = [row["frames"][0]["image"] for row in rows]
    assert len({path.casefold() for path in paths}) == len(HOSTILE)
    for path in paths:
        assert (out / path).resolve().is_relative_to(out.resolve()) and (out / path).is_file()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(out)) == [
        "m.jsonl"
    ]
    pictures = {(out / path).read_bytes() for path in paths}
    assert len(pictures) == len(HOSTILE)  # every item has its own seed


def test_plain_ids_keep_their_names_and_all_others_are_safe():
    allowed = set(string.ascii_letters + string.digits + "._+=@ -~")
    stems = Stems()
    for name in HOSTILE:
        stems.add(name)
    for name in HOSTILE:
        stem = stems[name]
        assert set(stem) <= allowed and len(stem) <= 100 and stem[0] not in ".-" and stem[-1] not in ". "
    assert stems["a"] == "a" and stems["A"] != "A" and stems["A"].startswith("a~")
    assert [safe_stem(name) for name in ("a1", "COCO_val2014_42", "v1.2-x")] == ["a1", "COCO_val2014_42", "v1.2-x"]


def test_an_items_result_depends_on_seed_and_id_alone(tmp_path):
    many = write(tmp_path / "many.jsonl", *stories(5))
    one = write(tmp_path / "one.jsonl", stories(5)[3])
    go(many, tmp_path / "many", FakeEngine(batch_size=4))
    go(one, tmp_path / "one", FakeEngine(batch_size=1))
    assert lines(tmp_path / "many/results.jsonl")[3] == lines(tmp_path / "one/results.jsonl")[0]
    assert lines(tmp_path / "one/results.jsonl")[0]["seed"] == item_seed(0, "s3")
    go(one, tmp_path / "other", seed=1)
    assert (tmp_path / "other/s3/00.png").read_bytes() != (tmp_path / "one/s3/00.png").read_bytes()


def test_run_json_tells_settings_counts_and_timing(tmp_path):
    manifest = write(tmp_path / "m.jsonl", *stories(2), "broken\n")
    go(manifest, tmp_path / "out")
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["command"] == "story" and record["settings"]["steps"]["origin"] == "default"
    part = record["parts"]["1-of-1"]
    assert (part["state"], part["rows"], part["done"], part["failed"]) == ("finished", 3, 2, 1)
    assert part["seconds"] > 0 and part["peak_memory_mib"] > 0
