"""Result and error rows on disk: how a line is written, found again, and compared.

Place in the flow: `outdir.py` appends and merges rows through this module. Rows are never all in memory; an index keeps
where each one lies.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)


class RowIndex:
    """Where the rows of some JSONL files lie: key → (file, offset, length). The first row with a key wins."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._places: dict[Any, tuple[Path, int, int]] = {}

    def add_file(self, path: Path, *, repair: bool) -> None:
        """Index a file; `repair` cuts off a last line that a kill left unfinished."""
        good = 0
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            return
        with stream:
            for raw in stream:
                row = parse(raw)
                if row is not None and self.key in row:
                    self._places.setdefault(row[self.key], (path, good, len(raw)))
                elif not raw.endswith(b"\n"):
                    break
                good += len(raw)
        if repair and path.stat().st_size != good:
            log.info("%s: cut off an unfinished line", path.name)
            os.truncate(path, good)

    def __contains__(self, key: Any) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Any]:
        """All keys, in the order in which they were found."""
        return iter(list(self._places))

    def read(self, keys: Iterable[Any]) -> Iterator[bytes]:
        """The raw lines of the keys that are there, in the order asked for."""
        with contextlib.ExitStack() as stack:
            streams: dict[Path, IO[bytes]] = {}
            for key in keys:
                if key in self._places:
                    path, offset, length = self._places[key]
                    if path not in streams:
                        streams[path] = stack.enter_context(path.open("rb"))
                    streams[path].seek(offset)
                    yield streams[path].read(length)


def parse(raw: bytes) -> dict[str, Any] | None:
    """A complete line as an object; None for anything else."""
    try:
        row = json.loads(raw)
    except ValueError:
        return None
    return row if isinstance(row, dict) and raw.endswith(b"\n") else None


def encode(row: dict[str, Any]) -> bytes:
    """A row as one line of UTF-8 JSON, with the line separators of Unicode escaped."""
    text = json.dumps(row, ensure_ascii=False)
    for character in ("\u2028", "\u2029", "\x85"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8") + b"\n"


def media_of(value: Any) -> list[str]:
    """The media paths a result row names: every string under the key ``image``, at any depth."""
    if isinstance(value, dict):
        own = [value["image"]] if isinstance(value.get("image"), str) else []
        return own + [name for key, inner in value.items() if key != "meta" for name in media_of(inner)]
    if isinstance(value, list):
        return [name for inner in value for name in media_of(inner)]
    return []


def differences(there: Any, here: Any, path: str = "") -> list[str]:
    """The leaves in which two JSON values differ, as ``settings.steps was 30, now 20``."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*there, *(key for key in here if key not in there)]
        found = []
        for key in keys:
            if there.get(key) != here.get(key):
                found += differences(there.get(key), here.get(key), f"{path}.{key}" if path else str(key))
        return found
    if path == "manifest":  # a hash
        return ["the manifest is another one, or has changed since"]
    was, now = (json.dumps(value, ensure_ascii=False) for value in (there, here))
    start = next((n for n, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    return [f"{path} was {_brief(was, start)}, now {_brief(now, start)}"]


def _brief(text: str, start: int) -> str:
    """At most 24 characters of a long text, from a little before ``start`` on."""
    if len(text) <= 24:
        return text
    first = max(0, min(start - 8, len(text) - 24))
    end = first + 24
    return ("…" if first else "") + text[first:end] + ("…" if end < len(text) else "")
