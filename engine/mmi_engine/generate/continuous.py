"""Continuous batching of texts: the place of a finished row is taken by the next prompt, whatever its length.

Place in the flow: `interleave.py` comes here with all texts of a round under ``--batching continuous``. Rows of other
lengths, other numbers of images and other ages share every step, so a row's last bits depend on its neighbours: the
same tokens where no two are equally likely, but no promise of equal bytes. Greedy and sampled text alone.
B rows, T columns, M images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_engine.errors import UsageError
from mmi_engine.generate.reading import Prompt
from mmi_engine.generate.settings import Settings
from mmi_engine.generate.text import Decoder, cut, process, sample
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.language import VisualContext


@dataclass
class _Row:
    """A text at work: which prompt it continues and its ids, ``<s>`` first."""

    index: int
    ids: list[int]
    done: bool = False


@torch.no_grad()
def write_texts(
    model: MMInterleaved,
    shapes: Sequence[tuple[int, ...]],
    prompt_of: Callable[[list[int]], Prompt],
    settings: Settings,
    most: int,
    generators: Sequence[torch.Generator],
) -> list[list[int]]:
    """Continue prompts, at most ``most`` at a time.

    Args:
        model: the model.
        shapes: of every prompt; those of equal shape may be read together.
        prompt_of: the left-padded prompt of some of them, of equal shape.
        settings: text part of the run's settings, without beams.
        most: rows of a step.
        generators: one per prompt, for sampling.

    Returns:
        ids per prompt, ``<s>`` first, stop id included where one was produced.
    """
    stops = (model.config.tokens.eos, model.config.tokens.boi)
    waiting = sorted(range(len(shapes)), key=lambda index: shapes[index], reverse=True)
    made: list[list[int]] = [[] for _ in shapes]
    running: list[_Row] = []
    decoder: Decoder | None = None
    while waiting or running:
        while waiting and most - len(running) >= (max(1, most // 4) if running else 1):
            alike = [index for index in waiting[: most - len(running)] if shapes[index] == shapes[waiting[0]]]
            waiting = waiting[len(alike) :]
            joining = Decoder(model, prompt_of(alike), rows=most)
            decoder = joining if decoder is None or not running else _together(decoder, joining)
            running += [_Row(index, [model.config.tokens.bos]) for index in alike]
        assert decoder is not None
        decoder.check()
        chosen = _choose(decoder.logits, running, settings, stops, generators)
        for row, token in zip(running, chosen, strict=True):
            row.ids.append(token)
            row.done = token in stops or len(row.ids) > settings.max_new_tokens
            if row.done:
                made[row.index] = cut(row.ids, stops)
        going = [number for number, row in enumerate(running) if not row.done]
        if len(going) < len(running):
            decoder.keep(torch.tensor(going, dtype=torch.long, device=decoder.mask.device))
            running = [running[number] for number in going]
        if running:
            decoder.step(torch.tensor([row.ids[-1] for row in running], device=decoder.mask.device))
    return made


def _choose(
    logits: Tensor,
    running: Sequence[_Row],
    settings: Settings,
    stops: tuple[int, ...],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """The next id of every row."""
    longest = max(len(row.ids) for row in running)
    ids = [[row.ids[0]] * (longest - len(row.ids)) + row.ids for row in running]  # one more <s> changes no penalty
    scores = process(logits, torch.tensor(ids, device=logits.device), replace(settings, min_new_tokens=0), stops)
    early = [number for number, row in enumerate(running) if len(row.ids) - 1 < settings.min_new_tokens]
    if early:
        scores = scores.clone()
        for stop in stops:
            scores[early, stop] = -torch.inf
    if settings.temperature > 0:
        chosen = sample(scores, settings, [generators[row.index] for row in running])
    else:
        chosen = scores.argmax(-1)
    return [int(token) for token in chosen.tolist()]


def _together(one: Decoder, other: Decoder) -> Decoder:
    """Both decoders' rows in ``one``: columns padded on the left, images on the right, where one has fewer."""
    if any(getattr(layer, "is_sliding", False) for layer in (*one.cache.layers, *other.cache.layers)):
        raise UsageError(
            "--batching continuous does not serve language models with a sliding window", remedy="use --batching fixed"
        )
    one.settle()
    other.settle()
    columns = max(one.mask.shape[1], other.mask.shape[1])
    for mine, new in zip(one.cache.layers, other.cache.layers, strict=True):
        mine.keys = torch.cat([_columns(mine.keys, columns), _columns(new.keys, columns)])
        mine.values = torch.cat([_columns(mine.values, columns), _columns(new.values, columns)])
    masks = [F.pad(side.mask, (columns - side.mask.shape[1], 0)) for side in (one, other)]
    one.mask = torch.cat(masks)
    one.position = torch.cat([one.position, other.position])
    one.logits = torch.cat([one.logits, other.logits])
    one.visual = _seen(one.visual, other.visual)
    unused = int((one.mask.cumsum(1) == 0).sum(1).min())  # columns that all rows have left behind
    if unused:
        one.mask = one.mask[:, unused:]
        for layer in one.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
    return one


def _columns(states: Tensor, columns: int) -> Tensor:
    return F.pad(states, (0, 0, columns - states.shape[2], 0))


def _seen(one: VisualContext | None, other: VisualContext | None) -> VisualContext | None:
    """What both see; images that a row does not have are hidden from it."""
    if one is None or other is None:
        return one
    images = max(one.visible.shape[-1], other.visible.shape[-1])
    visible = torch.cat([F.pad(side.visible, (0, images - side.visible.shape[-1])) for side in (one, other)])
    if images == 0:
        return replace(one, visible=visible)
    shapes = one.shapes or other.shapes
    seeing = one if one.visible.shape[-1] else other
    pattern = seeing.values[0]
    cells = images * (pattern.shape[1] // seeing.visible.shape[-1])

    def padded(side: VisualContext, layer: int) -> Tensor:
        if not side.visible.shape[-1]:
            return pattern.new_zeros(len(side.visible), cells, *pattern.shape[2:])
        return F.pad(side.values[layer], (0, 0, 0, 0, 0, cells - side.values[layer].shape[1]))

    layers = [torch.cat([padded(one, layer), padded(other, layer)]) for layer in range(len(one.values))]
    return VisualContext(layers, shapes, visible)
