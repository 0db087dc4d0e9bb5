"""The model that training starts from: a model directory, what the recipe changes about it, what stays on the disk.

Place in the flow: ``finetune.py`` and ``interleaved.py`` ask :func:`load` for the model to train, the former also
:func:`export` for the directory of the result. Keys of the recipe's ``[model]`` table: ``base`` (``toon`` or a model
directory), ``partial`` (weights of the base that fit are taken, the others begin fresh), ``without`` (parts of the
configuration set to null), ``fresh`` (regular expressions on names of weights that begin fresh although they would
fit), and any value of the model's configuration, nested as there. On manifests a recipe that learns no pictures
(``loss.image = 0``) leaves the image decoder on the disk: its tensors are copied from the base when the result is
written.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmi_engine.errors import ConfigError, ModelError
from mmi_engine.model.checkpoint import STRANGERS, opened, skeleton, stored_tensors
from mmi_engine.model.config import ModelConfig
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.tokenizer import DirectoryTokenizer
from mmi_engine.model_info import locate
from mmi_engine.train.recipe import Recipe
from mmi_engine.weights import store

logger = logging.getLogger(__name__)
DECODER = "image_decoder."
KEYS = ("base", "partial", "without", "fresh")
_WRAPPED = re.compile(r"^(language\.body\.layers\.\d+)\.layer\.")
_PLAIN = re.compile(r"^(language\.body\.layers\.\d+)\.(?!layer\.|cross\.)")


@dataclass
class Foundation:
    """The model, where it came from, and what is not in it.

    Attributes:
        model: in training mode.
        directory: of the base.
        there: name → file and shape of the base's tensors.
        fresh: names of weights that the base does not have in this shape, or that ``model.fresh`` names.
        left: prefix of what was not loaded, or "".
    """

    model: MMInterleaved
    directory: Path
    there: dict[str, tuple[Path, torch.Size]]
    fresh: list[str]
    left: str = ""

    def stored(self, name: str) -> Tensor:
        """A weight as the base has it, in float32; raises ModelError where the base does not have it."""
        for called in _called(name):
            if called in self.there:
                with opened(self.there[called][0]) as file:
                    tensor: Tensor = file.get_tensor(called)
                return tensor.float()
        raise ModelError(f"{self.directory} has no weight {name}", remedy="name the base of the run")

    def config_to_keep(self) -> ModelConfig:
        """The model's configuration as it is written: what the base said about a loss that this run had not stays."""
        config = self.model.config
        if config.loss_image_weight:
            return config
        return replace(config, loss_image_weight=ModelConfig.load(self.directory).loss_image_weight)


def configuration(recipe: Recipe) -> tuple[ModelConfig, Path]:
    """The configuration that the recipe trains, and the base's directory; no weight is read.

    Raises:
        ConfigError: no base, or a part in ``without`` that the configuration does not have.
        ModelError: no such model, unknown configuration keys.
    """
    base = recipe.model.get("base")
    if not base:
        raise ConfigError("model.base is missing", remedy="name the model to start from: --model M")
    directory = locate(str(base))
    return changed(ModelConfig.load(directory), recipe), directory


