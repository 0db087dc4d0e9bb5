"""Manifest rows: JSON lines in, one `Row` per line out, whatever the line holds.

Place in the flow: the first module that touches user input; `tasks.py` turns a row into pieces, `run.py` into a line
of `results.jsonl` or `errors.jsonl`. A broken line becomes a row with an error (line number, stable code, remedy) and
never takes the rest down; only a manifest that cannot be opened at all raises `ManifestError`.

Format: jsonlines.org (UTF-8, one JSON object a line, `\\n` or `\\r\\n`), lenient where real files are: a byte order
mark at the start and blank lines are passed over. Codes: `bad_encoding`, `bad_json`, `bad_row`, `line_too_long`,
`bad_id`, `duplicate_id`, `bad_seed`.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mmi_engine.data import strict, tables
from mmi_engine.errors import ManifestError, RowError

MAX_LINE_BYTES = 256 * 2**20  # a row may hold several pictures as data: URIs
ID_WIDTH = 6  # default ids: 000001, 000002, … (the line number)
ASK_ALL = "; vqa --question and ground --expression ask the same of every picture in a folder"
MAX_SEED = 2**63 - 1
_SPOOL_BYTES = 32 * 2**20
_BINARY = (b"PAR1", b"\x89PNG", b"\xff\xd8\xff", b"PK\x03\x04", b"\x1f\x8b", b"\x89HDF", b"GIF8")


@dataclass(frozen=True)
class Row:
    """One manifest line.

    Attributes:
        line: 1-based line number, counting blank lines; the order of the manifest.
        id: `id`, else `custom_id`, else the zero-padded line number; unique among rows without an error.
        data: the parsed object ({} when the line could not be parsed).
        error: why the row cannot be worked on, or None.
    """

    line: int
    id: str
    data: dict[str, Any] = field(default_factory=dict)
    error: RowError | None = None

    @property
    def seed(self) -> int | None:
        """The row's own seed, or None."""
        return self.data.get("seed")

    @property
    def meta(self) -> Any:
        """What the user attached to the row; passed through to its result."""
        return self.data.get("meta")


class Manifest:
    """A manifest that can be read more than once: a file, a folder, or a pipe spooled to a temporary file.

    Args:
        source: path of a JSONL file or of what `tables.py` reads, a named pipe, or ``-`` for standard input.
        root: folder that image paths are relative to; default the manifest's folder, for pipes the working directory.
        stdin: replaces standard input (for embedding).
        column: the one field of a row that a folder of pictures (``image``) or a list of texts fills, see `tables.py`.

    Raises:
        ManifestError: the file is missing, is no regular file, cannot be read, or is UTF-16.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        root: str | Path | None = None,
        stdin: BinaryIO | None = None,
        column: str | None = None,
    ):
        self.column = column
        self.format = tables.format_of(source, column)
        self._spool: BinaryIO | None = None
        self._names: list[str] = []
        if str(source) == "-":
            self.path: Path | None = None
            self.name = "stdin"
            folder = Path.cwd()
            self._fill_spool(stdin or sys.stdin.buffer)
        elif _is_pipe(source):
            self.path, self.name, folder = None, "pipe", Path.cwd()
            with Path(source).open("rb") as pipe:
                self._fill_spool(pipe)
        else:
            self.path = Path(source)
            self.name = self.path.name
            folder = self.path if self.format == "folder" else self.path.parent
            if self.format != "folder":
                self._check_readable(self.path)
            if self.format == "picture":
                self._names = [self.path.name]
        if root is not None and not Path(root).is_dir():
            raise ManifestError(f'--root "{root}" is not a folder', remedy="name the folder the images lie in")
        self.root = Path(root) if root is not None else folder
        self.root_label = os.path.relpath(self.root, folder)  # stays the same when the whole tree moves
        if self.format == "folder":  # listed once: what is written there meanwhile does not move the others
            assert self.path is not None
            self._names = list(tables.pictures(self.path))
            return
        with self._open() as stream:
            self._check_head(stream.read(8))

    def _check_head(self, head: bytes) -> None:
        """Refuse as a whole what is no manifest at all."""
        if self.format == "picture":
            return
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ManifestError(f"{self.name} is UTF-16", remedy="save it as UTF-8")
        if head.startswith(_BINARY):
            remedy = "name a file of JSON lines; other formats: mmi data import"
            raise ManifestError(f"{self.name} is no text file", remedy=remedy)
        if self.name.lower().endswith(".json") and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise ManifestError(
                f"{self.name} is one JSON array, not JSON lines", remedy=f"jq -c '.[]' {self.name} > rows.jsonl"
            )

    def _fill_spool(self, stream: BinaryIO) -> None:
        """Keep what can be read only once."""
        spool: BinaryIO = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # type: ignore[assignment]  # noqa: SIM115
        shutil.copyfileobj(stream, spool)
        self._spool = spool
        weakref.finalize(self, spool.close)

    def _check_readable(self, path: Path) -> None:
        remedy = "check the path, or use - to read from standard input"
        if self.column == "prompt" and " " in str(path):
            remedy = """one prompt: echo '{"prompt": "…"}' | mmi t2i - --out DIR"""
        try:
            if path.is_dir():
                raise ManifestError(f'manifest "{path}" is a folder', remedy=f"name a JSONL file in it{ASK_ALL}")
            if not path.is_file():  # a device would end nowhere
                raise ManifestError(f'manifest "{path}" not found', remedy=remedy)
            with path.open("rb"):
                pass
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ManifestError(f'manifest "{path}" cannot be read: {reason}') from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        if self._spool is not None:
            self._spool.seek(0)
            yield self._spool
            return
        assert self.path is not None
        try:
            with self.path.open("rb") as stream:
                yield stream
        except OSError as error:
            raise ManifestError(f'manifest "{self.path}" cannot be read: {error.strerror}') from error

    def fingerprint(self) -> str:
        """sha256 of the manifest's bytes, as hex; of a folder, of the names of its pictures."""
        digest = hashlib.sha256()
        if self.format in ("folder", "picture"):
            for name in self._names:
                digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
            return digest.hexdigest()
        with self._open() as stream:
            for block in iter(lambda: stream.read(2**20), b""):
                digest.update(block)
        return digest.hexdigest()

    def rows(self) -> Iterator[Row]:
        """Every non-blank line as a `Row`, in order, one in memory at a time.

        An id that occurred before makes the later row an error (`duplicate_id`): the first one wins.
        """
        seen: set[str] = set()
        for row in self._parsed():
            if row.error is None:
                if row.id in seen:
                    error = RowError(
                        f'id "{shorten(row.id)}" occurs before',
                        remedy="ids must be unique; the first row with it was kept",
                        code="duplicate_id",
                    )
                    row = Row(row.line, row.id, row.data, error)
                seen.add(row.id)
            yield row

    def _parsed(self) -> Iterator[Row]:
        if self.format in ("folder", "picture"):
            for line, name in enumerate(self._names, 1):
                if name.isprintable() or name.encode("utf-8", "ignore").decode() == name:
                    yield from_object(line, {"id": name, "image": name})
                else:
                    error = RowError("the file's name is not UTF-8", remedy="rename it", code="bad_encoding")
                    yield Row(line, f"{line:0{ID_WIDTH}d}", error=error)
            return
        with self._open() as stream:
            lines = _lines(stream)
            if self.format == "jsonl":
                rows = (parse_row(line, raw) for line, raw in lines)
            else:
                found = tables.read(self.format, lines, self.column)
                rows = (
                    parsed if isinstance(parsed, Row) else from_object(line, parsed) for line, parsed in _as_rows(found)
                )
            yield from (row for row in rows if row is not None)


