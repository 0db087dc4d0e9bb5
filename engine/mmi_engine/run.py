"""The one loop behind every generating command: manifest in, output directory out.

    Manifest.rows ─▶ selection (shard, ids, limit) ─▶ Task.read ─▶ buckets of one shape ─▶ Engine.fill ─▶ Task.output
                                                        │ errors                                          │
                                                        └────────────▶ OutputDir.fail    OutputDir.commit ◀┘

Promises kept here: a failing item never takes its neighbours down (a batch that raises is done again item by item);
the seed of an item depends on the run's seed and the item's id alone; a run that is stopped in any way resumes; the
finished directory is in manifest order. Nothing here knows a tensor: the model is behind the `Engine` protocol.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mmi_engine import gallery
from mmi_engine.batches import Engine, attempt, buckets
from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import Manifest, Row, item_seed
from mmi_engine.errors import GenerationError, Interrupted, ItemError, StoppedError
from mmi_engine.locks import Part
from mmi_engine.names import Stems
from mmi_engine.outdir import Entry, OutputDir
from mmi_engine.tasks import Job, Piece, Task

log = logging.getLogger(__name__)


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


def run(
    task: Task,
    manifest: Manifest,
    directory: Path,
    engine: Engine,
    options: RunOptions,
    *,
    loader: ImageLoader | None = None,
    reporter: Reporter | None = None,
) -> Summary:
    """Work on the selected rows until all are on disk.

    Args:
        task: what the rows ask for.
        manifest, directory: in and out.
        engine: the model.
        options: see `RunOptions`.
        loader: how images are read; default from the manifest's root, without network.
        reporter: told about progress.

    Returns:
        the summary; `summary.exit_code` is the process's.

    Raises:
        Interrupted: a signal asked to end; everything finished is on disk.
        StoppedError: an item failed and `stop_on_error` is set.
        MMIError: fatal: model, device, disk, a directory of another run.
    """
    worker = _Worker(task, manifest, directory, engine, options, loader or ImageLoader(manifest.root), reporter)
    with worker.out:
        return worker.run()


class _Worker:
    """State of one `run`."""

    def __init__(
        self,
        task: Task,
        manifest: Manifest,
        directory: Path,
        engine: Engine,
        options: RunOptions,
        loader: ImageLoader,
        reporter: Reporter | None,
    ) -> None:
        self.task, self.manifest, self.engine, self.options = task, manifest, engine, options
        self.loader, self.reporter = loader, reporter
        self.out = OutputDir(directory, options.part)
        self.summary = Summary()
        self.stems = Stems()
        self.order: list[Entry] = []
        self.loaded = False
        self.stopped_by: ItemError | None = None
        self.started = time.time()

    def run(self) -> Summary:
        self._scan()
        recorded = {} if self.options.overwrite else self.out.read_run().get("identity", {})
        identity = {
            "task": {"name": self.task.name, **self.task.settings},
            "manifest": self.manifest.fingerprint(),
            "root": self.manifest.root_label,
            "seed": self.options.seed,
            **self.engine.identity(len(self.order), recorded),
        }
        self.out.open(identity, overwrite=self.options.overwrite)
        selection = select(self.order, self.options)
        self._forget(selection)
        self._count_before(selection)
        self._record("running")
        state = "failed"
        try:
            with _Interrupt() as interrupt:
                self._work(selection, interrupt)
            interrupted = interrupt.requested
            state = "interrupted" if interrupted else "stopped" if self.stopped_by else "finished"
        finally:
            self._record(state)
        if interrupted:
            raise Interrupted(
                f"interrupted after {self.summary.new} new items", remedy="run the same command again to resume"
            )
        if self.stopped_by is not None:
            raise StoppedError(str(self.stopped_by), remedy="fix it, or run with --on-error skip")
        self.summary.merged = self.out.consolidate(self.order, self._write_gallery)
        return self.summary

    def _scan(self) -> None:
        for row in self.manifest.rows():
            self.order.append(Entry(row.line, row.id, row.error is None))
            self.stems.add(row.id)

    def _forget(self, selection: dict[int, Entry]) -> None:
        again = self.options.overwrite and not self.options.part.whole
        if again:
            ids = {entry.id for entry in selection.values()}
            self.out.forget(lambda item: item in ids, lambda line: line in selection)
        elif self.options.retry_errors:
            self.out.forget(None, lambda line: line in selection)

    def _count_before(self, selection: dict[int, Entry]) -> None:
        self.summary.total = len(selection)
        for entry in selection.values():
            if entry.line in self.out.failed:
                self.summary.failed += 1
            elif not self.out.is_open(entry):
                self.summary.done += 1
        if self.options.ids is not None:
            missing = len(self.options.ids - {entry.id for entry in self.order})
            if missing:
                self._notice(f"{missing} of {len(self.options.ids)} ids are not in the manifest")
        if self.reporter:
            self.reporter.begin(self.summary.total, self.summary.done + self.summary.failed)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _work(self, selection: dict[int, Entry], interrupt: _Interrupt) -> None:
        todo = {line for line, entry in selection.items() if self.out.is_open(entry)}
        if not todo:
            return
        for batch in buckets(self._jobs(todo, interrupt), self.engine.shape, self.engine.batch_size):
            self._do(batch)
            if interrupt.requested or self.stopped_by is not None:
                return

    def _jobs(self, todo: set[int], interrupt: _Interrupt) -> Iterator[Job]:
        """Jobs of the rows to do; rows that cannot become one go straight to the errors."""
        for row in self.manifest.rows():
            if row.line not in todo:
                continue
            if interrupt.requested or self.stopped_by is not None:
                return
            try:
                if row.error is not None:
                    raise row.error
                job = self.task.read(row, self.loader)
            except ItemError as error:
                self._failed(row, error)
                continue
            if job.to_generate:
                self._load_once()
                yield job
            else:
                self._finished(job, job.pieces, reduced=False)

    def _load_once(self) -> None:
        if not self.loaded:
            self.engine.load()
            self.loaded = True

    def _do(self, batch: list[Job]) -> None:
        seeded = [(job, self._seed(job.row)) for job in batch]
        for job, result, reduced in attempt(self.engine, seeded, self.engine.batch_size, self._notice):
            if isinstance(result, ItemError):
                self._failed(job.row, result)
            else:
                self._finished(job, result, reduced)

    def _seed(self, row: Row) -> int:
        return row.seed if row.seed is not None else item_seed(self.options.seed, row.id)

    # -- leaving a trace ----------------------------------------------------------------------------------------------

    def _finished(self, job: Job, pieces: Sequence[Piece], reduced: bool) -> None:
        row = job.row
        try:
            output = self.task.output(job, pieces, self.stems[row.id], self.engine.image_size)
        except ItemError as error:
            self._failed(row, error)
            return
        result: dict[str, Any] = {"id": row.id, **output.fields}
        if row.meta is not None:
            result["meta"] = row.meta
        if reduced:
            result["batch_reduced"] = True
        result |= {"seed": self._seed(row), "status": "ok"}
        self.out.commit(result, output.media)
        self.summary.done += 1
        self.summary.new += 1
        if self.reporter:
            self.reporter.item(f"{self.manifest.name}:{row.line}", None)

    def _failed(self, row: Row, error: ItemError) -> None:
        self.out.fail({"id": row.id, "line": row.line, "error": error.code, "message": str(error)})
        self.summary.failed += 1
        self.summary.errors[error.code] += 1
        place = f"{self.manifest.name}:{row.line}"
        if self.reporter:
            self.reporter.item(place, error)
        if self.options.stop_on_error and self.stopped_by is None:
            self.stopped_by = GenerationError(f"{place}: {error.message}", remedy=error.remedy, code=error.code)

    def _notice(self, text: str) -> None:
        if self.reporter:
            self.reporter.notice(text)

    def _write_gallery(self) -> None:
        if not self.options.gallery:
            return
        files = (self.out.directory / "results.jsonl", self.out.directory / "errors.jsonl")
        for name, page in gallery.pages(self.task, *files):
            self.out.write_page(name, page)

    def _record(self, state: str) -> None:
        seconds = time.time() - self.started
        part = {
            "state": state,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(seconds, 3),
            "rows": self.summary.total,
            "done": self.summary.done,
            "failed": self.summary.failed,
            "new": self.summary.new,
            "seconds_per_item": round(seconds / self.summary.new, 4) if self.summary.new else None,
            "peak_memory_mib": peak_memory_mib(),
        }

        def change(content: dict[str, Any]) -> dict[str, Any]:
            parts = {**content.get("parts", {}), self.options.part.label: part}
            record = self.engine.record()
            own = {"seed": self.options.seed, **self.task.settings}
            origins = self.options.origins
            named = {name: {"value": value, "origin": origins.get(name, "default")} for name, value in own.items()}
            record["settings"] = {**named, **record["settings"]}
            return {**content, "command": self.task.name, **record, "parts": parts}

        self.out.update_run(change)


def select(order: Iterable[Entry], options: RunOptions) -> dict[int, Entry]:
    """The rows to work on, by line: shard, then ids, then limit, then dealt to the launched processes in turn."""
    chosen = [
        entry for entry in order if options.part.owns_id(entry.id) and (options.ids is None or entry.id in options.ids)
    ]
    dealt = chosen[: options.limit][options.part.rank :: options.part.world]
    return {entry.line: entry for entry in dealt}


def peak_memory_mib() -> int:
    """Largest resident size of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)


class _Interrupt(contextlib.AbstractContextManager["_Interrupt"]):
    """The first Ctrl-C (or SIGTERM) asks the loop to end after the batch at work; the second ends it at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: the embedding program decides
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("finishing the batch at work; press Ctrl-C again to quit at once")
