"""``mmi model import``: a released checkpoint becomes a model directory, shard by shard.

    shards ─ names, shapes, dtypes, checksums verified ─ OUT.partial/ (file after file) ─ renamed to OUT

Nothing is written before everything about the checkpoint has been verified. OUT appears complete or not at all; an
interrupted import leaves OUT.partial with its finished files, and the same command goes on behind them. One tensor is
held at a time beside the mapped shard, so the peak is one shard and what one tensor needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmi_engine.errors import ModelError, OutputBusyError, OutputError
from mmi_engine.model.checkpoint import fitting_tokenizer
from mmi_engine.model.config import ModelConfig
from mmi_engine.model.presets import released_config
from mmi_engine.weights import released, store
from mmi_engine.weights.find import describes_ours, kind, tokenizer_file
from mmi_engine.weights.shards import Shard, list_shards

PLAN = "plan.json"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Imported:
    """What an import did: tensors and bytes written, files finished by an earlier call, names left out on purpose.

    ``made``: our name → how rows that nothing held were made.
    """

    directory: Path
    tensors: int
    bytes: int
    files: int
    resumed: int
    dropped: tuple[str, ...]
    made: dict[str, str] = field(default_factory=dict)


def import_released(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    config: ModelConfig | None = None,
    bases: tuple[Path, ...] = (),
    new_rows: str | None = None,
    shard_bytes: int = store.SHARD_BYTES,
    progress: Progress | None = None,
    wait: bool = False,
) -> Imported:
    """Convert a checkpoint.

    Args:
        source: folder with the shards, or one file.
        out: the model directory to be made.
        dtype: storage dtype of parameters; ``None`` keeps theirs. Buffers keep theirs always.
        tokenizer: file, folder or hub id; ``None`` looks into ``source``.
        config: of the model; ``None`` takes ``source/config.json`` when it is one of ours, else the released layout.
        bases: directories of base models for sub-models that the checkpoint does not hold.
        new_rows: ``mean`` for embeddings of new tokens that neither has; ``None`` refuses.
        shard_bytes: largest file of the result.
        progress: called with (bytes done, bytes in all).
        wait: for another import into the same place; without it, that one is an error.

    Raises:
        ModelError: damaged, truncated, incomplete or foreign checkpoint, or no tokenizer; nothing is left behind.
        OutputError: ``out`` exists already, or the disk is too small.
    """
    source, out = Path(source), Path(os.path.abspath(out))  # "." has no name of its own
    with _alone(out, wait):
        if wait and kind(out) == "ours":
            return Imported(out, 0, 0, 0, 0, ())
        if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
            raise OutputError(f"{out} is there already", remedy="choose another --out, or remove it first")
        shards = list_shards(source)
        config = config or _own_config(source) or released_config()
        token_file = tokenizer_file(tokenizer or str(source if source.is_dir() else source.parent))
        match = released.match(config, shards, bases, new_rows=new_rows)
        released.require_complete(match, source)
        files = store.split([_planned(place, dtype) for place in match.placed], shard_bytes)
        staging = out.with_name(f"{out.name}.partial")
        plan = _plan(match, files, config, token_file)
        if not (staging / PLAN).is_file():
            store.start_anew(staging, besides=[f"{PLAN}.partial"])
        resumed = (staging / PLAN).is_file() and (staging / PLAN).read_text(encoding="utf-8") == plan
        _require_space(out.parent, sum(file.bytes for file in files), staging if resumed else None)
        try:
            if not resumed:
                _verify_and_stage(match, source, staging, token_file, config, plan)
            done = _write_files(match, files, staging, progress or (lambda done, total: None))
        except ModelError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        except OSError as error:
            remedy = "free some space and run the same command again: it goes on where it stopped"
            raise OutputError(f"{staging} cannot be written: {error.strerror}", remedy=remedy) from error
        store.write_index(files, staging)
        (staging / PLAN).unlink()
        os.replace(staging, out)
    size = sum(file.bytes for file in files)
    made = {place.ours: released.MADE[place.made] for place in match.placed if place.made}
    return Imported(out, len(match.placed), size, len(files), done, tuple(match.dropped), made)


def _own_config(source: Path) -> ModelConfig | None:
    return ModelConfig.load(source) if source.is_dir() and describes_ours(source) else None


def _planned(place: released.Placed, dtype: torch.dtype | None) -> store.Planned:
    keeps = dtype is None or place.buffer or not place.entry.dtype.is_floating_point
    return store.Planned(place.ours, place.shape, place.entry.dtype if keeps else dtype)


def _plan(match: released.Match, files: list[store.File], config: ModelConfig, token_file: Path) -> str:
    """Everything the result depends on, as text: the same text means that a started import can be gone on with."""
    sources = {place.shard.path: place.shard.bytes for place in match.placed}
    return json.dumps(
        {
            "sources": [[str(p.resolve()), size, p.stat().st_mtime_ns] for p, size in sorted(sources.items())],
            "files": [[file.name, hashlib.sha256(file.header).hexdigest()] for file in files],
            "made": sorted([place.ours, place.made] for place in match.placed if place.made),
            "config": hashlib.sha256(config.to_json().encode()).hexdigest(),
            "tokenizer": hashlib.sha256(token_file.read_bytes()).hexdigest(),
        },
        indent=2,
    )


def _verify_and_stage(
    match: released.Match, source: Path, staging: Path, token_file: Path, config: ModelConfig, plan: str
) -> None:
    """Checks that read values, then the small files of the result; the plan comes last."""
    for shard in {place.shard.path: place.shard for place in match.placed}.values():
        shard.check()
    released.compare_fixed(match)
    released.require_complete(match, source)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    ending = ".json" if token_file.suffix == ".json" else ".model"
    shutil.copyfile(token_file, staging / f"tokenizer{ending}")
    fitting_tokenizer(staging, config)
    store.write_text(staging / "config.json", config.to_json())
    store.write_text(staging / PLAN, plan)


def _write_files(match: released.Match, files: list[store.File], staging: Path, progress: Progress) -> int:
    """Write what is not there yet; returns how many files were."""
    places = {place.ours: place for place in match.placed}
    total, written, before = sum(file.bytes for file in files), 0, 0
    with _Reader() as reader:

        def value(planned: store.Planned) -> Tensor:
            nonlocal written
            tensor = _value(reader, places[planned.name], planned.dtype)
            written += planned.bytes
            progress(written, total)
            return tensor

        for file in files:
            path = staging / file.name
            if path.is_file() and path.stat().st_size == file.bytes:
                before += 1
                written += sum(tensor.bytes for tensor in file.tensors)
            else:
                store.write(file, staging, value)
    return before


def _value(reader: _Reader, place: released.Placed, dtype: torch.dtype) -> Tensor:
    """A tensor as it is to be stored.

    Raises:
        ModelError: it holds values that are not finite, or that the storage dtype cannot hold.
    """
    tensor = released.fitted(place, reader.tensor(place.shard, place.name))
    result = tensor.to(dtype)
    if result.is_floating_point() and not bool(torch.isfinite(result).all()):
        if bool(torch.isfinite(tensor).all()):
            remedy = "store it as bf16 or fp32: --dtype bf16"
            raise ModelError(f"{place.shard.path}: {place.name} has values beyond {dtype}", remedy=remedy)
        remedy = "the file is damaged, or the training went wrong; fetch it again"
        raise ModelError(f"{place.shard.path}: {place.name} holds values that are not finite", remedy=remedy)
    return result


class _Reader:
    """One open shard at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._read: Any = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tensor(self, shard: Shard, name: str) -> Tensor:
        """A tensor of ``shard``, which stays open until another one is asked for."""
        if self._path != shard.path:
            self._read = None
            self._stack.close()
            self._read = self._stack.enter_context(shard.opened())
            self._path = shard.path
        tensor: Tensor = self._read(name)
        return tensor


def _require_space(folder: Path, needed: int, staging: Path | None) -> None:
    have = sum(path.stat().st_size for path in staging.iterdir()) if staging is not None else 0
    free = shutil.disk_usage(folder).free
    if free < needed - have:
        raise OutputError(
            f"{folder} has {free / 1e9:.1f} GB free, the model needs {(needed - have) / 1e9:.1f} GB",
            remedy="free some space, choose another --out, or store it as --dtype bf16",
        )


@contextlib.contextmanager
def _alone(out: Path, wait: bool) -> Iterator[None]:
    """Hold the lock of ``out``; the kernel frees it when the process dies."""
    path = out.parent / f".{out.name}.lock"
    while True:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("w")
        except OSError as error:
            reason = error.strerror
            raise OutputError(f"{out.parent} cannot be written: {reason}", remedy="choose another --out") from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                raise OutputBusyError(f"another import writes {out}", remedy="wait for it to end") from error
            if not path.exists() or path.stat().st_ino != os.fstat(stream.fileno()).st_ino:
                continue  # whoever held it has removed it
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
