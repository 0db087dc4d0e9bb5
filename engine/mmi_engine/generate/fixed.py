"""One token a row over buffers of fixed shape: a KV cache with room, its mask, positions, images.

Place in the flow: `text.Decoder` comes here with ``--cuda-graphs`` or ``--compile`` instead of calling the language
model over a cache that grows. Its whole state moves into the buffers of a `FixedStep` and its tensors become views of
these; every step writes one column, replayed (`graphs.py`) or compiled (`compiled.py`). Columns behind the last and
rows behind the last are hidden or not looked at, but never anything but finite numbers. When all columns are full the
state moves on into larger buffers.
R rows of the buffers, C columns, n rows and T columns in use, M images.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmi_engine.generate.graphs import Graphs, Recording
from mmi_engine.model.language import VisualContext

if TYPE_CHECKING:
    from mmi_engine.generate.text import Decoder
    from mmi_engine.model.interleaved import MMInterleaved

COLUMNS = 64
"""Capacities are multiples of this, so prompts of many lengths share a recording."""


class FixedLayer(DynamicLayer):
    """The library's cache layer over a tensor ``[R, H, C, d]`` that stays: a step writes column ``at`` (``[1]``)."""

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.at = keys, values, at
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See the library; gives all columns."""
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values


def token(
    model: MMInterleaved,
    ids: Tensor,
    bias: Tensor,
    position: Tensor,
    at: Tensor,
    states: list[tuple[Tensor, Tensor]],
    visual: VisualContext | None,
) -> Tensor:
    """One token per row. Everything by the device's own numbers: what is recorded knows no others.

    Args:
        model: whose language model steps.
        ids: ``[R]``, the new tokens.
        bias: ``[R, 1, 1, C]`` added to attention; column ``at`` is opened.
        position: ``[R, 1]`` of the token before; counted on.
        at: ``[1]``, the column to write; counted on.
        states: keys and values ``[R, H, C, d]`` of every layer; column ``at`` is written.
        visual: what the rows see, or ``None``.

    Returns:
        logits ``[R, vocabulary]`` in float32.
    """
    bias.index_fill_(3, at, 0)
    position.add_(1)
    language = model.language
    cache = DynamicCache(config=language.body.config)
    cache.layers = [FixedLayer(keys, values, at) for keys, values in states]
    hidden = language(language.embed(ids[:, None]), bias, visual, position_ids=position, cache=cache)
    logits: Tensor = model.text_head(hidden[:, -1]).float()
    at.add_(1)
    return logits


class FixedStep:
    """Buffers and the step over them.

    Args:
        decoder: whose shapes they have; nothing of its state is taken.
        rows, columns: R and C.
        compiled: `token` through a compiler, to be called instead of recording it.
    """

    def __init__(
        self, decoder: Decoder, rows: int, columns: int, compiled: Callable[..., Tensor] | None = None
    ) -> None:
        self.model, self.columns = decoder.model, columns
        first, device = decoder.cache.layers[0].keys, decoder.mask.device
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.ids = torch.zeros(rows, dtype=torch.long, device=device)
        self.position = decoder.position.new_zeros(rows, 1)
        self.hidden = torch.finfo(first.dtype).min
        self.bias = first.new_full((rows, 1, 1, columns), self.hidden)  # what attention adds: 0 where it may look
        self.states = [
            (_roomy(layer.keys, rows, columns), _roomy(layer.values, rows, columns)) for layer in decoder.cache.layers
        ]
        self.visual = _roomy_visual(decoder.visual, rows)
        self.rows = self.length = 0
        self._owner: Any = lambda: None
        step = partial(
            compiled or token, self.model, self.ids, self.bias, self.position, self.at, self.states, self.visual
        )
        self._step = step if compiled else Recording(step, device, self.model)
        images = [] if self.visual is None else [*self.visual.values, self.visual.visible]
        self.bytes = getattr(self._step, "bytes", 0) + sum(
            t.numel() * t.element_size() for t in (*self._states(), *images)
        )

    @property
    def full(self) -> bool:
        """Whether there is no column left."""
        return self.length >= self.columns

    def load(self, decoder: Decoder) -> None:
        """Take over the decoder's state; one that is still at work here gets its own copied out."""
        before = self._owner()
        if before is not None and before is not decoder and before.fixed is self:
            before.settle(copy=True)
        self._owner = weakref.ref(decoder)
        self.rows, self.length = rows, length = decoder.mask.shape
        for (keys, values), layer in zip(self.states, decoder.cache.layers, strict=True):
            for whole, given in ((keys, layer.keys), (values, layer.values)):
                whole[:rows, :, :length] = given
                whole[:, :, length:] = 0  # an earlier batch's NaN would count even where it is hidden
                whole[rows:] = 0
        self.bias[:rows, 0, 0, :length] = (decoder.mask == 0).to(self.bias.dtype) * self.hidden
        self.bias[rows:] = self.hidden
        self.bias[..., length:] = self.hidden
        self.at.fill_(length)
        pairs = [(self.position, decoder.position)]
        if self.visual is not None and decoder.visual is not None:
            pairs.append((self.visual.visible, decoder.visual.visible))
            if self.visual.visible.shape[-1]:
                pairs += list(zip(self.visual.values, decoder.visual.values, strict=True))
        for whole, given in pairs:
            whole[:rows] = given
            whole[rows:] = 0
        self.show(decoder)

    def show(self, decoder: Decoder, *, copy: bool = False) -> None:
        """Make the decoder's tensors views of what is in use here, or copies."""

        def part(whole: Tensor) -> Tensor:
            return whole[: self.rows].clone() if copy else whole[: self.rows]

        for sides, layer in zip(self.states, decoder.cache.layers, strict=True):
            layer.keys, layer.values = (part(side[:, :, : self.length]) for side in sides)
        decoder.mask = (self.bias[: self.rows, 0, 0, : self.length] == 0).to(decoder.mask.dtype)
        decoder.position = part(self.position)
        if self.visual is not None:
            values = self.visual.values
            if self.visual.visible.shape[-1]:
                values = [part(each) for each in values]
            decoder.visual = VisualContext(values, self.visual.shapes, part(self.visual.visible))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, at the front."""
        wholes = [*self._states(), self.position, self.bias]
        if self.visual is not None:
            wholes += [self.visual.visible, *(self.visual.values if self.visual.visible.shape[-1] else [])]
        for whole in wholes:
            whole[: len(rows)] = whole[rows]
        self.rows = len(rows)

    def reorder(self, rows: Tensor) -> None:
        """Keys and values alone change places."""
        for whole in self._states():
            whole[: len(rows)] = whole[rows]

    def __call__(self, ids: Tensor) -> Tensor:
        """Append one token per row ``[n]``; logits ``[n, vocabulary]`` in float32, a tensor of their own."""
        self.ids[: self.rows] = ids
        logits = self._step()[: self.rows].clone()
        self.length += 1
        return logits

    def _states(self) -> list[Tensor]:
        return [side for sides in self.states for side in sides]


def fixed_step(decoder: Decoder, graphs: Graphs, rows: int) -> FixedStep:
    """Buffers of at least ``rows`` rows with room for the decoder's next token, loaded with its state."""
    used, length = decoder.mask.shape
    rows, columns = max(rows, used), (length // COLUMNS + 1) * COLUMNS
    visual = decoder.visual
    seen = None if visual is None else (visual.visible.shape[-1], tuple(visual.shapes), visual.visible.dtype)
    key = ("token", rows, columns, decoder.cache.layers[0].keys.dtype, seen)
    step = graphs.get(key, lambda: FixedStep(decoder, rows, columns, graphs.compiled))
    step.load(decoder)
    return step


def _roomy(states: Tensor, rows: int, columns: int) -> Tensor:
    return states.new_zeros(rows, states.shape[1], columns, states.shape[3])


def _roomy_visual(visual: VisualContext | None, rows: int) -> VisualContext | None:
    if visual is None:
        return None
    values = visual.values
    if visual.visible.shape[-1]:
        values = [value.new_zeros(rows, *value.shape[1:]) for value in values]
    return VisualContext(values, visual.shapes, visual.visible.new_zeros(rows, *visual.visible.shape[1:]))
