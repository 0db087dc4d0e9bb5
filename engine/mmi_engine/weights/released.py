"""A released checkpoint against the model that it is for: every name, shape and dtype, before a value is read.

Place in the flow: between `shards.py` and `importing.py`. Names are translated by `model/names.py`; what a checkpoint
lacks can come from the base models it was trained from (``bases``), under the names the libraries give them.
Released layout: docs/model.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmi_engine.errors import ModelError
from mmi_engine.model.checkpoint import skeleton
from mmi_engine.model.config import ModelConfig
from mmi_engine.model.names import NameReport, NameTable
from mmi_engine.model.names_vision import is_dropped
from mmi_engine.model.positions import interpolate_position_embedding
from mmi_engine.weights.shards import Entry, Shard, list_shards

TRUNK_POSITIONS = "visual_tokenizer.trunk.position_embedding"
TABLE_ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""How far a stored fixed table may be from ours: rounding of values up to 1; float32 has 1e-5."""

SUBMODELS = {
    "the visual encoder (CLIP ViT)": ("visual_tokenizer.encoder.",),
    "the language model": ("mm_decoder.", "text_decoder.head."),
    "the U-Net": ("image_decoder.decoder.unet.",),
    "the VAE": ("image_decoder.decoder.vae.",),
}
_BASE_RULES = (
    (r"(?:model\.)?((?:embed_tokens|layers|norm)\..+)", "mm_decoder.{}"),
    (r"lm_head\.(weight)", "text_decoder.head.{}"),
    (r"((?:vision_model)\..+)", "visual_tokenizer.encoder.{}"),
)
NEW_BIAS = -100.0
RELEASED_EMBEDDING = "mm_decoder.embed_tokens.weight"
EMBEDDING, HEAD, HEAD_BIAS = "language.body.embed_tokens.weight", "text_head.head.weight", "text_head.head.bias"
MADE = {
    "mean": "the rows of the new tokens are the mean of the others, not the trained ones: train the model further",
    "zeros": "the rows of the new tokens are zero, as in the released model",
    "bias": "zero, and -100 for the new tokens, as in the released model",
}
"""How a base language model, which does not know ``<BoI>`` and the image placeholder, is extended by their rows.

The head's are constants of the released layout. The embedding's are not: ``<BoI>`` has whatever row the training began
with, and the trained ``soi_token`` is relative to it. That row stands in the checkpoint or nowhere.
"""
_OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Placed:
    """A tensor of a shard and where it goes: ``name`` in the shard, ``ours``, the shape it has to get."""

    shard: Shard
    name: str
    ours: str
    entry: Entry
    shape: tuple[int, ...]
    buffer: bool
    made: str = ""
    """How rows that a base language model lacks are made: a key of `MADE`."""
    known: int = 0
    """Number of tokens before the new ones, for a bias that is made."""


