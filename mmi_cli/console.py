"""The only place that prints: progress, notices, errors and summaries on stderr, data on stdout.

Place in the flow: commands and the engine's `Reporter` protocol speak to a `Console`; how it looks (a live bar on a
terminal, plain lines in a log, JSON lines with ``--log-format json``, silence with ``-q``) is decided here alone.
`NO_COLOR` and a stderr that is no terminal are respected.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from mmi_engine.errors import ItemError, MMIError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SHOWN_ITEM_ERRORS = 20  # further ones are counted; all are in errors.jsonl
LOG_EVERY_S = 30.0  # progress lines where there is no terminal
LOGGERS = ("mmi_engine", "mmi_kernels", "mmi_cli")

_COLORS = {"error": "31", "warning": "33", "notice": "36", "good": "32", "dim": "2"}


@dataclass
class Console:
    """Where messages go and how loud they are.

    Attributes:
        verbosity: -1 (``-q``): only errors; 0: notices; 1: the engine's log; 2: its debug log, and tracebacks.
        json_log: one JSON object per message on stderr.
        progress: whether a live bar may be drawn.
    """

    verbosity: int = 0
    json_log: bool = False
    progress: bool = True
    _said: set[str] = field(default_factory=set)

    @property
    def stream(self) -> TextIO:
        """stderr, looked up when used so that a replaced one is respected."""
        return sys.stderr

    @property
    def live(self) -> bool:
        """Whether a bar can be drawn."""
        return self.progress and self.verbosity >= 0 and not self.json_log and _is_terminal(self.stream)

    def out(self, text: str) -> None:
        """Data for the user or the next program: a line on stdout."""
        sys.stdout.write(text + "\n")

    def notice(self, text: str) -> None:
        """Something worth a line; hidden by ``-q``."""
        if self.verbosity >= 0:
            self._say("notice", text)

    def warning(self, text: str) -> None:
        """Something to look at; hidden by ``-q``."""
        if self.verbosity >= 0:
            self._say("warning", text)

    def once(self, text: str) -> None:
        """A notice that is said only the first time."""
        if text not in self._said:
            self._said.add(text)
            self.notice(text)

    def log(self, level: str, text: str) -> None:
        """A line of the engine's own log."""
        self._say(level, text)

    def error(self, error: BaseException) -> None:
        """An error that ends the command: cause, place, remedy; the traceback only with ``-vv``."""
        if self.verbosity >= 2:
            self.stream.write("".join(traceback.format_exception(error)))
        if isinstance(error, MMIError):
            self._say("error", str(error), code=error.code)
            return
        text = f"unexpected {type(error).__name__}: {error}"
        hint = "" if self.verbosity >= 2 else "; run again with -vv for the traceback"
        self._say("error", text + hint, code="unexpected")

    def event(self, name: str, text: str, /, *, always: bool = False, **fields: Any) -> None:
        """A line of plain text, or with the JSON log an object with `fields`; hidden by ``-q`` unless `always`."""
        if always or self.verbosity >= 0:
            self._say("notice", text, event=name, **fields)

    def item_error(self, place: str, error: ItemError, shown: int) -> None:
        """A failed item: the first `SHOWN_ITEM_ERRORS` in full."""
        if self.verbosity < 0:
            return
        if self.json_log or self.verbosity > 0 or shown < SHOWN_ITEM_ERRORS:
            self._say("item", f"{place}: {error}", code=error.code, event="item_failed")
        elif shown == SHOWN_ITEM_ERRORS:
            self._say("item", "further errors are counted here and listed in errors.jsonl", code="", event="more")

    def table(self, rows: Sequence[Sequence[str]], *, header: Sequence[str] = ()) -> None:
        """Aligned columns on stdout."""
        full = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
        if not full:
            return
        widths = [max(len(row[column]) for row in full) for column in range(len(full[0]))]
        for row in full:
            self.out("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def json(self, value: Mapping[str, Any] | list[Any]) -> None:
        """A JSON document on stdout."""
        self.out(json.dumps(value, ensure_ascii=False, indent=2))

    @contextlib.contextmanager
    def counting(self, verb: str) -> Iterator[Callable[[int, int], None]]:
        """A progress callback (done, total) for work that has no items of its own; a bar where one can be drawn."""
        if not self.live:
            yield lambda done, total: None
            return
        with _make_bar() as bar:
            task = bar.add_task(verb, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def _say(self, level: str, text: str, /, **fields: Any) -> None:
        if self.json_log:
            named = {"time": round(time.time(), 3), "level": "error" if level == "item" else level}
            self.stream.write(json.dumps({**named, "message": text, **fields}, ensure_ascii=False) + "\n")
        else:
            prefix = {"error": "mmi: error: ", "warning": "mmi: warning: ", "notice": "mmi: "}.get(level, "")
            self.stream.write(f"{self._paint(level, prefix)}{text}\n")
        self.stream.flush()

    def _paint(self, level: str, text: str) -> str:
        if level not in _COLORS or not text or os.environ.get("NO_COLOR") or not _is_terminal(self.stream):
            return text
        return f"\x1b[{_COLORS[level]}m{text}\x1b[0m"

    def connect_logging(self) -> None:
        """Show the engine's log according to the verbosity."""
        level = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(self.verbosity, logging.DEBUG)
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.setLevel(level)
            logger.handlers = [_ConsoleHandler(self)]
        logging.getLogger("bitsandbytes").setLevel(max(level, logging.ERROR))  # it tells of parts that nobody asked for


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        level = (
            "error" if record.levelno >= logging.ERROR else "warning" if record.levelno >= logging.WARNING else "log"
        )
        text = record.getMessage()
        if record.exc_info and self.console.verbosity >= 2:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        self.console.log(level, text)


class RunReporter:
    """The engine's `Reporter`: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, verb: str) -> None:
        self.console = console
        self.verb = verb
        self._bar: Progress | None = None
        self._bar_task: TaskID | None = None
        self._total = self._finished = self._errors = 0
        self._last_line = time.monotonic()

    def begin(self, total: int, done: int) -> None:
        """Called once the selection is known."""
        self._total, self._finished = total, done
        if done:
            self.console.event("resume", f"{done} of {total} done before", done=done, total=total)
        if self.console.live and done < total:
            self._bar = _make_bar()
            self._bar.start()
            self._bar_task = self._bar.add_task(self.verb, total=total, completed=done)

    def item(self, place: str, error: ItemError | None) -> None:
        """Called for every item on disk."""
        self._finished += 1
        if error is not None:
            self.console.item_error(place, error, self._errors)
            self._errors += 1
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(self._bar_task, completed=self._finished)
            return
        now = time.monotonic()
        if now - self._last_line >= LOG_EVERY_S or (self.console.json_log and error is None):
            self._last_line = now
            text = f"{self.verb}: {self._finished} of {self._total}"
            self.console.event("progress", text, done=self._finished, total=self._total)

    def notice(self, text: str) -> None:
        """Passed through."""
        self.console.notice(text)

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _make_bar() -> Progress:
    from rich import console, progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console.Console(stderr=True),
        transient=True,
    )


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


_current = Console()


def current() -> Console:
    """The console of the running command."""
    return _current


def configure(verbosity: int, json_log: bool, progress: bool) -> Console:
    """Set up the console of the running command."""
    global _current
    _current = Console(verbosity, json_log, progress)
    _current.connect_logging()
    return _current
