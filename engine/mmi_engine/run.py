"""The one loop behind every generating command: manifest in, output directory out.

    Manifest.rows ─▶ selection (shard, ids, limit) ─▶ Task.read ─▶ buckets of one shape ─▶ Engine.fill ─▶ Task.output
                                                        │ errors                                          │
                                                        └────────────▶ OutputDir.fail    OutputDir.commit ◀┘

Promises kept here: a failing item never takes its neighbours down (a batch that raises is done again item by item);
the seed of an item depends on the run's seed and the item's id alone; a run that is stopped in any way resumes; the
finished directory is in manifest order. Nothing here knows a tensor: the model is behind the `Engine` protocol.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mmi_engine import gallery
from mmi_engine.ahead import Writer, ahead
from mmi_engine.batches import Engine, as_item_error, attempt, buckets
from mmi_engine.copies import copies_of, copy_name, sweep_copies
from mmi_engine.data.images import ImageLoader, bytes_of
from mmi_engine.data.manifest import Manifest, Row, item_seed
from mmi_engine.errors import GenerationError, Interrupted, ItemError, MMIError, OutputMismatchError, StoppedError
from mmi_engine.interrupt import Interrupt
from mmi_engine.names import Stems
from mmi_engine.outdir import Entry, OutputDir
from mmi_engine.pieces import Piece
from mmi_engine.plan import Reporter, RunOptions, Summary, select
from mmi_engine.reading import Reader
from mmi_engine.rows import differences
from mmi_engine.stream import StreamOut
from mmi_engine.tasks import Job, Task

__all__ = ["Reporter", "RunOptions", "Summary", "run", "select"]

LAUNCH_GRACE_S = 60.0  # how long a process that has failed items waits for others that it does not see
HELD_BYTES = 2**29  # of pictures in each of three places: read ahead, waiting for a batch, waiting for the disk
AUTO = frozenset({"device", "dtype", "kernel"})  # what follows from the machine unless it is named


def run(
    task: Task,
    manifest: Manifest,
    target: Path | StreamOut,
    engine: Engine,
    options: RunOptions,
    *,
    loader: ImageLoader | None = None,
    reporter: Reporter | None = None,
) -> Summary:
    """Work on the selected rows until all are on disk.

    Args:
        task: what the rows ask for.
        manifest, target: in, and out: an output directory, or a stream of result rows.
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
    out = target if isinstance(target, StreamOut) else OutputDir(target, options.part)
    worker = _Worker(task, manifest, out, engine, options, loader or ImageLoader(manifest.root), reporter)
    with out:
        return worker.run()


