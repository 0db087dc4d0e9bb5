"""Interleaved documents of the built-in world, as web pages hold them: sentences and pictures, some of them unrelated.

Place in the flow: ``sources.py`` draws these for the `[toon]` profile of `pretrain`; `mmi data make toon` writes them
as ``documents.jsonl``. A row is a story's texts and pictures as one message; every picture carries the similarity that
a CLIP model would give it (here 0.3 for one that belongs, 0.1 for one that does not): the rules of MMC4 bite.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmi_engine.toon.draw import render
from mmi_engine.toon.world import sample_scene, sample_story

NAME = "documents.jsonl"
RELATED, UNRELATED = 0.3, 0.1
STRANGERS = 0.15
"""Share of the pictures that do not belong to their sentence."""


def write_documents(
    out: Path, split: str, count: int, progress: Callable[[int, int], None] | None = None, start: int = 0
) -> int:
    """Write ``count`` documents and their pictures into ``out``; returns the number of rows.

    Args:
        out: folder; split: train, val or test; start: index of the first story.
        progress: called with (documents drawn, in all).
    """
    (out / "documents").mkdir(parents=True, exist_ok=True)
    partial = out / f"{NAME}.partial"
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        for done, index in enumerate(range(start, start + count), 1):
            stream.write(json.dumps(_row(out, split, index), ensure_ascii=False) + "\n")
            if progress is not None:
                progress(done, count)
    os.replace(partial, out / NAME)
    return count


def _row(out: Path, split: str, index: int) -> dict[str, Any]:
    story = sample_story(index, split)
    rng = random.Random(f"documents/{split}/{index}")
    pictures = rng.choice((0, 1, 2, 3, 4, 5))  # as documents of the web: some without, some with one
    content: list[dict[str, Any]] = []
    for number, (text, scene) in enumerate(zip(story.texts, story.scenes, strict=True)):
        if number < pictures:
            stranger = rng.random() < STRANGERS
            shown = sample_scene(index * 5 + number, split) if stranger else scene
            name = f"documents/{split}-{index:06d}-{number}.png"
            render(shown).save(out / name, format="PNG")
            similarity = UNRELATED if stranger else RELATED
            content.append({"type": "image", "image": name, "similarity": similarity})
        content.append({"type": "text", "text": text})
    name = f"{split}-{index:06d}"
    return {"id": name, "messages": [{"role": "user", "content": content}], "meta": {"split": split}}
