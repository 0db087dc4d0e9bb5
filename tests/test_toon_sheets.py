"""Contact sheets of the toon suite: what is right has nothing in red below it, what is wrong is named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmi_engine.toon import measure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import toon_sheets

PARTS = {"ground": "ground", "t2i": "t2i", "seg2img": "seg2img", "stories": "story"}


def _rows(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two items of each part, answered with the truth: what `mmi eval --suite toon` leaves of a perfect model."""
    folder = tmp_path_factory.mktemp("suite")
    for part, task in PARTS.items():
        manifest = measure.draw(folder / "data", task, 2)
        results = []
        for row in _rows(manifest):
            made: dict[str, Any] = {"id": row["id"], "status": "ok", "box": row.get("box")}
            pictures = row["meta"].get("images") or [row["meta"].get("image") or row["image"]]
            names = [f"{row['id']}-{number}.png" for number in range(len(pictures))]
            (folder / part).mkdir(exist_ok=True)
            for name, picture in zip(names, pictures, strict=True):
                (folder / part / name).write_bytes((manifest.parent / picture).read_bytes())
            made["image"] = names[0]
            if "frames" in row:
                made["frames"] = [{**frame, "image": name} for frame, name in zip(row["frames"], names, strict=True)]
            results.append(json.dumps(made))
        (folder / part / "results.jsonl").write_text("\n".join(results) + "\n", encoding="utf-8")
    return folder


def _red(tiles: list[toon_sheets.Tile]) -> list[str]:
    return [words for tile in tiles for words, color in tile.lines if color == toon_sheets.RED]


@pytest.mark.parametrize("name", toon_sheets.SHEETS)
def test_the_truth_has_nothing_in_red(suite: Path, name: str, tmp_path: Path) -> None:
    part, task, tiles, columns, count = toon_sheets.SHEETS[name]
    made = tiles(toon_sheets.Part(suite, part, task, count))
    assert made and not _red(made)
    toon_sheets.sheet(made, columns, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width >= columns * toon_sheets.SIDE
        first = np.asarray(picture.convert("RGB"), dtype=float)[toon_sheets.GAP :, toon_sheets.GAP :]
    shown = np.asarray(made[0].pictures[0], dtype=float)
    assert np.abs(first[: toon_sheets.SIDE, : toon_sheets.SIDE] - shown).mean() < 8  # 256 colours


def test_what_is_wrong_is_named(suite: Path) -> None:
    rows = _rows(suite / "data" / "t2i" / "t2i.jsonl")
    part = toon_sheets.Part(suite, "t2i", "t2i", 2)
    (first, one), (second, two) = part.pairs
    part.pairs = [(first, {**one, "image": two["image"]}), (second, {**two, "image": one["image"]})]
    true, other = rows[0]["meta"]["scene"], rows[1]["meta"]["scene"]
    said = " ".join(_red(toon_sheets.texts(part)))
    assert true["character"] != other["character"]
    for name in (true["character"], other["character"]):
        assert f"not {name}" in said


def test_a_missed_box_is_red(suite: Path) -> None:
    part = toon_sheets.Part(suite, "ground", "ground", 2)
    row, made = part.pairs[0]
    part.pairs = [(row, {**made, "box": [0, 0, 2, 2]}), (row, {**made, "box": None})]
    tiles = toon_sheets.boxes(part)
    assert [len(_red([tile])) for tile in tiles] == [1, 1]


def test_an_item_without_a_result_is_not_left_out_in_silence(suite: Path, tmp_path: Path) -> None:
    shutil.copytree(suite, tmp_path / "suite")
    results = tmp_path / "suite" / "t2i" / "results.jsonl"
    first, *others = results.read_text(encoding="utf-8").splitlines()
    results.write_text("\n".join(others) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=f"no result for {json.loads(first)['id']}"):
        toon_sheets.Part(tmp_path / "suite", "t2i", "t2i", 2)


def test_words_wrap_within_the_picture() -> None:
    lines = toon_sheets.wrapped("Fizz is sleeping at the lake near a red mushroom and a blue sign.", 128)
    assert len(lines) > 1 and all(toon_sheets.FONT.getlength(line) <= 128 for line in lines)
    assert " ".join(lines) == "Fizz is sleeping at the lake near a red mushroom and a blue sign."
