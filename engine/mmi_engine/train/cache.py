"""Pictures of the built-in world, drawn once and read from memory-mapped shards afterwards.

Before the data path: :mod:`mmi_engine.train.data` and :mod:`mmi_engine.train.vae` read what this writes. One shard is a
directory of ``STORIES`` stories, complete as soon as it exists (written beside its place and renamed):

    pictures.npy  uint8 [STORIES, 5, 128, 128, 3]      maps.npy  uint8 [STORIES, 5, 128, 128] class labels
    texts.jsonl   one line per story: its texts, and per frame captions, questions and referring expressions
    latents-KEY.npy  float16 [STORIES, 5, 2C, h, w]    posterior mean and standard deviation, unscaled, of codec KEY

Training therefore never waits for drawing, and a change of the world's code makes a new cache (``fingerprint``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mmi_engine.errors import ConfigError

logger = logging.getLogger(__name__)
STORIES = 250
FRAMES = 5
SIDE = 128
CAPTIONS = 2
FORMAT = b"2"
"""Changes with the files' layout, so that old shards are not mistaken for new ones."""
WORLD_FILES = ("world.py", "draw.py", "canvas.py", "characters.py", "palette.py", "places.py", "props.py", "texts.py")


def default_root() -> Path:
    """``$MMI_CACHE/toon``, else ``~/.cache/mmi/toon``."""
    return Path(os.environ.get("MMI_CACHE") or Path.home() / ".cache" / "mmi") / "toon"


def fingerprint() -> str:
    """Short hash of the code that decides what the world looks like."""
    folder = Path(str(resources.files("mmi_engine.toon")))
    digest = hashlib.sha256(FORMAT)
    for name in WORLD_FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:10]


def prepare(
    root: Path,
    split: str,
    stories: int,
    workers: int,
    progress: Callable[[int, int], None],
    world: str | None = None,
) -> Cache:
    """Draw the shards that are missing for ``stories`` stories of ``split`` and open the cache.

    Args:
        root: cache root; shards go to ``root/FINGERPRINT/SPLIT/shard-00000`` …
        progress: called with (shards ready, shards wanted).
        world: fingerprint of the world that a resumed run began with; ``None`` means the present one.

    Raises:
        ConfigError: shards of another world than the present one are missing.
    """
    present = fingerprint()
    folder = root / (world or present) / split
    wanted = -(-stories // STORIES)
    missing = [i for i in range(wanted) if not (folder / f"shard-{i:05d}").is_dir()]
    progress(wanted - len(missing), wanted)
    if missing and world not in (None, present):
        raise ConfigError(
            f"{folder} lacks {len(missing)} of {wanted} shards, and the world's code has changed since",
            remedy="lower data.stories, or start the run anew",
        )
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [(folder, split, index) for index in missing]
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(workers, len(jobs)), initializer=_lower_priority) as pool:
            for number, _ in enumerate(pool.imap_unordered(_draw_shard, jobs), 1):
                progress(wanted - len(missing) + number, wanted)
    return Cache(folder, stories)


@dataclass(frozen=True)
class Cache:
    """An opened cache: ``stories`` stories below ``folder``."""

    folder: Path
    stories: int

    @cached_property
    def _shards(self) -> list[Path]:
        return [self.folder / f"shard-{i:05d}" for i in range(-(-self.stories // STORIES))]

    @cached_property
    def _arrays(self) -> dict[str, list[np.ndarray]]:
        return {}

    def array(self, name: str, story: int) -> np.ndarray:
        """Row ``story`` of the array ``name`` (``pictures``, ``maps`` or ``latents-KEY``), read-only."""
        if name not in self._arrays:
            self._arrays[name] = [np.load(shard / f"{name}.npy", mmap_mode="r") for shard in self._shards]
        return self._arrays[name][story // STORIES][story % STORIES]

    def picture(self, story: int, frame: int) -> np.ndarray:
        """uint8 [128, 128, 3] RGB."""
        return self.array("pictures", story)[frame]

    @cached_property
    def _lines(self) -> list[list[bytes]]:
        return [(shard / "texts.jsonl").read_bytes().splitlines() for shard in self._shards]

    def texts(self, story: int) -> dict[str, Any]:
        """``{"texts": [5], "frames": [{"captions", "details", "questions", "referring"}]}`` of one story."""
        return json.loads(self._lines[story // STORIES][story % STORIES])

    def encode(
        self, key: str, encoder: Callable[[np.ndarray], np.ndarray], progress: Callable[[int, int], None]
    ) -> str:
        """Compute ``latents-key`` where missing; returns the array's name.

        Args:
            encoder: uint8 pictures [n, 128, 128, 3] → float16 [n, 2C, h, w], posterior mean and standard deviation.
        """
        name = f"latents-{key}"
        for number, shard in enumerate(self._shards):
            target = shard / f"{name}.npy"
            if not target.exists():
                pictures = np.load(shard / "pictures.npy", mmap_mode="r")
                rows = [
                    encoder(np.asarray(pictures[i : i + 50]).reshape(-1, *pictures.shape[2:]))
                    for i in range(0, STORIES, 50)
                ]
                latents = np.concatenate(rows)
                partial = target.with_name(f".{name}.partial.npy")
                np.save(partial, latents.reshape(STORIES, FRAMES, *latents.shape[1:]))
                os.replace(partial, target)
            progress(number + 1, len(self._shards))
        return name


def _lower_priority() -> None:
    os.nice(10)


def _draw_shard(job: tuple[Path, str, int]) -> None:
    """Draw one shard into a partial directory and rename it."""
    from mmi_engine.toon.draw import render, semantic_map
    from mmi_engine.toon.world import sample_story

    folder, split, index = job
    partial, final = folder / f".partial-{index:05d}", folder / f"shard-{index:05d}"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    pictures = np.empty((STORIES, FRAMES, SIDE, SIDE, 3), np.uint8)
    maps = np.empty((STORIES, FRAMES, SIDE, SIDE), np.uint8)
    lines = []
    for row in range(STORIES):
        number = index * STORIES + row
        story = sample_story(number, split)
        for frame, scene in enumerate(story.scenes):
            pictures[row, frame] = np.asarray(render(scene))
            maps[row, frame] = semantic_map(scene)
        lines.append(json.dumps(_texts(story, number, maps[row])))
    np.save(partial / "pictures.npy", pictures)
    np.save(partial / "maps.npy", maps)
    (partial / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, final)


def _texts(story: Any, number: int, maps: np.ndarray) -> dict[str, Any]:
    """Everything that is said about a story, drawn with a generator seeded by (number, frame)."""
    from mmi_engine.toon import texts

    frames = []
    for frame, (scene, labels) in enumerate(zip(story.scenes, maps, strict=True)):
        rng = random.Random(number * FRAMES + frame)
        boxes = texts.referring(scene, rng, labels)
        frames.append(
            {
                "captions": [texts.caption(scene, rng) for _ in range(CAPTIONS)],
                "details": [texts.long_caption(scene, rng) for _ in range(CAPTIONS)],
                "questions": [[question, answer] for question, answer, _ in texts.questions(scene, rng, labels)],
                "referring": [[expression, texts.box_text(box)] for expression, box in boxes],
            }
        )
    return {"texts": list(story.texts), "frames": frames}
