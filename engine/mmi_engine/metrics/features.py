"""Features of many pictures: in batches, with progress, each file once, kept by the hash of its bytes.

Place in the flow: `frechet.py`, `kid.py` and `clip.py` hand over pictures and an `Extractor`. The cache is one SQLite
file per extractor and weights (``CACHE/NAME-FINGERPRINT.sqlite``: sha256 of the file → float32 bytes), safe to share
between processes; deleting it costs time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mmi_engine.errors import ImageError, ModelError
from mmi_engine.metrics.base import Options
from mmi_engine.metrics.pictures import Source, grey

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

WINDOW = 2048  # pictures looked up in the cache at a time


class Extractor(Protocol):
    """A network that turns pictures into vectors.

    Attributes:
        name: for messages and the cache's file; fingerprint: of weights and preparation; width: of a vector.
    """

    name: str
    fingerprint: str
    width: int

    def prepare(self, image: Image.Image) -> Any:
        """An RGB picture as the network takes it; called once per picture, on the CPU."""
        ...

    def features(self, prepared: list[Any]) -> np.ndarray:
        """Vectors ``[b, width]`` float32 of a batch."""
        ...


class Cache:
    """Vectors by key; without a folder it forgets at once."""

    def __init__(self, folder: Path | None, extractor: Extractor) -> None:
        self._file: sqlite3.Connection | None = None
        self._width = extractor.width
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{extractor.name}-{extractor.fingerprint[:16]}.sqlite"
            self._file = sqlite3.connect(path, timeout=60.0, isolation_level=None)
            self._file.execute("CREATE TABLE IF NOT EXISTS features (key TEXT PRIMARY KEY, value BLOB)")
        except (OSError, sqlite3.Error) as error:
            log.warning("features are not kept: %s: %s", folder, error)
            self.close()

    def get(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Those of the keys that are there."""
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(keys) if self._file else 0, 500):
            part = list(keys[start : start + 500])
            marks = ",".join("?" * len(part))
            with self._guard():
                rows = self._file.execute(f"SELECT key, value FROM features WHERE key IN ({marks})", part)  # type: ignore[union-attr]
                found |= {key: np.frombuffer(value, np.float32) for key, value in rows}
        return {key: value for key, value in found.items() if value.shape == (self._width,)}

    def put(self, values: dict[str, np.ndarray]) -> None:
        """Keep vectors."""
        if self._file and values:
            rows = [(key, value.astype(np.float32).tobytes()) for key, value in values.items()]
            with self._guard():
                self._file.execute("BEGIN IMMEDIATE")
                self._file.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", rows)
                self._file.execute("COMMIT")

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            log.warning("features are not kept: %s", error)
            self.close()

    def close(self) -> None:
        """Done with it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def extract(
    extractor: Extractor, sources: Sequence[Source | None], options: Options, what: str
) -> tuple[np.ndarray, dict[int, str]]:
    """Features of pictures, a grey one for None.

    Args:
        sources: pictures by name.
        what: for the progress.

    Returns:
        features ``[n, width]`` float64, and index → reason for pictures that could not be loaded (grey in the array).

    Raises:
        ModelError: the network gives NaN or infinity for a picture.
    """
    cache = Cache(options.cache, extractor)
    out = np.zeros((len(sources), extractor.width))
    problems: dict[int, str] = {}
    try:
        for start in range(0, len(sources), WINDOW):
            part = range(start, min(start + WINDOW, len(sources)))
            _window(extractor, sources, part, options, cache, out, problems)
            options.progress(what, part.stop, len(sources))
    finally:
        cache.close()
    return out, problems


def _window(
    extractor: Extractor, sources: Sequence[Source | None], part: range, options: Options, cache: Cache,
    out: np.ndarray, problems: dict[int, str],
) -> None:  # fmt: skip
    keys = {index: _key(sources[index]) for index in part}
    known = cache.get(sorted(set(keys.values())))
    batch: dict[str, Any] = {}
    new: dict[str, np.ndarray] = {}

    def flush() -> None:
        if batch:
            values = extractor.features(list(batch.values()))
            bad = [key for key, value in zip(batch, values, strict=True) if not np.isfinite(value).all()]
            if bad:
                index = next(k for k, key in keys.items() if key == bad[0])
                source = sources[index]
                where = f"{source.place}: {source.name}" if source else "a grey picture"
                raise ModelError(f"{extractor.name} gives NaN for {where}", remedy="check the network's weights")
            new.update(zip(batch, values, strict=True))
            batch.clear()

    for index, key in keys.items():
        if key in known or key in new or key in batch:
            continue
        try:
            source = sources[index]
            batch[key] = extractor.prepare(source.load() if source is not None else grey())
        except ImageError as error:
            problems[index] = str(error)
            continue
        if len(batch) >= options.batch_size:
            flush()
            options.progress("features", index, len(sources))
    flush()
    cache.put(new)
    if any(index in problems for index in part):
        new["grey"] = extractor.features([extractor.prepare(grey())])[0]
    for index, key in keys.items():
        out[index] = new["grey"] if index in problems else known[key] if key in known else new[key]


def _key(source: Source | None) -> str:
    """sha256 of a file's bytes; of the reference itself for ``data:`` URIs and addresses."""
    if source is None:
        return "grey"
    try:
        with (source.loader.root / source.name).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError):  # no file: `load` says what is wrong with it
        return "ref-" + hashlib.sha256(f"{source.loader.root.absolute()}/{source.name}".encode()).hexdigest()


def spread(counts: Sequence[int], sources: Sequence[Sequence[Source | None]]) -> list[Source | None]:
    """Pictures of items in one list; an item whose pictures are missing gets grey ones."""
    return [
        source
        for count, item in zip(counts, sources, strict=True)
        for source in (item if len(item) == count else [None] * count)
    ]


def blame(problems: dict[int, str], counts: Sequence[int]) -> dict[int, str]:
    """Problems of pictures as problems of items; the first one of an item."""
    owner = np.repeat(np.arange(len(counts)), counts)
    found: dict[int, str] = {}
    for index, why in problems.items():
        found.setdefault(int(owner[index]), why)
    return found


def file_fingerprint(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """sha256 over names and bytes of a model directory's weights and JSON files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".safetensors", ".bin", ".txt", ".model") and path.is_file():
            digest.update(path.name.encode() + file_fingerprint(path).encode())
    return digest.hexdigest()
