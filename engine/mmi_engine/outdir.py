"""The output directory: rows committed one by one, safe against kill -9 at any moment.

    DIR/results.jsonl   one row per finished item        DIR/errors.jsonl   one row per failed item
    DIR/run.json        what made it                     DIR/STEM…          media
    DIR/.mmi/           locks and half-written files of running processes; gone when they end

Place in the flow: `run.py` commits what tasks return. An item's media are written under a temporary name, flushed to
disk and renamed; then its row is appended and flushed. The row is the commit mark: media without a row are made again,
a half-written last line is cut off. A process that works on a part (`--shard`, or one of several launched together)
appends to `results-PART.jsonl`; `consolidate` brings all rows into manifest order under their final names, in steps
that can be repeated. Rows are never all in memory: only where each one lies.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmi_engine.copies import sweep_copies, write_copies
from mmi_engine.disk import flush, os_errors, write_file, write_pictures
from mmi_engine.errors import OutputError, OutputMismatchError
from mmi_engine.locks import STATE_DIR, Part, PartLock, guard, live_parts, settle
from mmi_engine.rows import RowIndex, differences, encode, media_of, parse

if TYPE_CHECKING:
    from PIL import Image

RESULTS, ERRORS, RUN = "results", "errors", "run.json"
PAGE = re.compile(r"index(-\d+)?\.html", re.ASCII)  # what the gallery's pages are called
SYNC_EVERY_S = 0.5  # rows of the last moments may be lost in a power cut; they are then made again


@dataclass(frozen=True, slots=True)
class Entry:
    """A manifest row as the directory knows it: line, id, and whether the row is sound (else it can only fail)."""

    line: int
    id: str
    sound: bool


class OutputDir:
    """One process's hold on an output directory. Use as a context manager around `open`.

    Args:
        directory: created when missing.
        part: the share of the manifest this process works on.

    Raises (all methods):
        OutputError: the disk refuses; the message says what and where.
    """

    def __init__(self, directory: Path, part: Part) -> None:
        self.directory = directory
        self.part = part
        self._lock = PartLock(directory, part)
        self._state = directory / STATE_DIR
        self._scratch = self._state / f"tmp-{part.label}"
        self._pending = self._state / f"pending-{part.label}"
        self._foreign: set[str] = set()  # pictures of the user that were here before the run
        suffix = "" if part.whole else f"-{part.label}"
        self._files = {kind: directory / f"{kind}{suffix}.jsonl" for kind in (RESULTS, ERRORS)}
        self._streams: dict[str, IO[bytes]] = {}
        self._held = False
        self._synchronised = time.monotonic()
        self.done = RowIndex("id")
        self.failed = RowIndex("line")

    def __enter__(self) -> OutputDir:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- taking hold ------------------------------------------------------------------------------------------------

    def open(self, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        """Lock the part, check that the directory belongs to this run, clean up after a kill, index what is done.

        Args:
            identity: everything that changes an item's output (task, manifest, model, settings); JSON values.
            overwrite: start this part anew; with another identity, the whole directory.

        Raises:
            OutputBusyError: another process works on an overlapping part.
            OutputMismatchError: made with another identity; the message names the difference.
        """
        with os_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            with guard(self.directory):
                others = self._lock.acquire()
                self._held = True
                same = self._check_identity(identity, overwrite)
                if overwrite and (self.part.whole or not same):
                    same = False
                    if others:
                        raise OutputMismatchError(
                            f"parts {', '.join(others)} of another run are at work here", remedy="choose another --out"
                        )
                    self._wipe()
                self._clean(others)
                self._index(others)
                if not same:
                    foreign = self._pictures()
                    self.write_run({"identity": identity, **({"foreign": foreign} if foreign else {})})
                self._foreign = set(self.read_run().get("foreign", ()))
                for kind, path in self._files.items():
                    self._streams[kind] = path.open("ab")
                self._scratch.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def settling(self) -> Iterator[None]:
        """Held while ``auto`` choices are made: parts that start together wait and take over the first one's."""
        with os_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            with settle(self.directory):
                yield

    def expect(self, lines: Iterable[int]) -> None:
        """The manifest lines to come; a directory does not mind their order."""

    def _check_identity(self, identity: dict[str, Any], overwrite: bool) -> bool:
        """True when run.json is there with the same identity, False for a directory to begin in."""
        there = self.read_run().get("identity")
        if there is None:
            names = ("results.jsonl", "errors.jsonl", "index.html")
            strangers = [name for name in names if (self.directory / name).exists()]
            if strangers and not overwrite:
                raise OutputMismatchError(
                    f"{self.directory} holds {' and '.join(strangers)} but no run.json that says what made them",
                    remedy="choose another --out, or --overwrite to start anew",
                )
            return False
        if there == identity:
            return True
        if not overwrite:
            raise OutputMismatchError(
                f"{self.directory} was made with other inputs: {'; '.join(differences(there, identity))}",
                remedy="choose another --out, or --overwrite to start anew",
            )
        return False

    def _pictures(self) -> list[str]:
        """PNG files where a run would put its own, relative to the folder."""
        found = (path for pattern in ("*.png", "*/*.png") for path in self.directory.glob(pattern))
        return sorted(path.relative_to(self.directory).as_posix() for path in found)

    def _wipe(self) -> None:
        """Remove what a former run left and nothing else; without its run.json its rows alone, not what they name."""
        self._clean([])
        if "identity" in self.read_run():
            index = RowIndex("id")
            for path, _ in self._own_files(RESULTS):
                index.add_file(path, repair=False)
            for raw in index.read(index):
                self.remove_media(media_of(json.loads(raw)))
            sweep_copies(self.directory, set())
            for path in self.directory.glob("index*.html"):
                if PAGE.fullmatch(path.name):
                    path.unlink()
        for kind in (RESULTS, ERRORS):
            for path, _ in self._own_files(kind):
                path.unlink()
        (self.directory / RUN).unlink(missing_ok=True)

    def _own_files(self, kind: str) -> list[tuple[Path, str]]:
        """The files of rows that a run writes, with the labels of their parts; all others are the user's."""
        found = []
        for path in sorted(self.directory.glob(f"{kind}*.jsonl")):
            label = path.name.removeprefix(kind).removesuffix(".jsonl")
            part = Part.from_label(label.removeprefix("-")) if label.startswith("-") else None
            if not label:
                found.append((path, Part().label))
            elif part is not None and not part.whole:
                found.append((path, part.label))
        return found

    def _clean(self, others: list[str]) -> None:
        """Scratch files of dead processes, and media whose row a kill prevented."""
        leftovers = list(self._state.glob("pending-*"))
        committed = RowIndex("id")
        for path, _ in self._own_files(RESULTS) if leftovers else ():
            committed.add_file(path, repair=False)
        for path in leftovers:
            if path.name.removeprefix("pending-") not in others:
                pending = parse(path.read_bytes())
                if pending is not None and pending["id"] not in committed:
                    self.remove_media(pending["media"])
                path.unlink()
        for path in list(self._state.glob("tmp-*")):
            if path.name.removeprefix("tmp-") not in others:
                shutil.rmtree(path)

    def _index(self, others: list[str]) -> None:
        self.done, self.failed = RowIndex("id"), RowIndex("line")
        for kind, index in ((RESULTS, self.done), (ERRORS, self.failed)):
            for path, label in self._own_files(kind):
                index.add_file(path, repair=label not in others)

    # -- committing -------------------------------------------------------------------------------------------------

    def commit(
        self, row: dict[str, Any], media: dict[str, Image.Image], copies: dict[str, bytes], line: int = 0
    ) -> None:
        """Write an item's media, then its row; on return both survive a kill.

        Args:
            row: the result row with its ``id``.
            media: path relative to the directory → RGB picture, written as PNG.
            copies: see `copies.py`; what no row needs is swept away with the gallery.
            line: of the manifest.
        """
        with os_errors(self.directory):
            write_copies(self.directory, self._scratch, copies)
            if media:
                self._write_media(row["id"], media)
            self._append(RESULTS, row)

    def _write_media(self, item: str, media: dict[str, Image.Image]) -> None:
        """On return the pictures are on the disk, and known as half an item until its row is there."""
        for name in self._foreign.intersection(media):
            if (self.directory / name).exists():
                raise OutputMismatchError(
                    f"{self.directory / name} is there already and not of this run",
                    remedy="move it away or choose another --out; the same command then goes on",
                )
        self._pending.write_bytes(json.dumps({"id": item, "media": sorted(media)}).encode() + b"\n")
        write_pictures(self.directory, self._scratch, media)

    def fail(self, row: dict[str, Any]) -> None:
        """Append a row to the errors."""
        with os_errors(self.directory):
            self._append(ERRORS, row)

    def _append(self, kind: str, row: dict[str, Any]) -> None:
        stream = self._streams[kind]
        stream.write(encode(row))
        stream.flush()  # safe from a kill of this process; from a power cut, once it is synchronised
        if time.monotonic() - self._synchronised > SYNC_EVERY_S:
            self._synchronise()

    def _synchronise(self) -> None:
        for stream in self._streams.values():
            if not stream.closed:
                flush(stream)
        self._synchronised = time.monotonic()

    def remove_media(self, names: Iterable[str]) -> None:
        """Delete media files and the folders they leave empty. Names come from this program's own rows."""
        for name in names:
            target = self.directory / name
            if target.resolve().is_relative_to(self.directory.resolve()):
                target.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    if target.parent != self.directory:
                        target.parent.rmdir()

    def forget(self, ids: Callable[[str], bool] | None, lines: Callable[[int], bool]) -> None:
        """Drop the committed rows that match, and their media, so that they are worked on again.

        Args:
            ids: which results to drop; None for no result.
            lines: manifest lines whose errors are dropped.
        """
        with os_errors(self.directory), guard(self.directory):
            others = live_parts_besides(self.directory, self.part)
            for kind, index, drop in ((RESULTS, self.done, ids), (ERRORS, self.failed, lines)):
                if drop is None or not any(drop(key) for key in index):
                    continue
                self._streams[kind].close()
                for path, label in self._own_files(kind):
                    if label not in others:
                        self._filter(path, index.key, drop)
                self._streams[kind] = self._files[kind].open("ab")
            self._index(others)

    def _filter(self, path: Path, key: str, drop: Callable[[Any], bool]) -> None:
        index = RowIndex(key)
        index.add_file(path, repair=True)
        dropped = {value for value in index if drop(value)}
        media = [name for raw in index.read(dropped) for name in media_of(json.loads(raw))]
        if dropped:
            self._rewrite(path, index.read(value for value in index if value not in dropped))
            self.remove_media(media)

    def _rewrite(self, path: Path, lines: Iterable[bytes]) -> None:
        draft = self._scratch / path.name
        with draft.open("wb") as stream:
            stream.writelines(lines)
            flush(stream)
        draft.replace(path)

    # -- finishing --------------------------------------------------------------------------------------------------

    def consolidate(self, order: Sequence[Entry], finish: Callable[[], None], needed: Iterable[Entry]) -> bool:
        """Bring all parts into manifest order; done by a part only once nothing is left to do of the rows `needed`.

        Every step is an atomic rename or a removal of what is already merged, so an interrupted merge is repeated by
        running any part again.

        Args:
            order: every manifest row, in order.
            finish: called with the merged files in place, before the part files go (the gallery).
            needed: the rows that a part waits for, whoever works on them.

        Returns:
            whether it was done; False while other parts still have items to do.
        """
        with os_errors(self.directory), guard(self.directory):
            self._index(live_parts_besides(self.directory, self.part))
            if not self.part.whole and any(self.is_open(entry) for entry in needed):
                return False
            self._synchronise()
            for stream in self._streams.values():
                stream.close()
            final = {kind: self.directory / f"{kind}.jsonl" for kind in (RESULTS, ERRORS)}
            self._rewrite(final[RESULTS], self.done.read(entry.id for entry in order if entry.sound))
            self._rewrite(final[ERRORS], self.failed.read(entry.line for entry in order))
            finish()
            for kind in (RESULTS, ERRORS):
                for path, label in self._own_files(kind):
                    if label != Part().label:
                        path.unlink()
            return True

    def complete(self, entries: Iterable[Entry]) -> tuple[bool, bool]:
        """Whether nothing is left to do of these rows, whoever did it; and whether others are at work."""
        with os_errors(self.directory), guard(self.directory):
            others = live_parts_besides(self.directory, self.part)
            self._index(others)
        return not any(self.is_open(entry) for entry in entries), bool(others)

    def is_open(self, entry: Entry) -> bool:
        """Whether a row still has to be worked on, going by the rows indexed last."""
        return entry.line not in self.failed and not (entry.sound and entry.id in self.done)

    def close(self) -> None:
        """Give the part back. Called at the end of every run, also a failed one."""
        with contextlib.suppress(OSError):
            self._synchronise()
        for stream in self._streams.values():
            with contextlib.suppress(OSError):
                stream.close()
        if not self._held:
            return
        self._held = False
        with contextlib.suppress(OSError), guard(self.directory):
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._pending.unlink(missing_ok=True)
            self._lock.release()
            for path in self._files.values():
                if not self.part.whole and path.exists() and path.stat().st_size == 0:
                    path.unlink()

    def write_page(self, name: str, text: str) -> None:
        """Replace a text file of the directory atomically (the gallery)."""
        draft = self._scratch / name
        write_file(draft, text.encode("utf-8"))
        draft.replace(self.directory / name)

    # -- run.json ---------------------------------------------------------------------------------------------------

    def read_run(self) -> dict[str, Any]:
        """The content of run.json; {} when there is none."""
        try:
            with os_errors(self.directory):
                content = json.loads((self.directory / RUN).read_bytes())
        except ValueError:
            return {}
        except OutputError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return {}
            raise
        return content if isinstance(content, dict) else {}

    def write_run(self, content: dict[str, Any]) -> None:
        """Replace run.json atomically. Call under the guard."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        draft = self._scratch / RUN
        write_file(draft, text.encode())
        draft.replace(self.directory / RUN)

    def update_run(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Read, change and replace run.json under the guard."""
        with os_errors(self.directory), guard(self.directory):
            self.write_run(change(self.read_run()))


def live_parts_besides(directory: Path, part: Part) -> list[str]:
    """Labels of the other parts at work; call under the guard."""
    return [label for label in live_parts(directory) if label != part.label]
