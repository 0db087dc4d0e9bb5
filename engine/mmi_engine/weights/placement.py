"""Where the decoder layers of a large language model live: this device, others, main memory, or the file on disk.

Place in the flow: `model/checkpoint.py` asks for a `Placement` when ``device_map`` is given and attaches it after
loading. Everything but the layers stays on the main device; it is a tenth of the released model. A layer on another GPU
computes there; one kept in main memory or on disk is brought to the main device for the moment in which it computes.
The moving is accelerate's (its hooks around every submodule), the plan is ours, because MMFS stands in the middle of
the library's layers and reads their neighbours' tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmi_engine.errors import DeviceError

BLOCKS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
LAYER = re.compile(rf"language\.body\.layers\.(\d+)\.(?:layer\.)?(?:{'|'.join(BLOCKS)})\.")
SHARE = 0.9  # of what a device has free; the rest is for what fragments
OFFLOAD = ("memory", "disk")


@dataclass(frozen=True)
class Placement:
    """``main``: device of everything else; ``layers``: a device, ``memory`` or ``disk`` for every decoder layer."""

    main: str
    layers: tuple[str, ...]

    def of(self, name: str) -> str:
        """Place of a tensor of the model."""
        found = LAYER.match(name)
        return self.layers[int(found[1])] if found else self.main

    def device_of(self, name: str) -> torch.device:
        """Device on which a tensor is kept: the CPU for what is in main memory, ``meta`` for what stays on disk."""
        place = self.of(name)
        return torch.device({"memory": "cpu", "disk": "meta"}.get(place, place))

    def __str__(self) -> str:
        counts = {name: self.layers.count(name) for name in self.layers}
        return ", ".join(
            f"{count} layers {'in' if name == 'memory' else 'on'} {name}" for name, count in counts.items()
        )


def plan(layers: list[int], core: int, working: int, budgets: Mapping[str, int]) -> Placement:
    """Fill devices in the order given, each to its budget.

    Args:
        layers: bytes of every decoder layer.
        core: bytes of all other weights.
        working: bytes to keep free on the main device for caches, features and the largest step.
        budgets: device → bytes, the main device first; ``cpu`` after the GPUs. What is left over stays on disk.

    Raises:
        DeviceError: not even the core fits on the main device.
    """
    places = list(budgets)
    main = places[0]
    room = dict(budgets)
    room[main] -= core + working
    if room[main] < 0:
        raise DeviceError(
            f"{main} has {budgets[main] / 2**30:.1f} GiB for the model; all but its language model's layers need "
            f"{(core + working) / 2**30:.1f} GiB",
            remedy="take a larger device, a smaller --dtype, or --device cpu",
        )
    computing = [place for place in places if place == main or place != "cpu"]
    chosen = _deal(layers, computing, room)
    if len(chosen) < len(layers):
        # a layer that visits the main device needs room there while it computes
        room[main] -= max(layers)
        chosen = _deal(layers, [*computing, "memory"], {**room, "memory": 0 if main == "cpu" else room.get("cpu", 0)})
    return Placement(main, (*chosen, *["disk"] * (len(layers) - len(chosen))))


def _deal(layers: list[int], places: list[str], budgets: Mapping[str, int]) -> list[str]:
    """A place for every layer, in order, until the places are full."""
    chosen: list[str] = []
    for place in places:
        room = budgets[place]
        while len(chosen) < len(layers) and layers[len(chosen)] <= room:
            room -= layers[len(chosen)]
            chosen.append(place)
    return chosen


def layer_bytes(model: nn.Module, size: int) -> tuple[list[int], int]:
    """Bytes of every decoder layer, and of all the rest, with floating tensors of ``size`` bytes."""
    layers: dict[int, int] = {}
    core = 0
    for name, value in model.state_dict().items():
        bytes_ = value.numel() * (size if value.is_floating_point() else value.element_size())
        if found := LAYER.match(name):
            layers[int(found[1])] = layers.get(int(found[1]), 0) + bytes_
        else:
            core += bytes_
    return [layers[index] for index in sorted(layers)], core


def auto(model: Any, dtype: torch.dtype, main: str, budgets: Mapping[str, int] | None = None) -> Placement:
    """A placement for the devices of this machine, or for ``budgets`` (see :func:`plan`).

    Raises:
        DeviceError: the main device is too small for what cannot be spread.
    """
    from mmi_engine.weights.estimate import devices, need

    layers, core = layer_bytes(model, dtype.itemsize)
    name = {torch.float32: "fp32", torch.float16: "fp16"}.get(dtype, "bf16")
    needed = need(model.config, 0, name)
    working = needed.context + needed.working
    if budgets is None:
        found = {device.name: int(device.free * SHARE) for device in devices()}
        if main not in found:
            raise DeviceError(f"{main} is not here", remedy="see mmi doctor")
        ahead = {main: found.pop(main)}
        # the CPU as main device spreads over nothing but the disk
        budgets = ahead if main == "cpu" else {**ahead, **found}
    return plan(layers, core, working, budgets)


class DiskWeights(Mapping[str, Tensor]):
    """Tensors read from safetensors files when asked for, in the compute dtype.

    Args:
        index: name → file.
        dtype: of floating tensors.
    """

    def __init__(self, index: dict[str, Path], dtype: torch.dtype) -> None:
        self.index, self.dtype = index, dtype
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        path = self.index[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor = self._open[path].get_tensor(name)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Any:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def attach(model: Any, placement: Placement, disk: DiskWeights | None = None) -> None:
    """Let accelerate move what a layer needs, to where it computes.

    Args:
        model: loaded, with layers placed on ``disk`` still without memory.
        placement: where its layers are.
        disk: for those layers.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
    from accelerate.utils import PrefixedDataset

    for index, place in enumerate(placement.layers):
        if place == placement.main:
            continue
        outer = model.language.body.layers[index]
        layer, prefix = outer, f"language.body.layers.{index}."
        if hasattr(outer, "cross"):
            layer, prefix = outer.layer, f"{prefix}layer."
        for block in BLOCKS:
            module = getattr(layer, block)
            if place not in OFFLOAD:
                hook = AlignDevicesHook(place, io_same_device=True, skip_keys="past_key_values")
                add_hook_to_module(module, hook)
                continue
            source = module.state_dict() if place == "memory" else PrefixedDataset(disk, f"{prefix}{block}.")
            attach_align_device_hook(
                module,
                execution_device=torch.device(placement.main),
                offload=True,
                weights_map=source,
                skip_keys="past_key_values",
            )