def changed(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """``config`` with what the recipe's ``[model]`` and ``[loss]`` tables say; raises as :func:`configuration`."""
    table: dict[str, Any] = json.loads(config.to_json())
    _merge(table, {key: value for key, value in recipe.model.items() if key not in KEYS})
    for part in recipe.model.get("without", ()):
        *parents, last = str(part).split(".")
        place = table
        for name in parents:
            place = place.get(name, {})
        if last not in place:
            raise ConfigError(f"model.without: the configuration has no {part!r}", remedy="e.g. language.mmfs")
        place[last] = None
    table["loss_text_weight"], table["loss_image_weight"] = recipe.loss.text, recipe.loss.image
    if recipe.loss.guidance_dropout is not None:
        table["image_decoder"]["unconditional_probability"] = recipe.loss.guidance_dropout
    return ModelConfig.from_json(json.dumps(table))


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def load(recipe: Recipe, *, whole: bool = False) -> Foundation:
    """The model of the recipe with the base's weights, in float32 on the CPU.

    Args:
        recipe: its ``[model]``, ``[loss]`` and ``seed``.
        whole: with the image decoder, whatever the losses are.

    Raises:
        ConfigError, ModelError: see :func:`configuration`; or weights that are damaged, stand in two files, or do not
            fit without ``partial``; or an expression in ``fresh`` that is none or matches no weight.
    """
    config, directory = configuration(recipe)
    left = "" if recipe.loss.image or whole else DECODER
    with torch.device("meta"):
        shapes = {
            k: v.shape for k, v in MMInterleaved(config).state_dict().items() if not left or not k.startswith(left)
        }
    there = stored_tensors(directory)
    asked = _asked_fresh(recipe, shapes)
    tensors = _fitting(there, {name: shape for name, shape in shapes.items() if name not in asked})
    fresh = sorted(set(shapes) - set(tensors))
    strange = [name for name in fresh if name not in asked]
    if strange and not recipe.model.get("partial"):
        changes = set(recipe.model) - {"base", "partial", "fresh"}
        raise ModelError(
            f"{directory}: {len(strange)} tensors do not fit the recipe's configuration, first {strange[0]}",
            remedy="remove the changes of [model], or set model.partial=true to begin them fresh"
            if changes
            else STRANGERS,
        )
    torch.manual_seed(recipe.seed)  # fresh weights are the same in every process and run
    model = MMInterleaved(config) if fresh else skeleton(config)
    if left:
        model.image_decoder = nn.Identity()  # type: ignore[assignment]
    model.load_state_dict(tensors, strict=False, assign=True)
    if not left:
        model.channels_last()
    if fresh:
        logger.info("%d weights begin fresh, first %s", len(fresh), fresh[0])
    model.tokenizer = DirectoryTokenizer(directory)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name.endswith("ignore_token"):  # a constant of the released checkpoint
            parameter.requires_grad_(False)
    return Foundation(model.train(), directory, there, fresh, left)


def _asked_fresh(recipe: Recipe, names: Collection[str]) -> set[str]:
    """The weights that ``model.fresh`` names; raises ConfigError for an expression that is none or matches nothing."""
    asked: set[str] = set()
    patterns = recipe.model.get("fresh", ())
    if isinstance(patterns, str):
        raise ConfigError(f"model.fresh: {patterns!r} is no list", remedy=f"write model.fresh=[{patterns!r}]")
    for pattern in patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except (re.error, TypeError) as error:
            raise ConfigError(f"model.fresh: {pattern!r} is no regular expression: {error}") from None
        if not found:
            remedy = "parameters.txt of a run lists the names; what loss.image=0 leaves on the disk is not among them"
            raise ConfigError(f"model.fresh: no weight's name matches {pattern!r}", remedy=remedy)
        asked |= found
    return asked


def _fitting(there: dict[str, tuple[Path, torch.Size]], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The stored tensors that the model has room for, under the model's names."""
    wanted: dict[Path, list[tuple[str, str]]] = {}
    for name, shape in shapes.items():
        called = next((n for n in _called(name) if n in there), "")
        if called and there[called][1] == shape:
            wanted.setdefault(there[called][0], []).append((name, called))
    tensors = {}
    for path, names in wanted.items():
        with opened(path) as file:
            for name, called in names:
                tensor = file.get_tensor(called)
                tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def _called(name: str) -> list[str]:
    """What a tensor may be called in the base: a decoder layer with MMFS holds the library's layer under ``layer``."""
    return [name, _WRAPPED.sub(r"\1.", name), _PLAIN.sub(r"\1.layer.", name)]


def export(foundation: Foundation, state: dict[str, Tensor], directory: Path, dtype: torch.dtype) -> None:
    """Write a model directory from the trained weights and what was left on the disk.

    Args:
        foundation: see :func:`load`.
        state: names and weights as the model has them.
        directory: made if absent; every file appears complete or not at all, and files of two exports are never read
            together, see `store.save`.
        dtype: of storage.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = dict(state)
    if foundation.left:
        left = {n: path for n, (path, _) in foundation.there.items() if n.startswith(foundation.left)}
        for path in sorted(set(left.values())):
            with opened(path) as file:
                tensors |= {name: file.get_tensor(name) for name in left if left[name] == path}
    kinds = {k: dtype if v.is_floating_point() else v.dtype for k, v in tensors.items()}
    files = store.split([store.Planned(k, tuple(v.shape), kinds[k]) for k, v in tensors.items()])
    store.save(files, directory, lambda planned: tensors[planned.name].to(planned.dtype))
    store.write_text(directory / "config.json", foundation.config_to_keep().to_json())
    foundation.model.tokenizer.copy_to(directory)
