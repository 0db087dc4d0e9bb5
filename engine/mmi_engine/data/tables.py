"""Manifests that are no JSON lines: a picture, a folder of them, a CSV or TSV with a header, a text file of lines.

Place in the flow: `manifest.py` asks what a path is and turns what comes from here into rows. In a table the columns
are the fields of a row; a cell that begins with ``[`` or ``{`` is read as JSON (lists of images, options, history), an
empty cell is no field. In a text file a line is the field the command works on: a prompt for `mmi t2i`, a path for
`mmi caption`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmi_engine.copies import COPIES
from mmi_engine.data import strict
from mmi_engine.errors import ManifestError, RowError
from mmi_engine.locks import STATE_DIR

# Files of a folder that are taken for pictures; what is inside decides when they are loaded.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".jp2", ".tga", ".qoi"),
    *(".ico", ".ppm", ".pgm", ".pbm", ".pnm"),
)
DELIMITERS = {"csv": ",", "tsv": "\t"}

Found = Iterator[tuple[int, "dict[str, Any] | RowError"]]


def format_of(source: str | os.PathLike[str], column: str | None) -> str:
    """``jsonl``, ``folder``, ``picture``, ``csv``, ``tsv`` or ``text``, by what the path is and its suffix.

    Args:
        source: as given on the command line.
        column: the field that a folder or a text file would fill; None when the command cannot use them.

    Raises:
        ManifestError: a text file for a command that needs more than one field.
    """
    path = Path(source)
    try:
        if column == "image" and str(source) != "-" and path.is_dir():
            return "folder"
    except (OSError, ValueError):
        return "jsonl"  # the manifest's own checks say what is wrong
    suffix = path.suffix.lower()
    if suffix in SUFFIXES and column == "image":
        return "picture"
    if suffix in (".csv", ".tsv"):
        return suffix[1:]
    if suffix == ".txt":
        if column is None:
            raise ManifestError(
                f'"{path.name}" is a text file, and this command needs rows of several fields',
                remedy="write JSON lines or a CSV with a header",
            )
        return "text"
    return "jsonl"


def pictures(folder: Path) -> Iterator[str]:
    """Paths of the pictures in a folder and its subfolders, relative to it, `/` between parts, in order of name.

    Hidden files and folders are passed over, and so are output folders of this program; links are not followed.

    Raises:
        ManifestError: the folder cannot be read.
    """

    def complain(error: OSError) -> None:
        raise ManifestError(f'folder "{folder}" cannot be read: {error.strerror}') from error

    for place, folders, files in os.walk(folder, onerror=complain):
        folders[:] = sorted(name for name in folders if not _passed_over(Path(place) / name))
        prefix = Path(place).relative_to(folder)
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield (prefix / name).as_posix()


def _passed_over(folder: Path) -> bool:
    """Hidden, or written by a run: its pictures are no inputs, and there may be more of them in a moment."""
    ours = folder.name == COPIES or (folder / "run.json").exists() or (folder / STATE_DIR).exists()
    return ours or folder.name.startswith(".")


def read(kind: str, lines: Iterable[tuple[int, bytes | None]], column: str | None) -> Found:
    """Objects, or what is wrong with them, by line number.

    Args:
        kind: ``csv``, ``tsv`` or ``text``.
        lines: (line number, bytes); None for a line that is too long.
        column: the field that a line of a text file fills.
    """
    texts = ((line, _decode(raw)) for line, raw in lines)
    if kind == "text":
        assert column is not None
        return _plain(texts, column)
    return _table(texts, DELIMITERS[kind])


def _decode(raw: bytes | None) -> str | RowError:
    if raw is None:
        return RowError("the line is too long", remedy="name image files instead", code="line_too_long")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 at byte {error.start + 1}", remedy="save as UTF-8", code="bad_encoding")


def _plain(texts: Iterator[tuple[int, str | RowError]], column: str) -> Found:
    for line, text in texts:
        if isinstance(text, RowError):
            yield line, text
        elif text.strip():
            yield line, {column: text.strip()}


def _table(texts: Iterator[tuple[int, str | RowError]], delimiter: str) -> Found:
    """Rows of a table; a quoted cell may hold line breaks, and a row is named by its last line."""
    header: list[str] | None = None
    at, broken = 0, list[tuple[int, RowError]]()

    def words() -> Iterator[str]:
        nonlocal at
        for line, text in texts:
            at = line
            if isinstance(text, RowError):
                broken.append((line, text))
            else:
                yield text

    reader = csv.reader(words(), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield at, RowError(f"broken table: {error}", remedy="quote cells with commas or quotes", code="bad_row")
            continue
        yield from broken
        broken.clear()
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            continue
        yield at, _object(header, cells)
    yield from broken


def _object(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        return RowError(
            f"{len(cells)} cells under {len(header)} columns", remedy="quote cells with commas", code="bad_row"
        )
    data: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if not cell.strip():
            continue
        data[name] = cell
        if cell.lstrip().startswith(("[", "{")):
            try:
                data[name] = strict.loads(cell)
            except json.JSONDecodeError:
                pass  # a text may happen to begin with a bracket
            except RowError as error:
                return RowError(f'column "{name}": {error.message}', remedy=error.remedy, code=error.code)
    if isinstance(data.get("seed"), str) and data["seed"].strip().isdigit():
        with contextlib.suppress(ValueError):  # ², or thousands of digits: refused as the seed of any row
            data["seed"] = int(data["seed"])
    return data
