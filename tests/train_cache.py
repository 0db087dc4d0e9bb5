"""A cache of a few small random pictures in the files' real layout, for tests that must not wait for drawing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmi_engine.train import cache

STORIES, SIDE = 4, 32


def small_cache(folder: Path, patch: pytest.MonkeyPatch, shards: int = 2) -> cache.Cache:
    """``shards`` shards of four stories of five 32 px pictures; every text names its story and frame."""
    patch.setattr(cache, "STORIES", STORIES)
    rng = np.random.default_rng(5)
    for index in range(shards):
        shard = folder / f"shard-{index:05d}"
        shard.mkdir(parents=True)
        coarse = rng.integers(0, 256, (STORIES, cache.FRAMES, SIDE // 8, SIDE // 8, 3), np.uint8)
        np.save(shard / "pictures.npy", coarse.repeat(8, 2).repeat(8, 3))
        np.save(shard / "maps.npy", rng.integers(0, 12, (STORIES, cache.FRAMES, SIDE, SIDE), np.uint8))
        lines = [json.dumps(texts(index * STORIES + row)) for row in range(STORIES)]
        (shard / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return cache.Cache(folder, shards * STORIES)


def texts(story: int) -> dict[str, object]:
    """What would be said about ``story``."""
    frames = [
        {
            "captions": [f"Pip is in picture {story}{frame}."],
            "details": [
                f"Pip is running on the beach near a red ball. Pip wears a red shirt with the number 1{story % 10}"
                f" and no hat. Picture {story}{frame}."
            ],
            "questions": [["What number is on the shirt?", f"{story}{frame}"]],
            "referring": [["the ball", f"(0{story}0,0{frame}0)(500,999)"]],
        }
        for frame in range(cache.FRAMES)
    ]
    return {"texts": [f"Pip runs {story}{frame}." for frame in range(cache.FRAMES)], "frames": frames}