@dataclass
class Match:
    """What `match` found: tensors in the order of the shards, fixed tables to compare, and everything that is wrong.

    ``new_rows``: rows that a base language model has too few in its word embedding.
    """

    placed: list[Placed] = field(default_factory=list)
    fixed: list[tuple[Placed, Tensor]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    report: NameReport = field(default_factory=NameReport)
    new_rows: int = 0


def bare_name(name: str) -> str:
    """A released name without the ``module.`` that training programs put in front, once or more often."""
    return re.sub(r"^(module\.)+", "", name)


def base_name(name: str, folder: str) -> str | None:
    """Released name of a tensor of a base model; ``folder`` is ``unet`` or ``vae`` for a diffusion model's parts."""
    if folder == "unet":
        return f"image_decoder.decoder.unet.{name}"
    if folder == "vae":
        last = re.sub(r"(attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_VAE[m[2]]}.", name)
        return f"image_decoder.decoder.vae.{last}"
    for pattern, template in _BASE_RULES:
        if found := re.fullmatch(pattern, name):
            return template.format(found[1])
    return None


def base_tensors(directory: Path) -> dict[str, tuple[Shard, str, Entry]]:
    """Released name → (shard, name there, entry) of a base model: LLaMA, CLIP, or a diffusion folder's U-Net and VAE.

    Raises:
        ModelError: the directory holds no weights.
    """
    folders = {name: directory / name for name in ("unet", "vae") if (directory / name).is_dir()} or {"": directory}
    found = {}
    for folder, path in folders.items():
        for shard in list_shards(path):
            for name, entry in shard.entries().items():
                if (released := base_name(name, folder)) is not None:
                    found[released] = (shard, name, entry)
    return found


def match(
    config: ModelConfig, shards: list[Shard], bases: Iterable[Path] = (), *, new_rows: str | None = None
) -> Match:
    """Find the place of every tensor.

    Args:
        config: of the model to fill.
        shards: of the checkpoint.
        bases: directories of the models that it was trained from, for what it does not hold itself.
        new_rows: ``mean`` makes the embeddings of the new tokens where neither has them; ``None`` calls them missing.

    Raises:
        ModelError: a shard cannot be read.
    """
    model, table, result = skeleton(config), NameTable(config), Match()
    own: dict[str, Any] = model.state_dict()
    buffers = dict(model.named_buffers())
    fixed = {name: value for name, value in buffers.items() if name not in own}
    places: dict[str, Placed] = {}
    for shard in shards:
        for name, entry in shard.entries().items():
            released = bare_name(name)
            ours = table.to_ours(released)
            if ours is None or (ours not in own and ours not in fixed):
                (result.dropped if is_dropped(released) else result.report.unexpected).append(name)
                continue
            target = own.get(ours, fixed.get(ours))
            place = Placed(shard, name, ours, entry, tuple(target.shape), ours in buffers)
            if ours in places:
                result.report.mismatched.append(f"{name}: in {places[ours].shard.path.name} and {shard.path.name}")
            elif reason := _objection(place, target):
                result.report.mismatched.append(f"{name}: {reason}")
            places[ours] = place
    for base in bases:
        for released, (shard, name, entry) in base_tensors(base).items():
            ours = table.to_ours(released)
            if ours in own and ours not in places:
                place = Placed(shard, name, ours, entry, tuple(own[ours].shape), ours in buffers)
                for found in _from_base(place, own, config.tokens.boi, new_rows, result):
                    places.setdefault(found.ours, found)
    result.report.missing = [table.to_released(name) or name for name in own if name not in places]
    result.placed = [place for place in places.values() if place.ours in own]
    result.fixed = [(place, fixed[place.ours]) for place in places.values() if place.ours in fixed]
    return result


def _from_base(place: Placed, own: dict[str, Any], known: int, new_rows: str | None, result: Match) -> list[Placed]:
    """What a base model's tensor fills: its place when it fits, with rows made for tokens beyond its ``known`` ones."""
    if place.ours not in (EMBEDDING, HEAD):
        return [place] if _objection(place, own[place.ours]) is None else []
    # a language model that was widened before brings its own rows
    short = place.entry.shape == (known, *place.shape[1:])
    if not short and _objection(place, own[place.ours]) is not None:
        return []
    if place.ours == EMBEDDING:
        if short and new_rows is None:
            result.new_rows = place.shape[0] - known
            return []
        return [replace(place, made=new_rows or "") if short else place]
    bias = replace(place, ours=HEAD_BIAS, shape=tuple(own[HEAD_BIAS].shape), made="bias", known=known)
    return [replace(place, made="zeros") if short else place, bias]


def _objection(place: Placed, target: Tensor) -> str | None:
    """Why a tensor cannot go where its name says, ``None`` when it can."""
    entry = place.entry
    if target.is_floating_point() != entry.dtype.is_floating_point:
        return f"{entry.dtype} instead of {target.dtype}"
    if entry.shape == place.shape:
        return None
    if place.ours == TRUNK_POSITIONS and len(entry.shape) == 2 and entry.shape[1] == place.shape[1]:
        side = round((entry.shape[0] - 1) ** 0.5)
        if side * side == entry.shape[0] - 1 and side >= 1:
            return None  # another grid: resized on the way
    return f"{list(entry.shape)} instead of {list(place.shape)}"


def fitted(place: Placed, tensor: Tensor) -> Tensor:
    """The tensor in the shape of its place: a base model's with rows for new tokens, a trunk's position table resized.

    The table in float32, bicubic, corners not aligned, as the released code does when it loads weights for 448 px.
    """
    if place.made:
        return _extended(place, tensor)
    if tuple(tensor.shape) == place.shape:
        return tensor
    side = round((place.shape[0] - 1) ** 0.5)
    return interpolate_position_embedding(tensor.float(), (side, side))


def _extended(place: Placed, tensor: Tensor) -> Tensor:
    """What `Placed.made` says, in the dtype of ``tensor``, whose rows stay as they are."""
    if place.made == "bias":
        bias = tensor.new_zeros(place.shape)
        bias[place.known :] = NEW_BIAS
        return bias
    new = tensor.new_zeros((place.shape[0] - tensor.shape[0], *place.shape[1:]))
    if place.made == "mean":
        new[:] = tensor.mean(0, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, new])


def compare_fixed(result: Match) -> None:
    """Compare the fixed tables that a checkpoint carries with ours; differences join the report."""
    for place, ours in result.fixed:
        with place.shard.opened() as read:
            theirs = read(place.name).float()
        if not torch.allclose(theirs, ours.float(), atol=TABLE_ERROR.get(place.entry.dtype, 1e-5), rtol=0):
            result.report.mismatched.append(f"{place.name}: another fixed table than this layout's")


def require_complete(result: Match, source: Path) -> None:
    """Refuse what cannot become a working model.

    Raises:
        ModelError: with counts, the first names, and what would help.
    """
    report = result.report
    if report.clean:
        return
    if "boi_embedding" in report.unexpected:  # our name of soi_token
        remedy = "it is a model directory already: name it by --model"
    elif not result.placed:
        remedy = "give the folder of a released MM-Interleaved checkpoint; mmi model new assembles models from parts"
    elif report.unexpected or report.mismatched:
        remedy = "it is a checkpoint of another layout: describe it by --config, or --image-size for its input"
    else:
        remedy = _remedy_of_missing(report.missing, result.new_rows)
    raise ModelError(f"{source} is no complete checkpoint: {report}", remedy=remedy)


def _remedy_of_missing(missing: list[str], new_rows: int) -> str:
    remedies = []
    if new_rows:  # a base gave the other rows
        missing = [name for name in missing if name != RELEASED_EMBEDDING]
        remedies.append(
            f"the base model lacks its last {new_rows} rows, those of <BoI> and the image placeholder: give a "
            "checkpoint that holds them, or let them begin as the mean of the others by --new-rows mean"
        )
    if missing:
        absent = [what for what, prefixes in SUBMODELS.items() if any(n.startswith(prefixes) for n in missing)]
        other = f", or name the model it was trained from by --base ({', '.join(absent)})" if absent else ""
        remedies.append(f"fetch the missing shards{other}")
    return "; ".join(remedies)
