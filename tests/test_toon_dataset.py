"""The world on disk: manifests that the engine reads, with pictures and truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmi_engine.errors import UsageError
from mmi_engine.toon.dataset import MANIFESTS, TASKS, make_dataset, scenes_of
from mmi_engine.toon.draw import CLASSES, PALETTE, render, semantic_map
from mmi_engine.toon.texts import parse_text
from mmi_engine.toon.world import sample_story


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toon")
    counts = make_dataset(out, "test", 3, start=5)
    assert counts["stories.jsonl"] == counts["stories_full.jsonl"] == counts["captions.jsonl"] == 3
    assert counts["vqa.jsonl"] == 21
    return out


def test_every_named_picture_exists_and_nothing_is_left_half_written(folder: Path) -> None:
    for name in (*MANIFESTS.values(), "stories_full.jsonl"):
        ids = [row["id"] for row in _rows(folder / name)]
        assert len(ids) == len(set(ids)) > 0
        for row in _rows(folder / name):
            named = [row.get("image"), row.get("segmentation"), row["meta"].get("image"), row["meta"].get("labels")]
            named += [frame["image"] for frame in row.get("frames", [])]
            for path in filter(None, named):
                with Image.open(folder / path) as image:
                    assert image.size == (128, 128)
    assert not list(folder.rglob("*.partial"))


def test_stories_leave_the_later_frames_to_be_drawn(folder: Path) -> None:
    asked, full = _rows(folder / "stories.jsonl"), _rows(folder / "stories_full.jsonl")
    for index, (a, b) in enumerate(zip(asked, full, strict=True), 5):
        assert [frame["image"] is None for frame in a["frames"]] == [False, True, True, True, True]
        assert (
            [f["text"] for f in a["frames"]]
            == [f["text"] for f in b["frames"]]
            == list(sample_story(index, "test").texts)
        )
        for frame, scene in zip(b["frames"], scenes_of(b["meta"]), strict=True):
            assert np.array_equal(_pixels(folder / frame["image"]), np.asarray(render(scene)))


def test_maps_are_the_truth_in_palette_colours(folder: Path) -> None:
    for row in _rows(folder / "seg2img.jsonl"):
        labels = _pixels(folder / row["meta"]["labels"])
        (scene,) = scenes_of(row["meta"])
        assert np.array_equal(labels, semantic_map(scene))
        colors = _pixels(folder / row["segmentation"])
        assert np.array_equal(colors, np.array(PALETTE, dtype=np.uint8)[labels])
        assert labels.max() < len(CLASSES)


def test_texts_agree_with_the_truth(folder: Path) -> None:
    for row in _rows(folder / "captions.jsonl"):
        (scene,) = scenes_of(row["meta"])
        assert len(row["captions"]) == 3
        assert all(parse_text(text)["place"] == scene.place for text in row["captions"])
        assert parse_text(row["meta"]["detail"])["number"] == scene.number
    for row in _rows(folder / "ground.jsonl"):
        x1, y1, x2, y2 = row["box"]
        assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128


def test_equal_arguments_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path, "test", 3, start=5)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_tasks_can_be_chosen_and_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    counts = make_dataset(tmp_path, "val", 2, tasks=("vqa",), progress=lambda done, total: told.append((done, total)))
    assert list(counts) == ["vqa.jsonl"]
    assert told == [(1, 2), (2, 2)]
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(("split", "count", "tasks"), [("all", 1, TASKS), ("val", -1, TASKS), ("val", 1, ("sing",))])
def test_bad_requests_are_refused(tmp_path: Path, split: str, count: int, tasks: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        make_dataset(tmp_path, split, count, tasks=tasks)
