"""The built-in world as other people's data sets hold it: what the `[toon]` profiles of the fine-tuning recipes learn.

Place in the flow: ``sources.py`` draws these. Fine-tuning is for data with conventions of their own, so each set keeps
the pictures and the truth of `mmi data make toon` (``meta`` has the scenes) and changes what is said or shown:

    notes.jsonl     captions as a list of facts: "beach: Pip jumping, red ball, blue boat"
    phrases.jsonl   answers as phrases: "on the beach", "number 47", "Pip the pig"
    regions.jsonl   boxes of regions and parts, from the semantic map: the sky, the ground, the head of Pip
    indices.jsonl   maps as class numbers, to be painted in the palette of PASCAL VOC
    club.jsonl      stories in which everybody wears the same; frames 1 to 4 are given (as VIST asks)
    cast_a.jsonl, cast_b.jsonl   stories in which every character keeps one shirt and one hat; the first frame is given
    *_full.jsonl    the same stories with every picture

No row of one split has an identity of another, as in the world itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmi_engine.toon import texts
from mmi_engine.toon.dataset import MANIFESTS, make_dataset, scenes_of
from mmi_engine.toon.draw import render, semantic_map
from mmi_engine.toon.palette import ID
from mmi_engine.toon.world import HATS, SHIRTS, SPECIES, Scene, identity_split, sample_story

Row = dict[str, Any]
STUFF = ("sky", "ground", "water", "hill", "plant", "building", "wall", "window")
PARTS = {"head": "the head of {}", "shirt": "the clothes of {}", "number": "the number plate of {}"}
LEAST_PIXELS = 36
"""Smaller boxes are no regions."""


def version() -> str:
    """Short hash of this file: rows drawn by another version are not taken for its own."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def write(out: Path, style: str, split: str, count: int, progress: Callable[[int, int], None]) -> None:
    """Write the manifests of ``style`` (a key of :data:`STYLES`) and their pictures into ``out``.

    Args:
        split: train, val or test; count: scenes or stories; progress: called with (drawn, in all).
    """
    out.mkdir(parents=True, exist_ok=True)
    if style in CASTS:
        _write_stories(out, style, split, count, progress)
        return
    task, rewrite = STYLES[style]
    make_dataset(out, split, count, tasks=(task,), progress=progress)
    source = out / MANIFESTS[task]
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    source.unlink()
    _lines(out / f"{style}.jsonl", [new for row in rows for new in rewrite(row)])


def _lines(path: Path, rows: list[Row]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


# ---------------------------------------------------------------------------- one picture


def _notes(row: Row) -> list[Row]:
    """The caption as a list of facts."""
    scene = scenes_of(row["meta"])[0]
    things = [f"{p.color} {p.kind}" for p in sorted(scene.props, key=lambda p: p.x)]
    note = f"{scene.place}: {', '.join([f'{scene.character} {scene.action}', *things])}"
    return [{**row, "captions": [note]}]


def _phrases(row: Row) -> list[Row]:
    """The answer as a phrase."""
    scene, answer = scenes_of(row["meta"])[0], row["answers"][0]
    return [{**row, "answers": [phrase(answer, row["meta"]["kind"], scene)]}]


def phrase(answer: str, kind: str, scene: Scene) -> str:
    """A one-word answer in more words."""
    if answer in ("yes", "no"):
        return answer
    props = {p.kind: f"a {p.color} {p.kind}" for p in scene.props}
    if answer in props:
        return props[answer]
    if kind == "position":
        return f"on the {answer}"
    if kind == "colour":
        return f"in {answer}"
    if kind == "count":
        return f"{answer} of them"
    if kind == "number":
        return f"number {answer}"
    if answer == scene.character:
        return f"{answer} the {SPECIES[answer]}"
    return texts.WHERE.get(answer, f"busy {answer}")


def _regions(row: Row) -> list[Row]:
    """One region of the picture that the row asks about, another one for each of its rows."""
    scene = scenes_of(row["meta"])[0]
    labels = semantic_map(scene)
    named = {name: f"the {name}" for name in STUFF}
    named |= {name: words.format(scene.character) for name, words in PARTS.items()}
    boxes = {words: texts.box_of(labels, ID[name]) for name, words in named.items()}
    found = {w: b for w, b in boxes.items() if b is not None and (b[2] - b[0]) * (b[3] - b[1]) >= LEAST_PIXELS}
    index, number = row["id"].rsplit("-", 1)
    order = random.Random(f"regions/{index}").sample(sorted(found), len(found))
    if int(number) >= len(order):
        return []
    chosen = order[int(number)]
    return [{**row, "expression": chosen, "box": list(found[chosen])}]


def _indices(row: Row) -> list[Row]:
    """The map as class numbers."""
    return [{**row, "segmentation": row["meta"]["labels"]}]


# ---------------------------------------------------------------------------- stories

CASTS = ("club", "cast_a", "cast_b")


def costume(cast: str, character: str) -> tuple[str, str]:
    """Shirt and hat that a character wears in every story of ``cast``."""
    rng = random.Random(f"{cast}/{'' if cast == 'club' else character}")
    return rng.choice(SHIRTS), rng.choice(HATS[1:])


def _dressed(cast: str, split: str, index: int) -> tuple[tuple[Scene, ...], tuple[str, ...]]:
    """Scenes and texts of a story in the cast's costumes, with a number that keeps the identity inside its split."""
    story = sample_story(index, split)
    character = story.scenes[0].character
    shirt, hat = costume(cast, character)
    numbers = list(range(10, 100))
    random.Random(f"{cast}/{split}/{index}").shuffle(numbers)
    number = next(n for n in numbers if identity_split(character, shirt, n, hat) == split)
    scenes = tuple(replace(scene, shirt=shirt, hat=hat, number=number) for scene in story.scenes)
    return scenes, story.texts


def _write_stories(out: Path, cast: str, split: str, count: int, progress: Callable[[int, int], None]) -> None:
    asked, full = [], []
    for index in range(count):
        scenes, words = _dressed(cast, split, index)
        name = f"{split}-{index:06d}"
        paths = [f"stories/{name}/{frame:02d}.png" for frame in range(len(scenes))]
        (out / "stories" / name).mkdir(parents=True, exist_ok=True)
        for scene, path in zip(scenes, paths, strict=True):
            render(scene).save(out / path, format="PNG")
        frames = [{"text": text, "image": path} for text, path in zip(words, paths, strict=True)]
        given = len(frames) - 1 if cast == "club" else 1
        meta = {"split": split, "scenes": [scene.to_meta() for scene in scenes], "images": paths}
        question = [*frames[:given], *({**frame, "image": None} for frame in frames[given:])]
        asked.append({"id": name, "frames": question, "meta": meta})
        full.append({"id": name, "frames": frames, "meta": meta})
        progress(index + 1, count)
    _lines(out / f"{cast}.jsonl", asked)
    _lines(out / f"{cast}_full.jsonl", full)


Rewrite = Callable[[Row], list[Row]]
STYLES: dict[str, tuple[str, Rewrite]] = {
    "notes": ("caption", _notes),
    "phrases": ("vqa", _phrases),
    "regions": ("ground", _regions),
    "indices": ("seg2img", _indices),
}
MANIFESTS_OF = {
    **{f"{style}.jsonl": style for style in STYLES},
    **{f"{cast}{end}.jsonl": cast for cast in CASTS for end in ("", "_full")},
}
"""Manifest → the style that holds it."""
