"""Rows of the built-in world for the `[toon]` profiles: drawn once, documents as the web has them, fit for training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mmi_cli.main import cli
from mmi_engine.data.manifest import Manifest
from mmi_engine.errors import RowError
from mmi_engine.train import sources
from mmi_engine.train.documents import Choices, draft
from mmi_engine.train.recipe import resolve
from mmi_engine.train.sections import DataConfig
from mmi_engine.train.toon_documents import RELATED, UNRELATED, write_documents


def test_documents_hold_pictures_of_either_similarity(tmp_path: Path) -> None:
    assert write_documents(tmp_path / "a", "train", 12) == 12 and write_documents(tmp_path / "b", "train", 12) == 12
    first, second = ((tmp_path / name / "documents.jsonl").read_bytes() for name in "ab")
    assert first == second
    rows = [json.loads(line) for line in first.decode().splitlines()]
    parts = [part for row in rows for part in row["messages"][0]["content"] if part["type"] == "image"]
    assert {part["similarity"] for part in parts} == {RELATED, UNRELATED}
    with Image.open(tmp_path / "a" / parts[0]["image"]) as picture:
        assert picture.size == (128, 128)
    counts = {sum(part["type"] == "image" for part in row["messages"][0]["content"]) for row in rows}
    assert 0 in counts and max(counts) > 2  # documents without pictures are there, for the rules to drop


def test_rows_are_drawn_once(tmp_path: Path) -> None:
    data = DataConfig(cache=str(tmp_path))
    seen: list[int] = []
    folder = sources.drawn(data, {"vqa.jsonl", "documents.jsonl"}, "val", 2, lambda done, total: seen.append(done))
    drawn = len(seen)
    assert drawn >= 4 and sources.drawn(data, {"vqa.jsonl"}, "val", 2, lambda d, t: seen.append(d)) == folder
    assert len(seen) == drawn and not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["pretrain", "sft_vqa", "sft_caption", "sft_rec", "sft_seg2img", "sft_story_pororo"])
def test_the_profiles_rows_become_documents(tmp_path: Path, name: str) -> None:
    recipe = resolve(name, [f"data.cache={tmp_path}"], profile="toon").recipe
    names = {entry.toon for entry in recipe.data.sets}
    folder = sources.drawn(recipe.data, names, "train", 3, lambda done, total: None)
    for entry in recipe.data.sets:
        learnt = 0
        for row in Manifest(sources.manifest_of(folder, entry.toon)).rows():
            try:
                document = draft(row, entry, Choices("toon"), np.random.default_rng(0))
            except RowError as error:
                assert error.code in ("no_images_left", "single_image")
                continue
            learnt += not all(document.silent)
        assert learnt > 0, entry.name


def test_the_command_makes_documents_too(tmp_path: Path) -> None:
    words = ["data", "make", "toon", "--out", str(tmp_path / "toon"), "--count", "1", "--split", "val"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0 and "documents.jsonl 1" in result.stderr
    assert (tmp_path / "toon" / "documents.jsonl").is_file()
