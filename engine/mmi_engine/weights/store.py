"""Safetensors written tensor by tensor, so that a file of any size needs memory for one tensor only.

Place in the flow: imports (`importing.py`) and saved models (`model/checkpoint.py`) end here. One file is
``model.safetensors``; more are ``model-00001-of-0000N.safetensors`` with ``model.safetensors.index.json``, as on the
hub. Format: 8 bytes little-endian length of the header, a JSON header, then the tensors without gaps.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmi_engine.errors import OutputError
from mmi_engine.weights.find import INDEX

SHARD_BYTES = 5 * 10**9
_OWN = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors|" + re.escape(INDEX))
_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class File:
    """A weight file to be written: its name and its tensors in order."""

    name: str
    tensors: tuple[Planned, ...]

    @property
    def header(self) -> bytes:
        """Length and header as they stand at the file's beginning."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            entries[tensor.name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.bytes],
            }
            offset += tensor.bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(tensor.bytes for tensor in self.tensors)


def split(tensors: Iterable[Planned], limit: int = SHARD_BYTES) -> list[File]:
    """Deal tensors to files of at most ``limit`` bytes of data, in their order; a larger one gets a file of its own.

    Within a file wide dtypes come first, so that every tensor is aligned to its items.
    """
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    for group in groups:
        group.sort(key=lambda tensor: -tensor.dtype.itemsize)
    if len(groups) == 1:
        return [File("model.safetensors", tuple(groups[0]))]
    total = len(groups)
    return [File(f"model-{n:05}-of-{total:05}.safetensors", tuple(group)) for n, group in enumerate(groups, 1)]


def write(file: File, directory: Path, value: Callable[[Planned], Tensor]) -> Path:
    """Write a file; it appears complete or not at all.

    Args:
        file: what to write.
        directory: where.
        value: asked for every tensor in order; shape and dtype must be the planned ones.
    """
    return _appear(_write_partial(file, directory, value))


def save(files: list[File], directory: Path, value: Callable[[Planned], Tensor]) -> None:
    """Write a directory's weight files in the place of an earlier save's.

    All of them are complete before the first appears. Several are not replaced in one moment, and those of two saves
    bear the same names: the index goes first and comes last, and `find.find` refuses shards without theirs. So what a
    kill leaves half-replaced is never read as a model.

    Args:
        files, directory, value: see :func:`write`.
    """
    partials: list[Path] = []
    try:
        for file in files:
            partials.append(_write_partial(file, directory, value))
    except BaseException:
        for path in partials:
            path.unlink(missing_ok=True)
        raise
    (directory / INDEX).unlink(missing_ok=True)
    for path in partials:
        _appear(path)
    _clean(files, directory)
    write_index(files, directory)


def _appear(partial: Path) -> Path:
    path = partial.with_name(partial.name.removesuffix(".partial"))
    os.replace(partial, path)
    return path


def _write_partial(file: File, directory: Path, value: Callable[[Planned], Tensor]) -> Path:
    partial = directory / f"{file.name}.partial"
    try:
        with partial.open("wb") as stream:
            stream.write(file.header)
            for planned in file.tensors:
                tensor = value(planned).detach().cpu().contiguous()
                assert tuple(tensor.shape) == planned.shape and tensor.dtype == planned.dtype, planned.name
                stream.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


def write_index(files: list[File], directory: Path) -> None:
    """The index of several files; one file needs none."""
    if len(files) < 2:
        return
    table = {
        "metadata": {"total_size": sum(tensor.bytes for file in files for tensor in file.tensors)},
        "weight_map": {tensor.name: file.name for file in files for tensor in file.tensors},
    }
    write_text(directory / INDEX, json.dumps(table, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file; it appears complete or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def start_anew(staging: Path, *, besides: Iterable[str] = ()) -> None:
    """Remove the folder that an earlier attempt left half-written.

    Args:
        staging: the folder.
        besides: names that may stand in it beside those of a model directory.

    Raises:
        OutputError: it holds something else, which is the user's.
    """
    if not staging.exists():
        return
    own = {"config.json", "tokenizer.json", "tokenizer.model", *besides}
    names = [path.name for path in staging.iterdir()] if staging.is_dir() else [staging.name]
    for name in names:
        if name not in own and not _OWN.fullmatch(name.removesuffix(".partial")):
            raise OutputError(
                f"{staging} is in the way: {name} is no part of an unfinished model",
                remedy="move it, or choose another --out",
            )
    shutil.rmtree(staging)


def _clean(files: list[File], directory: Path) -> None:
    """Remove weight files of an earlier save that the present one did not replace, finished or not."""
    kept = {file.name for file in files}
    for path in directory.iterdir():
        if _OWN.fullmatch(path.name.removesuffix(".partial")) and path.name not in kept:
            path.unlink()
