"""The toon suite's own part: drawing its test items.

Place in the flow: `mmi eval --suite toon` draws rows with `draw`, generates and scores them like any suite
(`mmi_engine.metrics`). Items are the first ones of the test split, none chosen; every item has its default seed, steps,
guidance and scheduler are the model's own. Stories get their first frame and all texts; frames 2 to 5 are generated,
each after the generated ones before.
"""

from __future__ import annotations

from pathlib import Path

from mmi_engine.toon.dataset import MANIFESTS, make_dataset

PER_SCENE = {"vqa": 7, "ground": 3}  # rows that one scene gives at least


def draw(folder: Path, task: str, count: int, start: int = 0) -> Path:
    """Rows for one task with their truth, at least `count` of them, as a manifest with pictures.

    Args:
        folder: where they go; equal arguments give equal bytes, so drawing again changes nothing.
        task: one of `dataset.TASKS`; start: index of the first story or scene of the test split.

    Returns:
        the manifest.
    """
    scenes = -(-count // PER_SCENE.get(task, 1))
    make_dataset(folder / task, "test", scenes, start, tasks=(task,))
    return folder / task / MANIFESTS[task]
