"""The U-Net's two paths around MMFS without Python in between: recorded by `torch.jit.trace`, run by its interpreter.

Place in the flow: `shares.py` asks for them where a CPU draws with a small model. Such a model's operators are over in
tens of microseconds, and Python takes a quarter of a step between them, during which no other thread can run Python
either. Operators, their order and so all bits stay the same. Whatever a path reads is an argument (weights, their
second layout, keys of the text), so a recording holds no numbers of its own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmi_engine.errors import is_out_of_memory
from mmi_engine.model.packed import Packed, PackedConv2d
from mmi_engine.model.unet import MMFSUNet, TextKeys, text_once

AFTER = 32
"""Steps of a shape before it is recorded: what a recording costs, divided by what it saves in a step."""
MOST = 16
"""Recordings that are kept of one model."""

log = logging.getLogger(__name__)


class Traced:
    """Both paths for latents, step and text condition of one shape.

    Args:
        unet: evaluated without gradients, its layers in their second layout, which must have been made.
        latents, step, context, keys: an example, arguments of `MMFSUNet.down` and `text_keys` of the context.

    Raises:
        RuntimeError: torch cannot record it.
    """

    def __init__(self, unet: MMFSUNet, latents: Tensor, step: Tensor, context: Tensor, keys: TextKeys) -> None:
        self.unet = unet
        self.layers = [layer for layer, _ in keys]
        self.weights = [*unet.unet.parameters(), *second_layouts(unet.unet)]
        self._down = self._recorded(unet.down, (latents, step, context), context, keys)
        emb, *features = unet.down(latents, step, context)
        self._up = self._recorded(unet.up, (emb, context, *features), context, keys)

    def _recorded(
        self, path: Callable[..., Any], arguments: tuple[Tensor, ...], context: Tensor, keys: TextKeys
    ) -> Callable[..., Any]:
        place = next(index for index, argument in enumerate(arguments) if argument is context)

        def function(*given: Tensor) -> Any:
            own, known = given[: len(arguments)], given[len(arguments) : len(arguments) + len(keys)]
            with text_once(self.unet, [own[place]], [list(zip(self.layers, known, strict=True))]):
                return path(*own)

        example = (*arguments, *(known for _, known in keys), *self.weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that become constants: a recording serves one shape
            recorded: Callable[..., Any] = torch.jit.trace(function, example, check_trace=False)
        return recorded

    def bound(self, keys: TextKeys) -> BoundPaths:
        """The paths for one text condition."""
        return BoundPaths(self, [known for _, known in keys])


class BoundPaths:
    """`mmi_engine.model.unet.Paths` with the keys of one text condition."""

    def __init__(self, traced: Traced, keys: Sequence[Tensor]) -> None:
        self._paths, self._rest = (traced._down, traced._up), (*keys, *traced.weights)

    def down(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Sequence[Tensor]:
        """See `MMFSUNet.down`."""
        found: Sequence[Tensor] = self._paths[0](latents, timesteps, context, *self._rest)
        return found

    def up(self, emb: Tensor, context: Tensor, *features: Tensor) -> Tensor:
        """See `MMFSUNet.up`."""
        made: Tensor = self._paths[1](emb, context, *features, *self._rest)
        return made


def second_layouts(module: nn.Module) -> list[Tensor]:
    """Weights as oneDNN wants them, of all layers that have been used."""
    layers = [m for m in module.modules() if isinstance(m, Packed)]
    return [layer.kept.entry[2] for layer in layers if layer.kept.entry is not None]


def traced(unet: MMFSUNet, latents: Tensor, context: Tensor, keys: TextKeys, steps: int) -> Traced | None:
    """The recording for these shapes, `None` as long as it is not worth its time or where it cannot be had.

    Args:
        unet: whose recordings serve as long as its weights are the same.
        latents, context, keys: as of `Traced`.
        steps: that are about to be made with these shapes.
    """
    weights = list(unet.unet.parameters())
    if not _fit(unet) or not unet.kept.may(unet.training, weights):
        return None
    known: dict[Any, Traced | int | None] = unet.kept.get(weights, dict)
    shape = (tuple(latents.shape), tuple(context.shape), torch.get_num_threads())
    found = known.get(shape, 0)
    if isinstance(found, int):
        full = sum(isinstance(one, Traced) for one in known.values()) >= MOST
        known[shape] = 0 if full else found + steps
        if full or found < AFTER:
            return None
        known[shape] = found = _try(unet, latents, context, keys)
    return found


def _try(unet: MMFSUNet, latents: Tensor, context: Tensor, keys: TextKeys) -> Traced | None:
    step = torch.zeros((), dtype=torch.long)
    try:
        return Traced(unet, latents, step, context, keys)
    except Exception as error:  # whatever torch refuses; the U-Net runs as ever
        if is_out_of_memory(error):
            raise
        log.debug("the U-Net cannot be recorded", exc_info=True)
        return None


def _fit(unet: MMFSUNet) -> bool:
    """Whether all of the U-Net is ordinary layers of a small model on a CPU."""
    first = unet.unet.conv_in
    if not isinstance(first, PackedConv2d) or first.plain or unet.compiled or first.weight.device.type != "cpu":
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in unet.unet.modules())
