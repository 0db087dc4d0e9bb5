"""Contact sheets of what the embedded model does, from a finished `mmi eval --suite toon`: first items, none chosen.

    mmi eval --suite toon --stories 8 --scenes 36 --out out/toon
    python benchmarks/toon_sheets.py out/toon --to docs

    TO/toon-boxes.png    referring expressions: the true box green, the model's white, red where it misses
    TO/toon-texts.png    pictures drawn from texts, the prompt below
    TO/toon-maps.png     semantic map, true picture, drawn picture
    TO/toon-strips.png   stories: the true frames, and below them the drawn ones (the first is given)

What the oracle reads wrong is written below a picture in red: the attribute, what it reads, what would be right.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in (".", "engine", "kernels")]

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from mmi_engine.data.images import ImageLoader  # noqa: E402
from mmi_engine.metrics.miou import counts, load_labels, miou  # noqa: E402
from mmi_engine.metrics.rec import THRESHOLD, iou  # noqa: E402
from mmi_engine.toon import oracle  # noqa: E402
from mmi_engine.toon.dataset import MANIFESTS, scenes_of  # noqa: E402
from mmi_engine.toon.palette import CLASSES  # noqa: E402
from mmi_engine.toon.score import STATED, UNSTATED, truth  # noqa: E402
from mmi_engine.toon.texts import parse_text  # noqa: E402

SIDE, GAP, LINE = 128, 6, 13
FONT = ImageFont.load_default(11)
RED, GREY, GREEN = "#c01818", "#303030", "#20e040"
Line = tuple[str, str]  # words, colour


class Tile:
    """A picture or several beside each other, and lines of text below."""

    def __init__(self, pictures: list[Image.Image], lines: list[Line]) -> None:
        self.pictures = [picture.convert("RGB").resize((SIDE, SIDE)) for picture in pictures]
        self.width = len(pictures) * (SIDE + 2) - 2
        self.lines = [(part, color) for words, color in lines for part in wrapped(words, self.width)]

    def paste(self, canvas: Image.Image, left: int, top: int) -> None:
        """Onto the sheet, its upper left corner at (left, top) px."""
        for number, picture in enumerate(self.pictures):
            canvas.paste(picture, (left + number * (SIDE + 2), top))
        pen = ImageDraw.Draw(canvas)
        for number, (words, color) in enumerate(self.lines):
            pen.text((left, top + SIDE + 1 + number * LINE), words, color, font=FONT)


def wrapped(words: str, width: int) -> list[str]:
    """Words in lines of at most ``width`` px."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and FONT.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def sheet(tiles: list[Tile], columns: int, path: Path) -> None:
    """Tiles in rows, each row as high as its longest text; written as PNG of 256 colours."""
    rows = [tiles[first : first + columns] for first in range(0, len(tiles), columns)]
    heights = [SIDE + max(len(tile.lines) for tile in row) * LINE + GAP for row in rows]
    canvas = Image.new("RGB", (columns * (tiles[0].width + GAP) + GAP, sum(heights) + GAP), "white")
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            tile.paste(canvas, GAP + column * (tile.width + GAP), top)
        top += height
    canvas.quantize(256, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)


class Part:
    """One part of a finished suite: its rows with their results, in the order of the manifest."""

    def __init__(self, suite: Path, name: str, task: str, count: int) -> None:
        folder, manifest = suite / name, suite / "data" / task / MANIFESTS[task]
        self.folder, self.data = folder, manifest.parent
        made = {row["id"]: row for row in _rows(folder / "results.jsonl")}
        asked = _rows(manifest)[:count]
        absent = [row["id"] for row in asked if row["id"] not in made]
        if absent:  # a sheet without its failures would be no evidence
            raise SystemExit(f"{folder}: no result for {', '.join(absent)}: run the suite again to its end")
        self.pairs = [(row, made[row["id"]]) for row in asked]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def wrong(picture: Image.Image, true: dict[str, Any], names: tuple[str, ...]) -> list[Line]:
    """What the oracle reads otherwise than it is, as lines."""
    said = oracle.read(picture).attributes()
    return [
        (f"{name}: {_said(said[name])}, not {_said(true[name])}", RED) for name in names if said[name] != true[name]
    ]


def _said(value: Any) -> str:
    return " and ".join(value) if isinstance(value, tuple) else str(value)


def boxes(part: Part) -> list[Tile]:
    """Referring expressions."""
    tiles = []
    for row, made in part.pairs:
        picture, overlap = _open(part.data / row["image"]), iou(made["box"], row["box"]) if made["box"] else 0.0
        hit = overlap > THRESHOLD
        pen = ImageDraw.Draw(picture)
        pen.rectangle([round(v) for v in row["box"]], outline=GREEN, width=2)
        if made["box"]:
            pen.rectangle([round(v) for v in made["box"]], outline="white" if hit else RED, width=1)
        tiles.append(Tile([picture], [(row["expression"], GREY), (f"IoU {overlap:.2f}", GREY if hit else RED)]))
    return tiles


def texts(part: Part) -> list[Tile]:
    """Pictures of prompts."""
    tiles = []
    for row, made in part.pairs:
        picture, stated = _open(part.folder / made["image"]), parse_text(row["prompt"])
        names = tuple(name for name in (*STATED, *UNSTATED) if stated.get(name))
        tiles.append(Tile([picture], [(row["prompt"], GREY), *wrong(picture, truth(scenes_of(row["meta"])[0]), names)]))
    return tiles


def maps(part: Part) -> list[Tile]:
    """Pictures of semantic maps."""
    tiles = []
    for row, made in part.pairs:
        picture = _open(part.folder / made["image"])
        labels = load_labels(ImageLoader(part.data), row["meta"]["labels"])
        overlap = float(miou(counts(labels, oracle.read_map(picture), len(CLASSES) - 1)))
        trio = [_open(part.data / row["segmentation"]), _open(part.data / row["meta"]["image"]), picture]
        tiles.append(Tile(trio, [(f"mIoU {overlap:.2f}", GREY)]))
    return tiles


def stories(part: Part) -> list[Tile]:
    """Stories, the true frames above the drawn ones."""
    tiles = []
    for row, made in part.pairs:
        scenes = scenes_of(row["meta"])
        true = [Tile([_open(part.data / image)], []) for image in row["meta"]["images"]]
        drawn = []
        for number, (scene, frame) in enumerate(zip(scenes, made["frames"], strict=True)):
            picture = _open(part.folder / frame["image"])
            faults = wrong(picture, truth(scene), (*STATED, *UNSTATED)) if number else [("given", GREY)]
            drawn.append(Tile([picture], [(frame["text"], GREY), *faults]))
        tiles += [*true, *drawn]
    return tiles


SHEETS = {
    "boxes": ("ground", "ground", boxes, 8, 24),
    "texts": ("t2i", "t2i", texts, 8, 24),
    "maps": ("seg2img", "seg2img", maps, 3, 18),
    "strips": ("stories", "story", stories, 5, 6),
}
"""Sheet → (part of the suite, task, its tiles, columns, items)."""


def main() -> None:
    """All four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path, help="output directory of mmi eval --suite toon")
    parser.add_argument("--to", type=Path, default=Path("."), metavar="DIR")
    given = parser.parse_args()
    for name, (part, task, tiles, columns, count) in SHEETS.items():
        sheet(tiles(Part(given.suite, part, task, count)), columns, given.to / f"toon-{name}.png")


if __name__ == "__main__":
    main()
