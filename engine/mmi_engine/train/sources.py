"""From the sets of a recipe to manifests on the disk: drawn ones are drawn, missing ones are named with their remedy.

Place in the flow: ``finetune.py`` and ``mmi train`` ask :func:`locate` before any model is loaded. Nothing heavy is
imported at module level.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mmi_engine.errors import ConfigError, UsageError
from mmi_engine.train.sections import DataConfig, SetConfig

# manifest of `mmi data make toon`, or of documents → the task that draws it (others: a style of toon_styles)
TOON_TASKS = {
    "stories.jsonl": "story", "stories_full.jsonl": "story", "captions.jsonl": "caption", "vqa.jsonl": "vqa",
    "ground.jsonl": "ground", "t2i.jsonl": "t2i", "seg2img.jsonl": "seg2img", "documents.jsonl": "document",
}  # fmt: skip


def locate(data: DataConfig) -> dict[str, Path]:
    """Name of every set that is not drawn → its manifest.

    Raises:
        ConfigError: the recipe has no sets, or a file is named that is not there.
        UsageError: sets are missing; the message says which, where they come from and how they are imported.
    """
    if not data.sets:
        raise ConfigError("data.sets is empty", remedy="name manifests with --data")
    found: dict[str, Path] = {}
    missing: list[SetConfig] = []
    for entry in data.sets:
        if entry.toon:
            continue
        named = data.place(entry)
        if named and Path(named).is_file():
            found[entry.name] = Path(named)
        elif entry.manifest:
            raise UsageError(f'manifest "{entry.manifest}" of set {entry.name!r} not found', remedy="check the path")
        else:
            missing.append(entry)
    if missing:
        raise UsageError(_what_is_missing(data, missing), remedy="or name what you have with --data NAME=MANIFEST")
    return found


def _what_is_missing(data: DataConfig, missing: list[SetConfig]) -> str:
    lines = [f"the recipe's data are not here: {len(missing)} of {len(data.sets)} sets"]
    for entry in missing:
        place = f" (looked for {data.place(entry)})" if data.root else ""
        lines.append(f"  {entry.name}{place}")
        if entry.origin:
            lines.append(f"      from   {entry.origin}")
        if entry.importer:
            lines.append(f"      import {entry.importer}")
    lines.append("then: mmi train … data.root=DATA")
    return "\n".join(lines)


def drawn(data: DataConfig, names: set[str], split: str, count: int, progress: Callable[[int, int], None]) -> Path:
    """Folder with the manifests ``names`` of the built-in world, drawn where they are not there yet.

    Args:
        data: cache folder; names: manifests of `mmi data make toon`; split: train, val or test.
        count: stories and single scenes.
        progress: called with (drawn, in all).
    """
    from mmi_engine.toon.dataset import make_dataset
    from mmi_engine.train import cache, toon_styles
    from mmi_engine.train.toon_documents import write_documents

    root = Path(data.cache) if data.cache else cache.default_root()
    folder = root / cache.fingerprint() / "rows" / f"{split}-{count}"
    for place in sorted({_place(folder, name) for name in names}):
        if (place / "complete").is_file():
            continue
        task = place.name.split(".")[0]
        partial = folder / f".{place.name}.{os.getpid()}"
        partial.mkdir(parents=True, exist_ok=True)
        if task == "document":
            write_documents(partial, split, count, progress)
        elif task in TOON_TASKS.values():
            make_dataset(partial, split, count, tasks=(task,), progress=progress)
        else:
            toon_styles.write(partial, task, split, count, progress)
        (partial / "complete").write_text("", encoding="utf-8")
        if place.exists():  # another process was faster
            continue
        os.replace(partial, place)
    return folder


def manifest_of(folder: Path, name: str) -> Path:
    """A drawn manifest inside the folder that :func:`drawn` returned."""
    return _place(folder, name) / name


def _place(folder: Path, name: str) -> Path:
    """Where a drawn manifest lies: a folder per task, or per style and version.

    Raises:
        ConfigError: nothing draws a manifest of this name.
    """
    from mmi_engine.train import toon_styles

    if name in TOON_TASKS:
        return folder / TOON_TASKS[name]
    if name in toon_styles.MANIFESTS_OF:
        return folder / f"{toon_styles.MANIFESTS_OF[name]}.{toon_styles.version()}"
    known = ", ".join((*TOON_TASKS, *toon_styles.MANIFESTS_OF))
    raise ConfigError(f"the built-in world has no rows {name!r}", remedy=f"toon is one of {known}")