def _is_pipe(source: str | os.PathLike[str]) -> bool:
    """Whether it is a named pipe, as the shell's ``<(…)`` makes them."""
    try:
        return stat.S_ISFIFO(os.stat(source).st_mode)
    except (OSError, ValueError):
        return False


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes) pairs; None stands for a line over `MAX_LINE_BYTES`, which is skipped, not held."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_LINE_BYTES)
            yield number, None
            continue
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        yield number, raw


def parse_row(line: int, raw: bytes | None) -> Row | None:
    """One line of bytes as a `Row`; None for a blank line. Never raises.

    Args:
        line: 1-based line number, the default id.
        raw: the line's bytes; None for a line that was too long to read.
    """
    default = f"{line:0{ID_WIDTH}d}"
    if raw is None:
        message = f"line is longer than {MAX_LINE_BYTES >> 20} MiB"
        return Row(line, default, error=RowError(message, remedy="name image files instead", code="line_too_long"))
    if not raw.strip():
        return None
    try:
        data = _parse_json(raw)
    except RowError as error:
        return Row(line, default, error=error)
    return from_object(line, data)


def from_object(line: int, data: dict[str, Any]) -> Row:
    """A row from an object that is already parsed. Never raises."""
    try:
        row_id = _row_id(data, f"{line:0{ID_WIDTH}d}")
    except RowError as error:
        return Row(line, f"{line:0{ID_WIDTH}d}", error=error)
    try:
        _check_common(data)
    except RowError as error:
        return Row(line, row_id, data, error)
    return Row(line, row_id, data)


def _as_rows(found: Iterator[tuple[int, dict[str, Any] | RowError]]) -> Iterator[tuple[int, Any]]:
    """Errors of a table's rows as `Row`s, objects as they are."""
    for line, value in found:
        yield line, Row(line, f"{line:0{ID_WIDTH}d}", error=value) if isinstance(value, RowError) else value


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 at byte {error.start + 1}", remedy="save as UTF-8", code="bad_encoding") from None
    try:
        data = strict.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(
            f"broken JSON: {error.msg} at character {error.pos + 1}",
            remedy="each line must be one complete JSON object"
            + ("" if text.lstrip().startswith(("{", "[")) else "; plain lines of text are read from a file named .txt"),
            code="bad_json",
        ) from None
    if not isinstance(data, dict):
        raise RowError(
            f"expected a JSON object, found {json_type(data)}", remedy='write {"…": …} on each line', code="bad_row"
        )
    return data


def _row_id(data: dict[str, Any], default: str) -> str:
    for key in ("id", "custom_id"):
        value = data.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or not value:
            found = "an empty string" if value == "" else json_type(value)
            raise RowError(f'"{key}" must be a non-empty string, found {found}', remedy="quote it", code="bad_id")
        return value
    return default


def _check_common(data: dict[str, Any]) -> None:
    seed = data.get("seed")
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise RowError(
            f'"seed" must be an integer from 0 to {MAX_SEED}', remedy="leave it out for the default", code="bad_seed"
        )


def json_type(value: Any) -> str:
    """The JSON name of a value's type with its article, for messages."""
    names: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "a string"),
        (list, "a list"),
        (dict, "an object"),
    ]
    return next((name for kind, name in names if isinstance(value, kind)), "null")


def shorten(text: str, width: int = 60) -> str:
    """`text` on one line, at most `width` characters, control characters shown as escapes."""
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return clean if len(clean) <= width else clean[: width - 1] + "…"


def item_seed(run_seed: int, item_id: str) -> int:
    """A stable seed in [0, 2**53) from the run's seed and the item's id: the same whatever else is in the run.

    53 bits survive every JSON reader.
    """
    digest = hashlib.sha256(f"{run_seed}:".encode() + item_id.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 11
