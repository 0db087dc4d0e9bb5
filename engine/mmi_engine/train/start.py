"""From a resolved recipe to a finished run directory: the one call behind ``mmi train``.

runs/NAME/  recipe.json  run.json  parameters.txt  metrics.jsonl  curves.png  preview.png  checkpoints/  model/
"""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from mmi_engine.train.claim import Claim
from mmi_engine.train.recipe import Resolved

logger = logging.getLogger(__name__)
Report = Callable[[dict[str, Any]], None]
VERSIONED = ("torch", "transformers", "diffusers", "accelerate", "numpy")


def train(
    resolved: Resolved, directory: Path, *, resume: bool = False, report: Report | None = None
) -> dict[str, float]:
    """Run ``resolved`` in ``directory``; returns the last evaluation's figures.

    Args:
        resolved: recipe with origins, see :func:`mmi_engine.train.recipe.resolve`.
        directory: run directory, made when missing.
        resume: go on from the newest checkpoint there (or start, when there is none). A fresh run that fails before
            its first step leaves nothing behind.
        report: called with every line of ``metrics.jsonl`` and with ``{"stage", "done", "total"}`` while preparing.

    Raises:
        ConfigError, OutputError, Interrupted, NotFiniteError: see :class:`~mmi_engine.train.claim.Claim` and
            :class:`~mmi_engine.train.loop.Loop`.
    """
    from mmi_engine.train import cache, launched
    from mmi_engine.train.loop import Loop
    from mmi_engine.train.processes import process_state

    resolved = launched.adapted(resolved)
    if resolved.recipe.data.source == "manifests":
        return _finetune(resolved, directory, resume=resume, report=report)
    report = report or (lambda _: None)
    state = process_state()
    with Claim(resolved, directory, resume=resume) as claim:
        with state.main_process_first():  # one process draws and writes, the others find everything done
            record = directory / "run.json"
            before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
            world = before.get("world") or cache.fingerprint()
            task = build_task(resolved, report, world)
            if state.is_main_process:
                _record(resolved, directory, {"world": world})
        claim.loop = Loop(resolved.recipe, task, directory, report if state.is_main_process else None)
        return claim.loop.run(resume=resume)


def _finetune(resolved: Resolved, directory: Path, *, resume: bool, report: Report | None) -> dict[str, float]:
    """Training on manifests: the run directory, and everything else in ``finetune``."""
    from mmi_engine.train import finetune
    from mmi_engine.train.processes import process_state

    finetune.check(resolved.recipe)
    state = process_state()
    with Claim(resolved, directory, resume=resume) as claim:
        with state.main_process_first():
            if state.is_main_process:
                _record(resolved, directory, {"world": "", "processes": state.num_processes})
        return finetune.run(resolved, claim, report=report)


def _record(resolved: Resolved, directory: Path, facts: dict[str, Any]) -> None:
    """Write ``recipe.json``, and ``facts`` about this call into ``run.json``."""
    (directory / "recipe.json").write_text(resolved.to_json(), encoding="utf-8")
    text = json.dumps({**facts, **_environment()}, indent=2) + "\n"
    (directory / "run.json").write_text(text, encoding="utf-8")


def build_task(resolved: Resolved, report: Report, world: str | None = None) -> Any:
    """The task the recipe names, with its data prepared (drawn, encoded).

    Args:
        world: fingerprint of the world's code that the run began with; ``None`` means the present one.
    """
    from mmi_engine.train import cache

    recipe = resolved.recipe
    root = Path(recipe.data.cache) if recipe.data.cache else cache.default_root()

    def progress(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: report({"stage": stage, "done": done, "total": total})

    from mmi_engine.runtime import tune_cpu

    tune_cpu(recipe.loop.threads)
    stories, workers = recipe.data.stories, recipe.data.workers
    train_cache = cache.prepare(root, "train", stories, workers, progress("drawing training pictures"), world)
    val_cache = cache.prepare(root, "val", cache.STORIES, workers, progress("drawing validation pictures"), world)
    if recipe.task == "vae":
        from mmi_engine.train.vae import CodecTask

        return CodecTask(recipe, train_cache, val_cache)
    from mmi_engine.train.image_decoder import ImageDecoderTask
    from mmi_engine.train.interleaved import InterleavedTask

    kind = ImageDecoderTask if recipe.task == "image_decoder" else InterleavedTask
    return kind(recipe, train_cache, val_cache, progress("encoding pictures"))


def _environment() -> dict[str, Any]:
    """Command, host and versions, for whoever reads the run directory later."""
    versions = {name: metadata.version(name) for name in VERSIONED}
    return {"argv": sys.argv, "python": platform.python_version(), "machine": platform.platform(), **versions}
