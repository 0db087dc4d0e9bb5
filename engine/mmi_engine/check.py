"""Look at every row and every image of a manifest without a model: `--dry-run` and `mmi data check`.

Place in the flow: beside `run.py`, with the same reading code, so what passes here does not fail there for its input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import Manifest, Row
from mmi_engine.errors import ItemError, RowError
from mmi_engine.tasks import StoryTask, Task

# Fields that hold one image reference, and fields that hold a list of them (interface: manifest rows).
ONE_IMAGE = ("image", "segmentation")
TEXTS = ("prompt", "question", "expression", "caption")


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


def _look(row: Row, task: Task | None, loader: ImageLoader) -> tuple[int, int]:
    """(images loaded, pieces to generate) of one row; raises ItemError."""
    if task is None and not ({"frames", "messages"} & row.data.keys()):
        return _look_any(row, loader), 0
    pieces = (task or StoryTask()).read(row, loader).pieces
    missing = sum(piece.value is None for piece in pieces)
    return sum(piece.kind == "image" and piece.value is not None for piece in pieces), missing


def _look_any(row: Row, loader: ImageLoader) -> int:
    """Rows of the one-image commands: load what they name, check what they say."""
    data = row.data
    references: list[Any] = [data[key] for key in ONE_IMAGE if data.get(key) is not None]
    for key in ("images", "shots"):
        value = data.get(key)
        if value is None:
            continue
        if not isinstance(value, list):
            raise RowError(f'"{key}" must be a list', code="bad_row")
        references += value if key == "images" else [shot.get("image") for shot in value if isinstance(shot, dict)]
    for key in TEXTS:
        if data.get(key) is not None and not isinstance(data[key], str):
            raise RowError(f'"{key}" must be a string', code="bad_row")
    if not references and not any(data.get(key) for key in TEXTS):
        raise RowError("no field that a command reads", remedy="see the manifest rows in the README", code="bad_row")
    for reference in references:
        loader.load(reference)
    return len(references)
