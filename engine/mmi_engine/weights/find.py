"""What ``--model M`` names: the embedded model, a directory of ours, a released checkpoint, or a hub id of either.

Place in the flow: first call of everything that needs a model; nothing heavy is imported. A path that exists wins, then
the hub's cache, then the network (``HF_HOME`` and ``HF_HUB_OFFLINE`` are huggingface_hub's and hold here). A released
checkpoint is converted once into ``$MMI_CACHE/models`` (default ``~/.cache/mmi/models``) and used from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmi_engine.errors import ModelError

log = logging.getLogger(__name__)

TOON = Path(__file__).parent.parent / "toon" / "weights"
WANTED = ["*config.json", "*.safetensors", "*.bin", "*.index.json", "tokenizer.json", "tokenizer.model", "README.md"]
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
RELEASED_TOKENIZER = "lmsys/vicuna-13b-v1.3"
"""Where the released checkpoint's tokenizer is published; its own repository carries none."""
_RELEASED_NAMES = re.compile(r"(module\.)*(mm_decoder|text_decoder|visual_tokenizer\.encoder|image_decoder\.decoder)\.")
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_HUB_ID = r"[\w.-]+/[\w.-]+"


def cache_root() -> Path:
    """``$MMI_CACHE``, else ``~/.cache/mmi``.

    Raises:
        ModelError: neither is known.
    """
    try:
        return Path(os.environ.get("MMI_CACHE") or Path.home() / ".cache" / "mmi")
    except RuntimeError as error:
        raise ModelError("this user has no home directory to cache in", remedy="name a folder by MMI_CACHE") from error


def kind(directory: Path) -> str | None:
    """``ours``, ``released``, or ``None`` for a directory that is neither; from names alone."""
    names = _tensor_names(directory)
    if any(_RELEASED_NAMES.match(name) for name in names):
        return "released"
    # Pickles do not tell their names before they are opened; a library's model has a configuration beside them.
    described = read_json(directory / "config.json")
    foreign = names or "model_type" in described or "_class_name" in described
    if not foreign and any(directory.glob("pytorch_model*.bin")):
        return "released"
    return "ours" if describes_ours(directory) else None


def describes_ours(directory: Path) -> bool:
    """Whether ``config.json`` there is one of ours."""
    described = read_json(directory / "config.json")
    return "visual_resampler" in described and "image_decoder" in described


def _tensor_names(directory: Path) -> list[str]:
    """Names of an index or of the first safetensors file."""
    for index in sorted(directory.glob("*.index.json")):
        return list(_weight_map(index))
    for path in sorted(directory.glob("*.safetensors")):
        return _header_names(path)
    return []


def find(name: str, *, convert: bool = True) -> Path:
    """Directory of a model.

    Args:
        name: ``toon``, a path, or a hub id.
        convert: whether a released checkpoint is to be converted; without it, its own directory is returned.

    Raises:
        ModelError: there is no such model, it is none of ours, files are missing, or it cannot be converted.
    """
    if name == "toon":
        return TOON
    directory = Path(name)
    if not directory.is_dir() and re.fullmatch(_HUB_ID, name) and not directory.parent.is_dir():
        directory = from_hub(name)
    if not directory.is_dir():
        raise ModelError(f'model "{name}" not found', remedy="name a model directory, or toon for the embedded model")
    found = kind(directory)
    if found == "released":
        return converted(directory, name) if convert else directory
    for needed in ("config.json", "*.safetensors"):
        if not any(directory.glob(needed)):
            raise ModelError(f'model "{name}" holds no {needed}', remedy="name a model directory, or restore this one")
    if found is None:
        raise ModelError(
            f'model "{name}" is no MM-Interleaved model',
            remedy="name a directory that mmi wrote; mmi model new assembles one from a language model and other parts",
        )
    _require_shards(directory, name)
    return directory


def _require_shards(directory: Path, name: str) -> None:
    """Refuse a model in several files of which some, or their index, are not there."""
    index = directory / INDEX
    files = sorted(set(_weight_map(index).values()))
    absent = [file for file in files if not (directory / file).is_file()]
    if absent:
        raise ModelError(
            f'model "{name}" lacks {len(absent)} of {len(files)} weight files, first {absent[0]}',
            remedy="restore the model directory",
        )
    if not files and any(_SHARD.fullmatch(path.name) for path in directory.iterdir()):
        what = f"{INDEX} cannot be read" if index.exists() else f"has no {INDEX}, as when its saving was interrupted"
        raise ModelError(
            f'model "{name}" is in several files, and {what}',
            remedy="save it again (the same training command with --resume), or restore the model directory",
        )


