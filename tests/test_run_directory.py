"""The output directory: locks, refusals, files of the user, names, seeds; with a fake engine in place of the model."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import string

import pytest
from fake_engine import FakeEngine
from PIL import Image
from run_data import go, lines, stories, write
from test_run_kill import tree

from mmi_engine.data.manifest import item_seed
from mmi_engine.errors import OutputBusyError, OutputMismatchError
from mmi_engine.locks import Part, PartLock, guard, settle
from mmi_engine.names import Stems, safe_stem
from mmi_engine.rows import differences
from mmi_engine.tasks import StoryTask, VqaTask

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


def test_a_kill_while_auto_is_settled_leaves_no_trace(tmp_path):
    manifest, out, plain = write(tmp_path / "m.jsonl", *stories(2)), tmp_path / "out", tmp_path / "plain"
    go(manifest, plain)
    (out / ".mmi").mkdir(parents=True)
    (out / ".mmi" / "settle").touch()  # what a process killed in `settle` leaves
    go(manifest, out)  # with a size that needs no settling
    assert tree(out) == tree(plain) and not (out / ".mmi").exists()


def test_settling_goes_on_while_a_part_is_taken(tmp_path):
    with settle(tmp_path):
        lock = PartLock(tmp_path, Part())
        with guard(tmp_path):
            assert lock.acquire() == []
            assert (tmp_path / ".mmi" / "settle").exists()  # it is held, and stays
            lock.release()
    with guard(tmp_path):
        assert [path.name for path in (tmp_path / ".mmi").iterdir()] == ["guard"]
    assert not (tmp_path / ".mmi").exists()


@pytest.mark.parametrize("stranger", ["index.html", "s1/00.png"])
def test_a_file_of_the_user_is_never_replaced(tmp_path, stranger):
    """Nor by the same command again, nor by another part, nor with --overwrite."""
    manifest, out = write(tmp_path / "m.jsonl", *stories(2)), tmp_path / "out"
    mine = out / stranger
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    for options in ({}, {}, {"part": Part(1, 2)}, {"part": Part(2, 2)}, {"overwrite": stranger != "index.html"}):
        with contextlib.suppress(OutputMismatchError):  # the parts that do not own the item need not notice
            go(manifest, out, **options)
            assert options.get("part"), "not noticed"
        assert mine.read_bytes() == b"mine"
    mine.rename(tmp_path / "mine")
    go(manifest, out, overwrite=True)
    go(manifest, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_long_difference_is_shown_where_it_is():
    before, after = ("Answer the question in " + how + " words please, and nothing else." for how in ("short", "long"))
    [told] = differences({"template": before}, {"template": after})
    assert "short" in told and "long" in told
