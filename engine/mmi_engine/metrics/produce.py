"""The generating half of a suite: a part's rows through the command's own task and run.

Place in the flow: between a suite file and `score.py`. What comes out is an output directory like any other: resumable,
with errors.jsonl and a gallery. The weights are loaded once for all parts. A new task is one entry of `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmi_engine.choices import Choices
from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import Manifest
from mmi_engine.data.maps import Palette
from mmi_engine.engine import ModelEngine
from mmi_engine.errors import ConfigError
from mmi_engine.metrics.suite import Part
from mmi_engine.model_info import family
from mmi_engine.run import RunOptions, run
from mmi_engine.tasks import Candidates, CaptionTask, GroundTask, Seg2ImgTask, StoryTask, T2iTask, Task, VqaTask

Ask = dict[str, Any]

TASKS: dict[str, Callable[[Ask, str], Task]] = {
    "caption": lambda ask, of: CaptionTask(**ask),
    "vqa": lambda ask, of: VqaTask(**ask, family=of),
    "ground": lambda ask, of: GroundTask(**ask, family=of),
    "t2i": lambda ask, of: T2iTask(_candidates(ask), **ask),
    "seg2img": lambda ask, of: Seg2ImgTask(_palette(ask, of), _candidates(ask), **ask),
    "story": lambda ask, of: StoryTask(**ask),
}


def _candidates(ask: Ask) -> Candidates:
    return Candidates(ask.pop("candidates", 1), ask.pop("rerank", None))


def _palette(ask: Ask, of: str) -> Palette:
    return Palette.find(ask.pop("palette", None) or ("toon" if of == "toon" else "voc"))


class SharedEngine(ModelEngine):
    """An engine that takes the weights of an earlier part where they are the same.

    Args:
        choices: as for `ModelEngine`; shared: filled by the first engine that loads; notice: told what ``auto`` came
        to.
    """

    def __init__(self, choices: Choices, shared: dict[str, Any], notice: Callable[[str], None] | None = None) -> None:
        super().__init__(choices, notice)
        self._shared = shared

    def load(self) -> None:
        """Read the weights, or take them over."""
        key = repr([self._directory, self._device, *(self.resolved[name] for name in ("dtype", "kernel", "threads"))])
        self._model = self._model or self._shared.get(key)
        super().load()
        self._shared[key] = self._model


def task_of(part: Part, model: str, *, tuned: bool = False, clip: Path | None = None) -> tuple[Task, list[str]]:
    """The command's task with the part's options.

    Args:
        part: of a suite; model: whose family decides on prompts; tuned: after fine-tuning.
        clip: what ``rerank = "clip"`` means.

    Returns:
        the task, and in which points it deviates from the suite file.

    Raises:
        ConfigError: an option that the task does not have.
    """
    ask, remarks = {**part.ask, **(part.tuned if tuned else {})}, []
    if ask.get("rerank") == "clip":
        ask["rerank"] = str(clip) if clip else None
        if clip is None:
            remarks.append(f"one candidate instead of {ask.pop('candidates')}: no --clip to re-rank them by")
    try:
        return TASKS[part.task](ask, family(model)), remarks
    except TypeError as error:
        raise ConfigError(f"suite part {part.data}: {error}", remedy=f"see mmi {part.task} --help") from None


def produce(
    part: Part,
    task: Task,
    manifest: Path,
    out: Path,
    choices: dict[str, Any],
    *,
    limit: int | None = None,
    shared: dict[str, Any] | None = None,
    reporter: Any = None,
) -> None:
    """Generate a part's results into ``out`` (resumed where it was interrupted).

    Args:
        part, task: see `task_of`; manifest: its rows; out: output directory.
        choices: fields of `Choices` (model, device, threads, batch_size).
        limit: only the first rows; shared: see `SharedEngine`; reporter: see `run`.
    """
    settings = {**part.decoding, **choices.get("settings", {})}
    chosen = {key: value for key, value in choices.items() if key != "settings"}
    engine = SharedEngine(
        Choices(**chosen, decoding=task.decoding, settings=settings),
        shared if shared is not None else {},
        getattr(reporter, "notice", None),
    )
    source = Manifest(manifest)
    run(task, source, out, engine, RunOptions(limit=limit), loader=ImageLoader(source.root), reporter=reporter)
