"""The world written to disk: manifests and PNGs for every task.

Place in the flow: `mmi data make toon` ends here; what comes out is what any user's data looks like (the rows of the
interface) and carries the truth in `meta`. Deterministic: equal arguments give equal bytes. Pictures are 128 × 128 PNG.

    out/stories.jsonl        first frame given, the others to be drawn (image null)
    out/stories_full.jsonl   the same stories with every picture: references, and training data
    out/captions.jsonl       image, captions; meta.detail is the long caption
    out/vqa.jsonl            image, question, answers; meta.kind
    out/ground.jsonl         image, expression, box (xyxy px)
    out/t2i.jsonl            prompt; meta.image is the drawn picture
    out/seg2img.jsonl        segmentation (PNG in PALETTE colours), prompt; meta.labels the class ids as a grey PNG
    out/stories/ID/N.png, out/images/ID.png, out/maps/ID.png, out/labels/ID.png
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmi_engine.errors import UsageError
from mmi_engine.toon import texts
from mmi_engine.toon.draw import map_image, render, semantic_map
from mmi_engine.toon.world import SPLITS, Scene, sample_scene, sample_story

TASKS = ("story", "caption", "vqa", "ground", "t2i", "seg2img")
MANIFESTS = {
    "story": "stories.jsonl", "caption": "captions.jsonl", "vqa": "vqa.jsonl",
    "ground": "ground.jsonl", "t2i": "t2i.jsonl", "seg2img": "seg2img.jsonl",
}  # fmt: skip
CAPTIONS = 3  # reference captions per picture


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines under a temporary name, then rename: a manifest is whole or not there."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


def _story_rows(out: Path, split: str, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
    story = sample_story(index, split)
    name = f"{split}-{index:06d}"
    paths = [f"stories/{name}/{frame:02d}.png" for frame in range(len(story.scenes))]
    for scene, path in zip(story.scenes, paths, strict=True):
        _save(render(scene), out / path)
    full = [{"text": text, "image": path} for text, path in zip(story.texts, paths, strict=True)]
    asked = [full[0], *({"text": frame["text"], "image": None} for frame in full[1:])]
    meta = {"split": split, "scenes": [scene.to_meta() for scene in story.scenes], "images": paths}
    return {"id": name, "frames": asked, "meta": meta}, {"id": name, "frames": full, "meta": meta}


def _scene_rows(out: Path, split: str, index: int, tasks: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows by task of the index-th single scene; writes the pictures that they name."""
    scene = sample_scene(index, split)
    rng = random.Random(f"rows/{split}/{index}")
    labels = semantic_map(scene)
    name = f"{split}-{index:06d}"
    image = f"images/{name}.png"
    meta: dict[str, Any] = {"split": split, "scene": scene.to_meta()}
    captions = [texts.caption(scene, rng) for _ in range(CAPTIONS)]
    detail = texts.long_caption(scene, rng)
    asked = texts.questions(scene, rng, labels)
    referred = texts.referring(scene, rng, labels)
    _save(render(scene), out / image)
    if "seg2img" in tasks:
        _save(map_image(labels), out / "maps" / f"{name}.png")
        _save(Image.fromarray(labels), out / "labels" / f"{name}.png")
    return {
        "caption": [{"id": name, "image": image, "captions": captions, "meta": {**meta, "detail": detail}}],
        "vqa": [
            {"id": f"{name}-{k}", "image": image, "question": q, "answers": [a], "meta": {**meta, "kind": kind}}
            for k, (q, a, kind) in enumerate(asked)
        ],
        "ground": [
            {"id": f"{name}-{k}", "image": image, "expression": expression, "box": list(box), "meta": meta}
            for k, (expression, box) in enumerate(referred)
        ],
        "t2i": [
            {"id": name, "prompt": detail if index % 2 else captions[0], "meta": {**meta, "image": image}},
        ],
        "seg2img": [
            {
                "id": name,
                "segmentation": f"maps/{name}.png",
                "prompt": captions[0],
                "meta": {**meta, "image": image, "labels": f"labels/{name}.png"},
            }
        ],
    }


def make_dataset(
    out: Path,
    split: str,
    stories: int,
    start: int = 0,
    tasks: Sequence[str] = TASKS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write `stories` stories and as many single scenes (from index `start` on) as manifests with pictures.

    Args:
        out: folder, made if need be; existing files of the same names are replaced.
        split: train, val or test.
        tasks: which of TASKS to write.
        progress: called with (indices done, indices in all).

    Returns:
        rows written, by manifest name.

    Raises:
        UsageError: unknown split or task, or a negative count.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if split not in SPLITS or unknown:
        raise UsageError(
            f"unknown {'task ' + repr(unknown[0]) if unknown else 'split ' + repr(split)} of the toon world",
            remedy=f"splits are {', '.join(SPLITS)}; tasks are {', '.join(TASKS)}",
        )
    if stories < 0 or start < 0:
        raise UsageError(f"counts must not be negative: stories {stories}, start {start}", remedy="give 0 or more")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {MANIFESTS[task]: [] for task in TASKS if task in tasks}
    if "story" in tasks:
        rows["stories_full.jsonl"] = []
    for done, index in enumerate(range(start, start + stories), 1):
        if "story" in tasks:
            asked, full = _story_rows(out, split, index)
            rows["stories.jsonl"].append(asked)
            rows["stories_full.jsonl"].append(full)
        if any(task != "story" for task in tasks):
            for task, new in _scene_rows(out, split, index, tasks).items():
                if task in tasks:
                    rows[MANIFESTS[task]] += new
        if progress is not None:
            progress(done, stories)
    for name, lines in rows.items():
        _write(out / name, lines)
    return {name: len(lines) for name, lines in rows.items()}


def scenes_of(meta: dict[str, Any]) -> list[Scene]:
    """The true scenes in a row's meta: one of a single picture, five of a story."""
    plain = meta["scenes"] if "scenes" in meta else [meta["scene"]]
    return [Scene.from_meta(one) for one in plain]