class _Worker:
    """State of one `run`."""

    def __init__(
        self,
        task: Task,
        manifest: Manifest,
        out: OutputDir | StreamOut,
        engine: Engine,
        options: RunOptions,
        loader: ImageLoader,
        reporter: Reporter | None,
    ) -> None:
        self.task, self.manifest, self.engine, self.options = task, manifest, engine, options
        self.reporter = reporter
        self.out = out
        self.directory = out.directory if isinstance(out, OutputDir) else None
        copies = task.keeps_inputs and options.gallery and self.directory is not None
        self.reader = Reader(task, loader, copies)
        self.summary = Summary()
        self.stems = Stems()
        self.order: list[Entry] = []
        self.loaded = False
        self.copies: dict[int, tuple[bytes, ...]] = {}
        self.writer: Writer | None = None
        self.stopped_by: ItemError | None = None
        self.started = time.time()

    def run(self) -> Summary:
        self._scan()
        self._open()
        selection = select(self.order, self.options)
        self._forget(selection)
        self._count_before(selection)
        self._record("running")
        state = "failed"
        try:
            with Interrupt() as interrupt:
                self._work(selection, interrupt)
                if interrupt.requested or self.stopped_by:
                    self._show_what_there_is()
            interrupted = interrupt.requested
            state = "interrupted" if interrupted else "stopped" if self.stopped_by else "finished"
        finally:
            self._record(state)
        if isinstance(self.out, StreamOut):
            self.out.flush_rest()
        if interrupted:
            again = "run the same command again to resume" if self.directory else "nothing is kept with --out -"
            new = self.summary.new
            raise Interrupted(f"interrupted after {new} new item{'s' * (new != 1)}", remedy=again)
        if self.stopped_by is not None:
            raise StoppedError(str(self.stopped_by), remedy="fix it, or run with --on-error skip")
        launched = self._of_the_launch()
        needed = launched if self.options.part.shards == 1 else self.order  # a shard waits for all others
        self.summary.merged = self.out.consolidate(self.order, self._write_gallery, needed)
        if self.options.part.world > 1 and self.summary.failed and not self.summary.merged:
            self._wait_for_the_launch(launched)
        return self.summary

    def _show_what_there_is(self) -> None:
        """The gallery before the run goes on; a disk that refuses it does not change how the run ended."""
        if not self.options.part.whole:
            return  # other parts may be at work
        try:
            self.out.consolidate(self.order, self._write_gallery, ())
        except MMIError as error:
            self._notice(f"no gallery: {error}")

    def _of_the_launch(self) -> list[Entry]:
        """The rows that are selected for all processes launched together."""
        everyone = replace(self.options, part=replace(self.options.part, rank=0, world=1))
        return list(select(self.order, everyone).values())

    def _wait_for_the_launch(self, entries: list[Entry]) -> None:
        """A launcher ends all processes when one returns an error: who has failed items returns after the others."""
        pause, alone_since = 0.2, time.monotonic()
        while isinstance(self.out, OutputDir):
            finished, others = self.out.complete(entries)
            if others:
                alone_since = time.monotonic()
            if finished or time.monotonic() - alone_since > LAUNCH_GRACE_S:
                return
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _open(self) -> None:
        """Settle who this run is and take hold of the output."""
        identity = self._identity(None)  # all that can be wrong is found before anything is created
        if not self.engine.undecided:
            self.out.open(identity, overwrite=self.options.overwrite)
            return
        with self.out.settling():
            self.out.open(self._identity(self._sample), overwrite=self.options.overwrite)

    def _identity(self, sample: Callable[[], Job | None] | None) -> dict[str, Any]:
        """With the ``auto`` choices of run.json where all else agrees: no other part is lost to a choice made anew."""
        anew = self.options.overwrite and self.options.part.whole
        recorded = {} if anew else self.out.read_run().get("identity", {})
        identity = self._identity_after(recorded, sample)
        if self.options.overwrite and recorded and identity != recorded:
            self._spare_the_others(recorded, identity)
            return self._identity_after({}, sample)
        return identity

    def _spare_the_others(self, recorded: dict[str, Any], identity: dict[str, Any]) -> None:
        """Refuse to wipe the other parts where only ``auto`` comes to something else on this machine."""
        there, here = recorded.get("settings", {}), identity["settings"]
        changed = {name for name in (*there, *here) if there.get(name) != here.get(name)}
        origins = self.engine.record()["settings"]
        chosen = {name for name in AUTO if origins.get(name, {}).get("origin") == "default"}
        if changed <= chosen and {**recorded, "settings": here} == identity:
            found = "; ".join(differences(recorded, identity))
            raise OutputMismatchError(
                f"auto comes to something else than where other parts were made: {found}",
                remedy="work on this part where they were made, choose another --out, or name the options "
                f"({', '.join(f'--{name} {here[name]}' for name in sorted(changed))}) to start all parts anew",
            )

    def _identity_after(self, recorded: dict[str, Any], sample: Callable[[], Job | None] | None) -> dict[str, Any]:
        return {
            "task": {"name": self.task.name, **self.task.settings},
            "manifest": self.manifest.fingerprint(),
            "root": self.manifest.root_label,
            "seed": self.options.seed,
            **self.engine.identity(len(self.order), recorded, sample),
        }

    def _sample(self) -> Job | None:
        """The first row of the manifest that the model would work on, whatever part this process has."""
        for row in self.manifest.rows():
            found = self.reader.read(row, self.engine.input_side)
            if found.job is not None and found.job.to_generate:
                return found.job
        return None

    def _scan(self) -> None:
        for row in self.manifest.rows():
            self.order.append(Entry(row.line, row.id, row.error is None))
            self.stems.add(row.id)
        if not self.order:
            self._notice(f"{self.manifest.name} holds no rows")

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
            missing = sorted(self.options.ids - {entry.id for entry in self.order})
            if missing:
                some = "such as " if len(missing) > 1 else ""
                self._notice(
                    f"{len(missing)} of {len(self.options.ids)} ids are not in the manifest: {some}{missing[0]}"
                )
        if self.reporter:
            self.reporter.begin(self.summary.total, self.summary.done + self.summary.failed)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _work(self, selection: dict[int, Entry], interrupt: Interrupt) -> None:
        todo = [line for line, entry in selection.items() if self.out.is_open(entry)]
        self.out.expect(todo)
        if not todo:
            return
        self.writer = Writer(max(4, 2 * self.engine.batch_size), HELD_BYTES)
        jobs = self._jobs(set(todo), interrupt)
        try:
            for batch in buckets(jobs, self.engine.at_once, HELD_BYTES):
                self._do(batch)
                if interrupt.requested or self.stopped_by is not None:
                    break
            self.writer.finish()
        finally:
            jobs.close()
            self.writer.abandon()

    def _jobs(self, todo: set[int], interrupt: Interrupt) -> Generator[tuple[Job, Hashable]]:
        """Jobs of the rows to do with their shapes, read ahead; what cannot become one goes to the errors at once."""
        rows = islice((row for row in self.manifest.rows() if row.line in todo), len(todo))
        depth = min(64, max(4, 2 * self.engine.batch_size))
        read = partial(self.reader.read, side=self.engine.input_side)
        reading = ahead(read, rows, depth, lambda found: found.weight, HELD_BYTES)
        try:
            for found in reading:
                if interrupt.requested or self.stopped_by is not None:
                    return
                if found.job is None:
                    assert found.error is not None
                    self._failed(found.row, found.error)
                    continue
                self.copies[found.row.line] = found.copies
                if found.job.to_generate:
                    self._load_once()
                    try:
                        shape = self.engine.shape(found.job)
                    except Exception as error:
                        self._failed(found.row, as_item_error(error))
                        continue
                    yield found.job, shape
                else:
                    self._finished(found.job, found.job.pieces, reduced=False)
        finally:
            reading.close()

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
        row, stem = job.row, self.stems[job.row.id]
        copies = {copy_name(stem, number): content for number, content in enumerate(self.copies.pop(row.line, ()))}
        try:
            output = self.task.output(job, pieces, stem, self.engine.image_size)
        except Exception as error:
            self._failed(row, as_item_error(error))
            return
        result: dict[str, Any] = {"id": row.id, **output.fields}
        if row.meta is not None:
            result["meta"] = row.meta
        if reduced:
            result["batch_reduced"] = True
        result |= {"seed": self._seed(row), "status": "ok"}
        weight = sum(map(bytes_of, output.media.values()))
        self._later(partial(self._commit, row, result, output.media, copies), weight)

    def _commit(self, row: Row, result: dict[str, Any], media: dict[str, Any], copies: dict[str, bytes]) -> None:
        self.out.commit(result, media, copies, row.line)
        self.summary.done += 1
        self.summary.new += 1
        if self.reporter:
            self.reporter.item(f"{self.manifest.name}:{row.line}", None)

    def _failed(self, row: Row, error: ItemError) -> None:
        self.copies.pop(row.line, None)
        place = f"{self.manifest.name}:{row.line}"
        if self.options.stop_on_error and self.stopped_by is None:
            self.stopped_by = GenerationError(f"{place}: {error.message}", remedy=error.remedy, code=error.code)
        self._later(partial(self._fail, row, place, error))

    def _fail(self, row: Row, place: str, error: ItemError) -> None:
        self.out.fail({"id": row.id, "line": row.line, "error": error.code, "message": str(error)})
        self.summary.failed += 1
        self.summary.errors[error.code] += 1
        if self.reporter:
            self.reporter.item(place, error)

    def _later(self, action: Callable[[], None], weight: int = 0) -> None:
        assert self.writer is not None
        self.writer.do(action, weight)

    def _notice(self, text: str) -> None:
        if self.reporter:
            self.reporter.notice(text)

    def _write_gallery(self) -> None:
        if self.directory is None or not self.options.gallery:
            return  # a gallery that is there already keeps its files
        directory, shown = self.directory, set[str]()

        def copies(item_id: str) -> list[str]:
            found = copies_of(directory, self.stems[item_id]) if self.task.keeps_inputs else []
            shown.update(found)
            return found

        if isinstance(self.out, OutputDir):
            rows = (row for row in self.manifest.rows() if row.error is None)
            files = (directory / "results.jsonl", directory / "errors.jsonl")
            for name, page in gallery.pages(self.task, *files, rows=rows, copies=copies):
                self.out.write_page(name, page)
        sweep_copies(directory, shown)

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


def peak_memory_mib() -> int:
    """Largest resident size of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)
