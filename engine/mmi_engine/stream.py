"""`--out -`: result rows on a stream in manifest order, in place of an output directory.

Place in the flow: `run.py` commits to it as to an `OutputDir`. Nothing is kept: a row that is finished early waits for
those before it, errors go to the reporter alone, and there is nothing to resume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

from mmi_engine.errors import OutputError
from mmi_engine.outdir import Entry
from mmi_engine.rows import encode


class StreamOut:
    """The `OutputDir` of a run whose rows go to `stream`.

    Raises (all methods):
        BrokenPipeError: the reader has gone.
        OutputError: another fault of the stream.
    """

    directory = None

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lines: dict[int, bytes | None] = {}
        self._order: list[int] = []
        self._next = 0
        self.done: dict[str, None] = {}
        self.failed: dict[int, None] = {}

    def __enter__(self) -> StreamOut:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is held."""

    @contextlib.contextmanager
    def settling(self) -> Iterator[None]:
        """Nobody else writes here."""
        yield

    def read_run(self) -> dict[str, Any]:
        """There is no former run."""
        return {}

    def open(self, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        """Nothing to take hold of."""

    def expect(self, lines: Iterable[int]) -> None:
        """The manifest lines that will be committed or fail, in order."""
        self._order = list(lines)

    def forget(self, ids: Callable[[str], bool] | None, lines: Callable[[int], bool]) -> None:
        """Nothing is remembered."""

    def is_open(self, entry: Entry) -> bool:
        """Everything is to be done."""
        return True

    def commit(self, row: dict[str, Any], media: dict[str, Any], copies: dict[str, bytes], line: int) -> None:
        """Write the row as soon as all before it are written."""
        self._settle(line, encode(row))

    def fail(self, row: dict[str, Any]) -> None:
        """A failed row is passed over."""
        self._settle(row["line"], None)

    def _settle(self, line: int, raw: bytes | None) -> None:
        self._lines[line] = raw
        try:
            while self._next < len(self._order) and self._order[self._next] in self._lines:
                ready = self._lines.pop(self._order[self._next])
                self._next += 1
                if ready is not None:
                    self._stream.write(ready)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write to the output: {error.strerror or error}") from error

    def flush_rest(self) -> None:
        """Write finished rows that wait for one that will not come (an interrupted run)."""
        for line in self._order[self._next :]:
            ready = self._lines.get(line)
            if ready is not None:
                self._stream.write(ready)
        self._stream.flush()

    def consolidate(self, order: Sequence[Entry], finish: Callable[[], None], needed: Iterable[Entry]) -> bool:
        """All rows are out."""
        return True

    def update_run(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Nothing is recorded."""
