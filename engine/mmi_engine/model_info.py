"""A model directory from its files alone: parts, sizes, memory per dtype, fingerprint. No weight is loaded.

Place in the flow: `mmi model info` and `--dry-run` show `describe`; `engine.py` records `fingerprint` in run.json.
Source: the safetensors format (8 bytes of header length, a JSON header, then the tensors).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_engine.errors import ModelError
from mmi_engine.weights.find import cache_root, find, kind

if TYPE_CHECKING:
    from mmi_engine.model.config import ModelConfig

KEPT_BYTES = 2**28  # smaller models are hashed in less than a second
CLOCK_TICK_S = 2.0  # no file system's times are coarser


@dataclass(frozen=True)
class ModelInfo:
    """What a model directory holds.

    Attributes:
        directory: where it is.
        name: from its configuration.
        image_size: side in pixels of the pictures it makes.
        parts: name of a top-level module → number of parameters.
        tensors, parameters, bytes: totals; bytes as stored.
        stored: dtype names of the stored tensors, most frequent first.
        fingerprint: see `fingerprint`.
        config: the whole configuration.
    """

    directory: Path
    name: str
    image_size: int
    parts: dict[str, int]
    tensors: int
    parameters: int
    bytes: int
    stored: tuple[str, ...]
    fingerprint: str
    config: ModelConfig

    def memory_bytes(self, dtype: str) -> int:
        """Need in bytes of one sequence with a full context in ``fp32``, ``bf16`` or ``fp16``."""
        from mmi_engine.weights.estimate import need

        return need(self.config, self.parameters, dtype).total


def locate(name: str, *, convert: bool = True) -> Path:
    """Directory of a model by embedded name, path or hub id, without importing the model code.

    Args:
        convert: whether a released checkpoint is to be converted on first use; see `weights.find`.

    Raises:
        ModelError: there is none, or one that misses a file.
    """
    return find(name, convert=convert)


def family_of(name: str) -> str:
    """``toon`` for the embedded model and what was trained from it, else ``released``; by the configuration's name."""
    return "toon" if name.startswith("toon") else "released"


def family(name: str) -> str:
    """Family of a model by embedded name or path: whose prompts and lengths it knows.

    Raises:
        ModelError: it is not there, or has no readable configuration.
    """
    directory = locate(name, convert=False)
    path = directory / "config.json"
    if kind(directory) == "released":
        return "released"
    try:
        return family_of(str(json.loads(path.read_text(encoding="utf-8"))["name"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"{path} cannot be read", remedy="restore the model directory") from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, or the pickled shards of a released one, sorted by name."""
    return sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))


def fingerprint(directory: Path) -> str:
    """sha256 over configuration, tokenizer and weights, as hex: equal for copies, whatever their path.

    Every byte counts, so a changed weight is noticed. Of a large model it is computed once and kept under
    ``$MMI_CACHE/fingerprints`` for as long as the files' sizes, inodes and times stay what they are; the time of the
    last change of an inode cannot be set back.

    Raises:
        ModelError: a file cannot be read.
    """
    names = ("config.json", "tokenizer.json", "tokenizer.model")
    files = [directory / name for name in names if (directory / name).is_file()]
    files += weight_files(directory)
    try:
        state = _state(files)
        large = sum(path.stat().st_size for path in files) >= KEPT_BYTES
        kept = _place(state) if large else None
        if kept is not None and (known := _kept(kept)):
            return known
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            with path.open("rb") as stream:
                for block in iter(lambda: stream.read(2**22), b""):
                    digest.update(block)
        if kept is not None and _settled(files) and _state(files) == state:
            _keep(kept, digest.hexdigest())
    except OSError as error:
        raise ModelError(f"{error.filename or directory} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _state(files: list[Path]) -> str:
    """What changes whenever one of the files does, or is called otherwise (a link keeps its target's times)."""
    found = [([path.name, str(path.resolve())], path.stat()) for path in files]
    return json.dumps([[*p, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for p, s in found])


def _place(state: str) -> Path | None:
    """Where the fingerprint of files in this state is kept; ``None`` for a user without a home, whom it costs time."""
    with contextlib.suppress(ModelError):
        return cache_root() / "fingerprints" / hashlib.sha256(state.encode()).hexdigest()
    return None


def _settled(files: list[Path]) -> bool:
    """Whether the last change is long enough ago that another one would have got another time."""
    return all(max(s.st_mtime, s.st_ctime) < time.time() - CLOCK_TICK_S for s in map(Path.stat, files))


def _kept(path: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = path.read_text(encoding="ascii")
        return text if re.fullmatch("[0-9a-f]{64}", text) else None
    return None


def _keep(path: Path, value: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a home that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(value, encoding="ascii")
        os.replace(partial, path)


def describe(name: str) -> ModelInfo:
    """Look into a model directory.

    Args:
        name: ``toon``, a directory (a released one is not converted for this), or a hub id.

    Raises:
        ModelError: no such model, or damaged files.
    """
    directory = locate(name, convert=False)
    config, headers = _described(directory)
    parts: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    tensors = 0
    for header in headers:
        for key, entry in header.items():
            count = math.prod(entry["shape"])
            parts[key.split(".")[0]] += count
            stored[entry["dtype"]] += count
            tensors += 1
    return ModelInfo(
        directory=directory,
        name=config.name,
        image_size=config.image_decoder.vae.image_size,
        parts=dict(parts.most_common()),
        tensors=tensors,
        parameters=sum(parts.values()),
        bytes=sum(path.stat().st_size for path in weight_files(directory)),
        stored=tuple(dtype for dtype, _ in stored.most_common()),
        fingerprint=fingerprint(directory),
        config=config,
    )


def _described(directory: Path) -> tuple[ModelConfig, list[dict[str, Any]]]:
    """Configuration and headers of a directory; a released one is described by the built-in configuration."""
    from mmi_engine.model.config import ModelConfig
    from mmi_engine.weights.find import describes_ours

    if kind(directory) != "released":
        return ModelConfig.load(directory), [_header(path) for path in weight_files(directory)]
    from mmi_engine.model.presets import released_config
    from mmi_engine.weights.shards import list_shards

    config = ModelConfig.load(directory) if describes_ours(directory) else released_config()
    headers = []
    for shard in list_shards(directory):
        entries = shard.entries().items()
        headers.append({n: {"shape": e.shape, "dtype": str(e.dtype).removeprefix("torch.")} for n, e in entries})
    return config, headers


def _header(path: Path) -> dict[str, Any]:
    """Names, shapes and dtypes of a safetensors file."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > 100 * 2**20:
                raise ValueError("header too long")
            header = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        remedy = "restore the model directory"
        raise ModelError(f"{path} is no readable safetensors file: {error}", remedy=remedy) from error
    header.pop("__metadata__", None)
    return header
