"""Look at every row and every image of a manifest without a model: `--dry-run` and `mmi data check`.

Place in the flow: beside `run.py`, with the same reading code, so what passes here does not fail there for its input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import Manifest, Row
from mmi_engine.data.maps import Palette
from mmi_engine.errors import ItemError, RowError
from mmi_engine.tasks import CaptionTask, GroundTask, Seg2ImgTask, StoryTask, T2iTask, Task, VqaTask


@dataclass
class Report:
    """What a check found.

    Attributes:
        rows: rows looked at; failed: those with an error.
        images: pictures that were loaded; generated: pieces the model would make.
        errors: error code → count.
    """

    rows: int = 0
    failed: int = 0
    images: int = 0
    generated: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def exit_code(self) -> int:
        """0 all good, 3 some rows would fail."""
        return 3 if self.failed else 0


def check(
    manifest: Manifest,
    task: Task | None,
    loader: ImageLoader,
    *,
    lines: Iterable[int] | None = None,
    on_error: Callable[[str, ItemError], None] | None = None,
) -> Report:
    """Read every row as a run would.

    Args:
        manifest: what to read.
        task: the command whose rows they are; None accepts the rows of every command.
        loader: how images are read.
        lines: only these manifest lines; default all.
        on_error: called with ``manifest:line`` and the error, as they are found.
    """
    report = Report()
    wanted = None if lines is None else set(lines)
    for row in manifest.rows():
        if wanted is not None and row.line not in wanted:
            continue
        report.rows += 1
        try:
            if row.error is not None:
                raise row.error
            images, generated = _look(row, task, loader)
            report.images += images
            report.generated += generated
        except ItemError as error:
            report.failed += 1
            report.errors[error.code] += 1
            if on_error:
                on_error(f"{manifest.name}:{row.line}", error)
    return report


def task_named(name: str) -> Task:
    """The task of a command, with its default options."""
    if name == "seg2img":
        return Seg2ImgTask(Palette.find("toon"))
    made: dict[str, Callable[[], Task]] = {
        "caption": CaptionTask,
        "vqa": VqaTask,
        "ground": GroundTask,
        "t2i": T2iTask,
        "story": StoryTask,
    }
    return made[name]()


def task_of(data: dict[str, Any]) -> Task:
    """The command whose row this looks like.

    Raises:
        RowError: no field that a command reads (`bad_row`).
    """
    for name, task in _BY_FIELD.items():
        if data.get(name) is not None:
            return task()
    raise RowError("no field that a command reads", remedy="mmi COMMAND --help shows what a row needs", code="bad_row")


# The first field that a row has decides.
_BY_FIELD: dict[str, Callable[[], Task]] = {
    "frames": StoryTask,
    "messages": StoryTask,
    "segmentation": lambda: task_named("seg2img"),
    "expression": GroundTask,
    "question": VqaTask,
    "options": VqaTask,
    "prompt": T2iTask,
    "image": CaptionTask,
    "images": CaptionTask,
}


def _look(row: Row, task: Task | None, loader: ImageLoader) -> tuple[int, int]:
    """(images loaded, pieces to generate) of one row; raises ItemError."""
    if task is None and isinstance(row.data.get("messages"), list):  # answered chats are sound too: training data
        row = replace(row, data={**row.data, "messages": [*row.data["messages"], {"role": "assistant"}]})
    job = (task or task_of(row.data)).read(row, loader)
    given = sum(piece.kind == "image" and piece.value is not None for piece in job.pieces)
    missing = sum(piece.value is None for piece in job.pieces)
    return given, missing - 1 + job.candidates
