"""The toon suite: test items → generation → oracle → figures with counts and 95 % intervals.

Place in the flow: `mmi eval --suite toon` calls `measure`. Items are the first ones of the test split, none chosen;
every item has its default seed, steps, guidance and scheduler are the model's own; an unreadable picture counts as
wrong. Stories get their first frame and all texts; frames 2 to 5 are generated, each after the generated ones before.
Source of the measures: `mmi_engine.toon.score`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from PIL import Image

from mmi_engine.data.manifest import item_seed
from mmi_engine.generate.interleave import fill
from mmi_engine.generate.settings import Settings
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.sequence import Piece
from mmi_engine.toon import texts
from mmi_engine.toon.draw import render
from mmi_engine.toon.score import Figure, score_captions, score_stories, score_t2i
from mmi_engine.toon.world import sample_scene, sample_story

CAPTION_PROMPT = "a photo of"
Progress = Callable[[str, int, int], None]


def measure(
    model: MMInterleaved,
    *,
    stories: int = 50,
    scenes: int = 200,
    start: int = 0,
    batch_size: int = 10,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[dict[str, dict[str, Figure]], dict[str, Any]]:
    """Figures of a model on the test split.

    Args:
        model: with its tokenizer.
        stories: stories of five frames, four of them generated.
        scenes: single scenes, for captions and for text to image.
        start: index of the first story and scene.
        batch_size: items worked on together.
        progress: called with stage, items done and items in all.

    Returns:
        figures by task ("story", "caption", "t2i") and measure, and what was generated: ``stories`` as lists of five
        pictures with the first one given, ``captions`` and ``t2i`` in the order of the items.
    """
    made: dict[str, Any] = {"stories": [], "captions": [], "t2i": []}
    indices = range(start, start + stories)
    for part in _parts(indices, batch_size):
        made["stories"] += _draw_stories(model, part, batch_size)
        progress("story", len(made["stories"]), stories)
    for part in _parts(range(start, start + scenes), batch_size):
        made["captions"] += _caption(model, part, batch_size)
        progress("caption", len(made["captions"]), scenes)
    for part in _parts(range(start, start + scenes), batch_size):
        made["t2i"] += _draw_scenes(model, part, batch_size)
        progress("t2i", len(made["t2i"]), scenes)
    given = [True, False, False, False, False]
    true_stories = [sample_story(i, "test") for i in indices]
    true_scenes = [sample_scene(i, "test") for i in range(start, start + scenes)]
    figures = {
        "story": score_stories(
            (drawn, story.scenes, given) for drawn, story in zip(made["stories"], true_stories, strict=True)
        ),
        "caption": score_captions(zip(made["captions"], true_scenes, strict=True)),
        "t2i": score_t2i(
            (picture, prompt(i), scene)
            for i, (picture, scene) in enumerate(zip(made["t2i"], true_scenes, strict=True), start)
        ),
    }
    return figures, made


def prompt(index: int) -> str:
    """Text-to-image prompt of test scene ``index``."""
    return texts.caption(sample_scene(index, "test"), random.Random(index))


def _parts(indices: range, size: int) -> list[range]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _draw_stories(model: MMInterleaved, indices: range, batch_size: int) -> list[list[Image.Image]]:
    items = []
    for index in indices:
        story, pieces = sample_story(index, "test"), []
        for frame, text in enumerate(story.texts):
            pieces += [Piece("text", text), Piece("image", render(story.scenes[0]) if frame == 0 else None)]
        items.append(pieces)
    seeds = [item_seed(0, f"story-{i}") for i in indices]
    filled = fill(model, items, seeds, Settings(), batch_size)
    return [[piece.value for piece in item if piece.kind == "image"] for item in filled]


def _caption(model: MMInterleaved, indices: range, batch_size: int) -> list[str]:
    items = [
        [Piece("image", render(sample_scene(i, "test"))), Piece("text", CAPTION_PROMPT), Piece("text")] for i in indices
    ]
    filled = fill(model, items, [0] * len(items), Settings(max_new_tokens=40), batch_size)
    return [item[-1].value for item in filled]


def _draw_scenes(model: MMInterleaved, indices: range, batch_size: int) -> list[Image.Image]:
    items = [[Piece("text", prompt(i)), Piece("image")] for i in indices]
    filled = fill(model, items, [item_seed(0, f"scene-{i}") for i in indices], Settings(), batch_size)
    return [item[-1].value for item in filled]


def contact_sheet(stories: list[list[Image.Image]], columns: int = 5, rows: int = 8) -> Image.Image:
    """The first ``rows`` stories, one below the other; the first picture of each is the given one."""
    side = stories[0][0].width
    sheet = Image.new("RGB", (columns * side, min(rows, len(stories)) * side), "white")
    for y, story in enumerate(stories[:rows]):
        for x, picture in enumerate(story[:columns]):
            sheet.paste(picture, (x * side, y * side))
    return sheet