def from_hub(
    name: str, wanted: list[str] = WANTED, ready: Callable[[Path], bool] | None = None, what: str = "model"
) -> Path:
    """Local folder of a hub repository: from the cache where it is complete there, else from the network.

    Args:
        name: hub id.
        wanted: patterns of the files to fetch.
        ready: whether a folder holds what is needed; default `complete`.
        what: for the error.

    Raises:
        ModelError: neither gives it.
    """
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(name, allow_patterns=wanted, local_files_only=True)
        cached = _weights_folder(Path(snapshot))
        if (ready or complete)(cached):
            return cached
    except Exception as error:  # the library raises its own, httpx's and OS errors
        log.debug("%s is not in the hub's cache: %s", name, error)
    try:
        return _weights_folder(Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted)))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f'{what} "{name}" is no directory, and the hub does not give it: {first}',
            remedy="name a directory" + (", or toon for the embedded model" if what == "model" else ""),
        ) from error


def _weights_folder(snapshot: Path) -> Path:
    """The snapshot itself, or its only subfolder with a model: the released repository keeps its shards in one."""
    if kind(snapshot) is None:
        inner = [path for path in sorted(snapshot.iterdir()) if path.is_dir() and kind(path) is not None]
        if len(inner) == 1:
            return inner[0]
    return snapshot


def complete(directory: Path) -> bool:
    """Whether all weight files that the directory's index lists are there; without one, whether there is any."""
    for index in sorted(directory.glob("*.index.json")):
        names = set(_weight_map(index).values())
        return bool(names) and all((directory / name).is_file() for name in names)
    return any(any(directory.glob(f"*{ending}")) for ending in (".safetensors", ".bin"))


def converted(directory: Path, name: str) -> Path:
    """The converted form of a released checkpoint, made on first use.

    Raises:
        ModelError: it is damaged or incomplete, or its tokenizer cannot be found.
    """
    files = sorted(p for p in directory.iterdir() if p.suffix in (".bin", ".safetensors") or p.name in TOKENIZERS)
    digest = hashlib.sha256(str(directory.resolve()).encode())
    for path in files:
        stat = path.stat()
        digest.update(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    label = re.sub(r"[^\w.-]+", "-", name).strip("-.")[-60:]
    target = cache_root() / "models" / f"{label}-{digest.hexdigest()[:12]}"
    if kind(target) == "ours":
        return target
    from mmi_engine.weights.importing import import_released

    log.warning("%s is a released checkpoint: converting it once, into %s", name, target)
    own = any((directory / file).is_file() for file in TOKENIZERS)
    import_released(directory, target, tokenizer=None if own else RELEASED_TOKENIZER, wait=True)
    return target


def tokenizer_file(source: str, named_by: str = "--tokenizer") -> Path:
    """The tokenizer file that ``source`` names: a file, a folder with one, or a hub id.

    Args:
        source: where to look.
        named_by: what the user would name another one by.

    Raises:
        ModelError: there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir() and re.fullmatch(_HUB_ID, source):
        path = from_hub(source, list(TOKENIZERS), lambda p: any((p / f).is_file() for f in TOKENIZERS), "tokenizer")
    for file in TOKENIZERS:
        if (path / file).is_file():
            return path / file
    raise ModelError(
        f"{source} holds no tokenizer.json or tokenizer.model",
        remedy=f"name the tokenizer by {named_by}: a file, a folder or a hub id such as {RELEASED_TOKENIZER}",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when the file is absent or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file of an index, empty when it is damaged."""
    table = read_json(index).get("weight_map")
    sound = isinstance(table, dict) and all(isinstance(file, str) for file in table.values())
    return table if sound and table is not None else {}


def _header_names(path: Path) -> list[str]:
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= 100 * 2**20 else {}
            return list(header) if isinstance(header, dict) else []
    except (OSError, ValueError):
        return []
