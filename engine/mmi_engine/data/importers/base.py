"""The writing half of an import: rows to ``manifest.jsonl``, pictures beside it, counts to ``import.json``.

Place in the flow: `mmi data import` names a format; `run_import` opens a `Sink` and drains the format's reader into it.
Rows are written as they come, under a temporary name until the import is whole. Pictures stay where they are and are
named relative to the manifest, unless they are copied or have to be unpacked.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmi_engine.errors import ManifestError, OutputError, UsageError
from mmi_engine.names import Stems

MANIFEST, RECORD = "manifest.jsonl", "import.json"


@dataclass(frozen=True)
class ImportOptions:
    """What the user chose.

    Attributes:
        images: folder of the pictures; default the source's own folder.
        annotations: a second file that some formats have.
        split: only rows of this split, where a format knows splits.
        boxes: ``xywh`` or ``xyxy``, where a format leaves that open.
        given: stories: only the first N pictures are given, the others are to be generated.
        copy: copy pictures into the output folder.
        keep_missing: keep rows whose pictures are not there.
        limit: at most this many rows.
        trust_pickle: unpickling (which runs code) is allowed.
    """

    images: Path | None = None
    annotations: Path | None = None
    split: str | None = None
    boxes: str | None = None
    given: int | None = None
    copy: bool = False
    keep_missing: bool = False
    limit: int | None = None
    trust_pickle: bool = False


@dataclass
class Report:
    """What an import came to: rows written, pictures saved, and why the others were dropped."""

    rows: int = 0
    images: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Drop(Exception):
    """Raised by a reader's helper to drop the row at hand.

    Args:
        reason: a short stable code, counted.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Sink:
    """Where a reader leaves its rows' pictures, and what it drops.

    Args:
        source: the file or folder that is imported.
        out: the output folder.
        options: see `ImportOptions`.
    """

    def __init__(self, source: Path, out: Path, options: ImportOptions) -> None:
        self.source, self.out, self.options = source, out, options
        self.folder = options.images or (source if source.is_dir() else source.parent)
        self.report = Report()
        self.ids: set[str] = set()  # of the rows that are in the manifest
        self._stems = Stems()

    def drop(self, reason: str) -> None:
        """Count a row that is left out."""
        self.report.dropped[reason] += 1

    def wanted(self, split: str | None) -> bool:
        """Whether a row of this split is asked for; rows of other splits are no losses and are not counted."""
        return self.options.split is None or split == self.options.split

    def image(self, name: Any) -> str:
        """A picture of the data set as the manifest names it.

        Args:
            name: path relative to the picture folder, absolute, or a URI (kept as it is).

        Raises:
            Drop: no string (`bad_image`), or not there (`image_not_found`).
        """
        if not isinstance(name, str) or not name.strip():
            raise Drop("bad_image")
        if name.startswith(("data:", "http://", "https://")):
            return name
        path = self.folder / name
        if not _is_file(path):
            if not self.options.keep_missing:
                raise Drop("image_not_found")
        elif self.options.copy:
            return self._copied(path)
        return os.path.relpath(path.absolute(), self.out.absolute()).replace(os.sep, "/")

    def find_image(self, stem: str, suffixes: tuple[str, ...] = (".jpg", ".png", ".jpeg", ".webp", ".gif")) -> str:
        """A picture whose suffix the data set does not tell; raises Drop (`image_not_found`)."""
        for suffix in suffixes:
            if _is_file(self.folder / (stem + suffix)):
                return self.image(stem + suffix)
        return self.image(stem + suffixes[0])

    def save(self, item_id: str, content: bytes, number: int | None = None) -> str:
        """Write a picture that lies inside another file; its name in the manifest.

        Raises:
            Drop: it cannot be decoded (`image_unreadable`); see also `save_picture`.
        """
        from mmi_engine.data.images import decode
        from mmi_engine.errors import ImageError

        try:
            picture = decode(content, "the picture")
        except ImageError:
            raise Drop("image_unreadable") from None
        return self.save_picture(item_id, picture, number)

    def save_picture(self, item_id: str, picture: Any, number: int | None = None) -> str:
        """Write a PIL picture as PNG; its name in the manifest.

        Raises:
            Drop: a row with this id is there, and so may be its picture (`duplicate_id`); an id that cannot be written
                (`bad_encoding`).
        """
        if not _encodes(item_id):
            raise Drop("bad_encoding")
        if item_id in self.ids:
            raise Drop("duplicate_id")
        self._stems.add(item_id)
        stem = self._stems[item_id]
        name = f"images/{stem}.png" if number is None else f"images/{stem}/{number:02d}.png"
        target = self.out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target, format="PNG")
        self.report.images += 1
        return name

    def _copied(self, path: Path) -> str:
        self._stems.add(str(path))
        inside = path.resolve().is_relative_to(self.folder.resolve())
        relative = path.resolve().relative_to(self.folder.resolve()).as_posix() if inside else self._stems[str(path)]
        target = self.out / "images" / relative
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            self.report.images += 1
        return f"images/{relative}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


Reader = Callable[[Sink], Iterator[dict[str, Any]]]


def run_import(
    reader: Reader, name: str, source: Path, out: Path, options: ImportOptions, progress: Callable[[int], None]
) -> Report:
    """Drain a reader into ``out/manifest.jsonl``.

    Args:
        reader: of the format `name`.
        source: file or folder.
        out: made when missing.
        options: see `ImportOptions`.
        progress: told the number of rows now and then.

    Raises:
        UsageError: an output folder that holds a manifest already.
        ManifestError: the source cannot be read at all.
        OutputError: the disk refuses.
    """
    if not source.exists():
        raise ManifestError(f'"{source}" not found', remedy="name the data set's file or folder")
    if (out / MANIFEST).exists():
        raise UsageError(f"{out} holds a {MANIFEST} already", remedy="choose another --out, or remove it")
    sink = Sink(source, out, options)
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = out / f"{MANIFEST}.partial"
        with partial.open("w", encoding="utf-8", newline="\n") as stream:
            for line in _lines(reader(sink), sink):
                stream.write(line)
                sink.report.rows += 1
                if sink.report.rows % 1000 == 0:
                    progress(sink.report.rows)
                if sink.report.rows == options.limit:
                    break
        record = {"format": name, "rows": sink.report.rows, "images": sink.report.images}
        record["dropped"] = dict(sorted(sink.report.dropped.items()))
        (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, out / MANIFEST)
    except (OSError, UnicodeEncodeError) as error:
        raise OutputError(
            f'cannot import into "{out}": {error}', remedy="free space or choose another --out"
        ) from error
    return sink.report


def _lines(rows: Iterator[dict[str, Any]], sink: Sink) -> Iterator[str]:
    """Rows as the manifest holds them; dropped are those that it cannot hold, and ids that occurred before."""
    for row in rows:
        line = json.dumps(row, ensure_ascii=False) + "\n"
        if not _encodes(line):
            sink.drop("bad_encoding")
        elif row["id"] in sink.ids:
            sink.drop("duplicate_id")
        else:
            sink.ids.add(row["id"])
            yield line


def _encodes(text: str) -> bool:
    """Whether it can be written: half of a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
