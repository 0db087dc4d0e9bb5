"""What a run is asked to do, and what it came to: options, the selection of rows, the summary, and who is told.

Place in the flow: `mmi_cli/generating.py` fills `RunOptions` from the command line; `run.py` works by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from mmi_engine.errors import ItemError
from mmi_engine.locks import Part
from mmi_engine.outdir import Entry


class Reporter(Protocol):
    """Who is told about progress; `mmi_cli.console` in the command line."""

    def begin(self, total: int, done: int) -> None:
        """The selection has `total` items, `done` of them from before."""
        ...

    def item(self, place: str, error: ItemError | None) -> None:
        """One more item is on disk; `place` is ``manifest:line``."""
        ...

    def notice(self, text: str) -> None:
        """Something worth a line."""
        ...


@dataclass(frozen=True)
class RunOptions:
    """How to run; none of it but `seed` changes an item's output.

    Attributes:
        seed: the run's seed, ≥ 0.
        part: share of the manifest.
        limit: only the first N rows of the selection.
        ids: only rows with these ids.
        overwrite, retry_errors, stop_on_error, gallery: as the options of these names.
        origins: option → where its value comes from, for run.json.
    """

    seed: int = 0
    part: Part = field(default_factory=Part)
    limit: int | None = None
    ids: frozenset[str] | None = None
    overwrite: bool = False
    retry_errors: bool = False
    stop_on_error: bool = False
    gallery: bool = True
    origins: dict[str, str] = field(default_factory=dict)


@dataclass
class Summary:
    """What a run came to.

    Attributes:
        total: selected rows; done and failed are those on disk at the end, whoever made them.
        new: items finished by this process.
        errors: error code → count among the selected rows that failed in this process.
        merged: whether the directory is in its final form.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    new: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    merged: bool = False

    @property
    def exit_code(self) -> int:
        """0 all done, 3 some failed."""
        return 3 if self.failed else 0


def select(order: Iterable[Entry], options: RunOptions) -> dict[int, Entry]:
    """The rows to work on, by line: shard, then ids, then limit, then dealt to the launched processes in turn."""
    chosen = [
        entry for entry in order if options.part.owns_id(entry.id) and (options.ids is None or entry.id in options.ids)
    ]
    dealt = chosen[: options.limit][options.part.rank :: options.part.world]
    return {entry.line: entry for entry in dealt}
