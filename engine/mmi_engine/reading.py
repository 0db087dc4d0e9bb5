"""A manifest row before the model sees it: read, its pictures decoded and shrunk, small copies made for the gallery.

Place in the flow: `run.py` calls `Reader.read` in the reading threads of `ahead.py`. Of a row's original pictures only
what the task keeps on purpose stays in memory (``Job.kept``), and `Job.weight` says how much that is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmi_engine.batches import as_item_error
from mmi_engine.copies import small_copy
from mmi_engine.data.images import ImageLoader, shrink
from mmi_engine.data.manifest import Row
from mmi_engine.errors import ItemError
from mmi_engine.tasks import Job, Task

MAX_COPIES = 12  # given pictures of one item that the gallery shows


@dataclass(frozen=True)
class Read:
    """A row after reading: the job with small copies of its pictures, or why there is none."""

    row: Row
    job: Job | None = None
    copies: tuple[bytes, ...] = ()
    error: ItemError | None = None

    @property
    def weight(self) -> int:
        """Bytes of its pictures."""
        return self.job.weight if self.job else 0


@dataclass(frozen=True)
class Reader:
    """How rows become jobs.

    Attributes:
        task, loader: what the rows ask for, and how pictures are loaded.
        copies: whether small copies are made.
    """

    task: Task
    loader: ImageLoader
    copies: bool

    def read(self, row: Row, side: int) -> Read:
        """The row with its pictures no larger than the model needs; `side` in pixels is what it sees. Never raises."""
        try:
            if row.error is not None:
                raise row.error
            return self._prepared(row, side)
        except Exception as error:  # a fault that nobody foresaw is this row's alone, too
            return Read(row, error=as_item_error(error))

    def _prepared(self, row: Row, side: int) -> Read:
        job = self.task.read(row, self.loader)
        copies: tuple[bytes, ...] = ()
        if self.copies:
            given = [piece.value for piece in job.pieces if piece.kind == "image" and piece.value is not None]
            shown = given if job.shown is None else job.shown
            copies = tuple(small_copy(picture) for picture in shown[:MAX_COPIES])
        pieces = [
            replace(piece, value=shrink(piece.value, side)) if piece.kind == "image" and piece.value else piece
            for piece in job.pieces
        ]
        return Read(row, replace(job, pieces=pieces, shown=None), copies)
