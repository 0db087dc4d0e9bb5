"""Fine-tuning that fits: low-rank adapters through peft, and activations computed again instead of kept.

Place in the flow: ``finetune.py`` adapts the model after freezing; the exported model has the adapters folded in, so
that it is a model directory like any other. MMFS and resamplers are never adapted: they are trained in full unless the
recipe freezes them. Source: Hu et al. 2021, "LoRA"; Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmi_engine.errors import ConfigError, UsageError
from mmi_engine.train.sections import LoraConfig

BASE = ".base_layer."


def adapt(model: nn.Module, config: LoraConfig) -> list[str]:
    """Put adapters beside the matched linear layers, freeze those layers, train the adapters; returns their names.

    Raises:
        UsageError: peft is not installed.
        ConfigError: no layer matches.
    """
    try:
        import peft
    except ImportError:
        raise UsageError("lora.rank needs peft, which is not installed", remedy="pip install 'mmi[train]'") from None
    names = targets(model, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names
    )
    peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():  # peft freezes everything that is no adapter
        parameter.requires_grad_(".lora_" in name or name in trained)
    return names


def targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Full names of the linear layers that are adapted: inside ``parts``, ending in one of ``layers``, no MMFS."""
    ends = tuple(f".{layer}" for layer in config.layers)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.endswith(ends)
        and any(name.startswith(f"{part}.") for part in config.parts)
        and not re.search(r"\.(cross|mmfs)\.", name)
    ]
    if not found:
        raise ConfigError("lora: no layer matches lora.parts and lora.layers", remedy="see the names in parameters.txt")
    return found


def merged_state(
    model: nn.Module, state: dict[str, Tensor] | None = None, stored: Callable[[str], Tensor] | None = None
) -> dict[str, Tensor]:
    """The model's weights under their usual names, adapters folded in.

    Args:
        state: the weights, where the model itself holds parts of them only.
        stored: name → weight of the base, for those that are kept in 8 bits here.
    """
    weights = model.state_dict() if state is None else state
    scales: dict[str, float] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            scales[f"{name}.weight"] = module.scaling["default"]
    merged: dict[str, Tensor] = {}
    for name, value in weights.items():
        if ".lora_" in name or name.endswith((".SCB", ".weight_format")):  # the latter two come with 8-bit weights
            continue
        plain = name.replace(BASE, ".")
        if value.dtype == torch.int8 and stored is not None:
            value = stored(plain)
        if plain in scales:
            layer = plain.removesuffix(".weight")
            low, high = (weights[f"{layer}.lora_{side}.default.weight"].float() for side in "AB")
            merged[plain] = value.float() + scales[plain] * (high @ low)
        else:
            merged[plain] = value
    return merged


def checkpoint_activations(model: Any) -> None:
    """Recompute the activations of the language model's layers, the trunk's layers and the U-Net's blocks."""
    stacks: list[nn.Module] = [*model.language.body.layers, *model.visual_tokenizer.trunk.layers]
    for layer in stacks:
        _recomputed(layer)
    if isinstance(model.image_decoder, nn.Identity):
        return
    model.image_decoder.unet.unet.enable_gradient_checkpointing()


def _recomputed(layer: nn.Module) -> None:
    """Have ``layer`` keep its inputs alone while training."""
    from torch.utils.checkpoint import checkpoint

    inner = layer.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return inner(*arguments, **named)
        return checkpoint(inner, *arguments, use_reentrant=False, **named)

    layer.forward = forward  # type: ignore[method-assign]
