"""The world as other people's data sets hold it: the truth stays, what is said of it changes, splits keep apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmi_engine.errors import ConfigError
from mmi_engine.toon.dataset import make_dataset, scenes_of
from mmi_engine.toon.world import split_of
from mmi_engine.train import sources, toon_styles
from mmi_engine.train.recipe import resolve
from mmi_engine.train.sections import DataConfig

QUIET = lambda done, total: None  # noqa: E731


def rows(folder: Path, style: str, name: str, split: str = "val", count: int = 3) -> list[dict[str, Any]]:
    toon_styles.write(folder, style, split, count, QUIET)
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def test_notes_and_phrases_say_what_the_world_says(tmp_path: Path) -> None:
    make_dataset(tmp_path / "plain", "val", 3, tasks=("caption", "vqa"))
    plain = [json.loads(x) for x in (tmp_path / "plain" / "vqa.jsonl").read_text(encoding="utf-8").splitlines()]
    said = rows(tmp_path / "phrases", "phrases", "phrases.jsonl")
    assert [r["question"] for r in said] == [r["question"] for r in plain]
    for ours, theirs in zip(said, plain, strict=True):
        answer = theirs["answers"][0]
        assert answer in ours["answers"][0] and (ours["answers"][0] != answer or answer in ("yes", "no"))
    for row in rows(tmp_path / "notes", "notes", "notes.jsonl"):
        scene, note = scenes_of(row["meta"])[0], row["captions"][0]
        assert all(f"{p.color} {p.kind}" in note for p in scene.props)
        assert note.startswith(f"{scene.place}: {scene.character} {scene.action}")


def test_regions_enclose_their_class_and_indices_are_class_numbers(tmp_path: Path) -> None:
    make_dataset(tmp_path / "plain", "val", 3, tasks=("seg2img",))
    found = rows(tmp_path / "regions", "regions", "regions.jsonl")
    assert len({(r["id"], r["expression"]) for r in found}) == len(found) > 5
    for row in [r for r in found if r["expression"] == "the sky"]:
        with Image.open(tmp_path / "plain" / "labels" / f"{row['id'].rsplit('-', 1)[0]}.png") as picture:
            labels = np.asarray(picture)
        ys, xs = np.nonzero(labels == 1)
        assert row["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    row = rows(tmp_path / "indices", "indices", "indices.jsonl")[0]
    with Image.open(tmp_path / "indices" / row["segmentation"]) as picture:
        assert picture.mode == "L"


@pytest.mark.parametrize("cast", toon_styles.CASTS)
def test_a_cast_keeps_its_costumes_inside_the_splits(tmp_path: Path, cast: str) -> None:
    worn = {}
    for split in ("train", "test"):
        asked = rows(tmp_path / split, cast, f"{cast}.jsonl", split, 4)
        for row in asked:
            scenes = scenes_of(row["meta"])
            assert {(s.shirt, s.hat) for s in scenes} == {toon_styles.costume(cast, scenes[0].character)}
            assert all(split_of(s) in (split, "test") for s in scenes)
            worn[scenes[0].character] = scenes[0].shirt
            given = [frame["image"] is not None for frame in row["frames"]]
            assert given == ([True] * 4 + [False] if cast == "club" else [True] + [False] * 4)
            assert all((tmp_path / split / name).is_file() for name in row["meta"]["images"])
    assert len(set(worn.values())) == 1 if cast == "club" else len(set(worn.values())) > 1


def test_profiles_name_rows_that_can_be_drawn(tmp_path: Path) -> None:
    for name in ("sft_vqa", "sft_caption", "sft_rec", "sft_seg2img", "sft_story_vist", "sft_story_pororo"):
        recipe = resolve(name, profile="toon").recipe
        for manifest in (*(entry.toon for entry in recipe.data.sets), recipe.measure.toon):
            assert sources.manifest_of(tmp_path, manifest).name == manifest
    data = DataConfig(cache=str(tmp_path))
    folder = sources.drawn(data, {"notes.jsonl"}, "val", 2, QUIET)
    assert sources.manifest_of(folder, "notes.jsonl").is_file()
    with pytest.raises(ConfigError, match="no rows 'note.jsonl'"):
        sources.drawn(data, {"note.jsonl"}, "val", 2, QUIET)
