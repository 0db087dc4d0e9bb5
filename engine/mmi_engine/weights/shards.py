"""Files of tensors as other programs write them: listed, opened lazily, refused when damaged.

Place in the flow: first step of an import (`importing.py`). A checkpoint is a folder with ``*.safetensors`` or pickled
``*.bin`` shards (or one such file). Pickles are read with ``weights_only`` and memory-mapped, so opening a shard costs
nothing and no code in it runs. Formats: safetensors; torch's zip archive; torch's older pickle, which cannot be mapped
and is held in memory whole.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmi_engine.errors import ModelError

ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
NO_WEIGHTS = r"(training_args|optimizer|scheduler|scaler|random_states_\d+)\.(bin|pt|pth)"
WRAPPERS = ("module", "state_dict", "model")
"""Keys under which training programs put a state dictionary."""
FETCH_AGAIN = "fetch this file again and compare its size with the source's"
BLOCK = 2**20

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """A tensor that a shard holds: shape and dtype, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Shard:
    """One file of tensors.

    Raises (all methods):
        ModelError: the file is missing, truncated, damaged, no file of tensors, or asks for code to be run.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self.bytes = self.path.stat().st_size
            with self.path.open("rb") as stream:
                self._zip = stream.read(4) == b"PK\x03\x04"
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}", remedy="check path and rights") from error

    @property
    def safe(self) -> bool:
        """Whether it is a safetensors file."""
        return self.path.suffix == ".safetensors"

    def entries(self) -> dict[str, Entry]:
        """Name → shape and dtype of everything in it."""
        if self.safe:
            with self._safetensors() as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                read = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
            return {name: Entry(shape, self._known(name, dtype)) for name, (shape, dtype) in read.items()}
        return {
            name: Entry(tuple(tensor.shape), self._known(name, tensor.dtype, tensor.layout))
            for name, tensor in self._unpickle().items()
        }

    def _known(self, name: str, dtype: str | torch.dtype, layout: torch.layout = torch.strided) -> torch.dtype:
        found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if found is None or layout != torch.strided or found not in _DTYPES.values():
            raise ModelError(
                f"{self.path}: {name} is stored as {dtype}{'' if layout == torch.strided else f', {layout}'}, which is "
                "not supported",
                remedy="use shards in fp32, fp16 or bf16",
            )
        return found

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """A function name → tensor ``[shape]`` on the CPU; memory is mapped, and given back at the end."""
        if self.safe:
            with self._safetensors() as file:
                yield file.get_tensor
            return
        tensors = self._unpickle()
        try:
            yield tensors.__getitem__
        finally:
            tensors.clear()

    def check(self) -> None:
        """Read the whole file against the checksums it carries (torch's archives; the other formats have none)."""
        if self.safe or not self._zip:
            return
        try:
            with zipfile.ZipFile(self.path) as archive:
                for record in archive.infolist():
                    with archive.open(record) as stream:
                        while stream.read(BLOCK):
                            pass
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise ModelError(f"{self.path} is damaged: {error}", remedy=FETCH_AGAIN) from error

    @contextmanager
    def _safetensors(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError, KeyError) as error:
            raise ModelError(f"{self.path} is damaged or truncated: {error}", remedy=FETCH_AGAIN) from error

    def _unpickle(self) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols; what matters ends in an error
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._zip)
        except pickle.UnpicklingError as error:
            if code := re.search(r"GLOBAL ([\w.]+)|[Cc]lass ([\w.]+)", str(error)):
                raise ModelError(
                    f"{self.path} holds more than tensors ({code[1] or code[2]}); reading it could run code, so it is "
                    "not read",
                    remedy="use safetensors files, or shards of tensors alone from a source that you trust",
                ) from error
            raise ModelError(f"{self.path} is damaged, or no file of tensors", remedy=FETCH_AGAIN) from error
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, IndexError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"{self.path} is damaged or truncated: {first}", remedy=FETCH_AGAIN) from error
        return self._state_dict(content)

    def _state_dict(self, content: Any) -> dict[str, Tensor]:
        for key in WRAPPERS:
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict):
            raise ModelError(f"{self.path} holds no state dictionary", remedy="give the shards of a model")
        strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
        if strange:
            raise ModelError(f"{self.path}: {strange[0]!r} is no tensor", remedy="give the shards of a model")
        return content


def list_shards(source: Path) -> list[Shard]:
    """The shards of a checkpoint: what its index lists, else all weight files of one kind, sorted by name.

    Args:
        source: a folder or a single file.

    Raises:
        ModelError: there is none, or the index lists files that are not there.
    """
    source = Path(source)
    if source.is_file():
        return [Shard(source)]
    for ending in (".safetensors", ".bin"):
        for index in sorted(source.glob(f"*{ending}.index.json")):
            return [Shard(path) for path in _indexed(index)]
    for ending in ENDINGS:
        paths = [p for p in sorted(source.glob(f"*{ending}")) if not re.fullmatch(NO_WEIGHTS, p.name)]
        if paths:
            return [Shard(path) for path in paths]
    raise ModelError(f"{source} holds no *.safetensors or *.bin", remedy="give the folder with the model's shards")


def _indexed(index: Path) -> list[Path]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({str(Path(name)) for name in listed})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is no index of shards: {error}", remedy=FETCH_AGAIN) from error
    if any(Path(name).name != name for name in names):
        raise ModelError(f"{index} lists a file outside its folder", remedy=FETCH_AGAIN)
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ModelError(
            f"{index.parent}: {len(absent)} of {len(names)} shards are not there, first {absent[0]}",
            remedy="fetch the missing shards",
        )
    return [index.parent / name for name in names]
