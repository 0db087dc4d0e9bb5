"""What the language model reads before it writes or draws, and what of that is kept for the next piece of a document.

Place in the flow: `interleave.py` puts prompts together, `read` runs them; `text.py` goes on from the result token by
token, `interleave.py` makes a picture's condition of it. A document only grows at its end, so a token's keys, values
and hidden state stay what they are: the next piece reads on behind them. They are found by the ids themselves, up to
the first that differs, and by the very pictures that were read.
B rows, P columns that were read before, N new ones, d width, H heads. Source: docs/model.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mmi_engine.errors import TextTooLongError
from mmi_engine.generate.reuse import Encoded
from mmi_engine.model.config import ModelConfig, SpecialTokens
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.language import VisualContext
from mmi_engine.model.mmfs import Shapes
from mmi_engine.model.vision import VisualOutput
from mmi_engine.sequence import language_visibility

LENGTH_STEP = 32
"""Sequence lengths are rounded up to a multiple of this, always with padding left, so that all rows take one path."""
KEPT_BYTES = 2**30
"""Keys and values of so many bytes are kept between pieces, counted for a full batch of an item's own length."""


@dataclass
class Past:
    """Columns that were read before, padded on the left: ids and mask ``[B, P]``, keys and values ``[B, H, P, d]``."""

    ids: Tensor
    mask: Tensor
    layers: list[tuple[Tensor, Tensor]]


@dataclass
class Values:
    """Projected values of all images of the rows, one ``[B, M·S, H, D]`` per MMFS layer, the maps' sizes, and M."""

    layers: list[Tensor]
    shapes: Shapes
    images: int


@dataclass
class Prompt:
    """What is read: new ids ``[B, N]`` and their mask.

    ``visual``: visual tokens of the images among the new ids, feature maps of all images of the rows (not needed with
    ``values``); ``counts`` ``[B]``: images of the rows; ``past``: what stands before the new ids.
    """

    ids: Tensor
    mask: Tensor
    visual: VisualOutput | None
    counts: Tensor
    values: Values | None = None
    past: Past | None = None


@dataclass
class Reading:
    """What came of it: hidden states ``[B, N, d]`` and positions ``[B, N]`` of the new ids, mask ``[B, P + N]``, the KV
    cache, and what the rows see."""

    hidden: Tensor
    positions: Tensor
    mask: Tensor
    cache: DynamicCache | None
    visual: VisualContext | None


@dataclass
class Read:
    """What is kept of one document: its first ``ids``, the pictures among them, keys and values ``[H, n, d]`` of every
    layer, hidden states ``[n, d]``."""

    ids: list[int]
    images: list[Encoded]
    layers: list[tuple[Tensor, Tensor]]
    hidden: Tensor

    def shared(self, ids: Sequence[int], images: Sequence[Encoded], tokens: SpecialTokens) -> int:
        """How many of ``ids`` need not be read again: at least one is left, and no image is cut in two."""
        if any(mine is not other for mine, other in zip(self.images, images, strict=False)):
            return 0
        most = min(len(self.ids), len(ids) - 1)
        count = next((i for i in range(most) if self.ids[i] != ids[i]), most)
        while count and ids[count] == tokens.image:
            count -= 1
        return count if count >= LENGTH_STEP else 0


def padded(length: int) -> int:
    """Length rounded up to the next multiple of ``LENGTH_STEP`` above it."""
    return (length // LENGTH_STEP + 1) * LENGTH_STEP


def read(model: MMInterleaved, prompt: Prompt, *, keep: bool = True) -> Reading:
    """Run the language model over a prompt; ``keep``: with a KV cache, else only what was read before is used."""
    ids, mask, past = prompt.ids, prompt.mask, prompt.past
    if past is not None:
        ids, mask = torch.cat([past.ids, ids], dim=1), torch.cat([past.mask, mask], dim=1)
    before = 0 if past is None else past.ids.shape[1]
    tokens = prompt.visual.tokens if prompt.visual is not None else ids.new_zeros(0, 1, 1, dtype=torch.float)
    embeds = model.embed(prompt.ids, tokens)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)[:, before:]
    visual = _visual(model, prompt, ids)
    if visual is not None and before:
        visual = VisualContext(visual.values, visual.shapes, visual.visible[:, before:])
    cache = model.language.new_cache() if keep or past is not None else None
    for index, (keys, values) in enumerate(past.layers if past is not None else ()):
        assert cache is not None
        cache.update(keys, values, index)
    hidden = model.language(embeds, mask, visual, position_ids=positions, cache=cache)
    return Reading(hidden, positions, mask, cache, visual)


def _visual(model: MMInterleaved, prompt: Prompt, ids: Tensor) -> VisualContext | None:
    """What all ``ids`` ``[B, P + N]`` see."""
    if prompt.values is None:
        features = prompt.visual.features if prompt.visual is not None else ()
        return model.visual_context(ids, features, prompt.counts)
    visible = language_visibility(ids, model.config.tokens, prompt.values.images)
    return VisualContext(prompt.values.layers, prompt.values.shapes, visible)


def join(rows: Sequence[tuple[Read | None, int]], pad: int, device: torch.device) -> Past | None:
    """The first ``count`` ids of every row's `Read` as one batch; ``None`` where nothing was read."""
    longest = max(count for _, count in rows)
    if not longest:
        return None
    length = padded(longest)
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    found = []
    for row, (kept, count) in enumerate(rows):
        assert kept is not None
        ids[row, length - count :] = torch.tensor(kept.ids[:count])
        mask[row, length - count :] = 1
        found.append(kept)
    layers = []
    for layer in range(len(found[0].layers)):
        sides = []
        for side in (0, 1):
            each = [kept.layers[layer][side][:, :count] for kept, (_, count) in zip(found, rows, strict=True)]
            sides.append(torch.stack([F.pad(one, (0, 0, length - one.shape[1], 0)) for one in each]))
        layers.append((sides[0], sides[1]))
    return Past(ids.to(device), mask.to(device), layers)


def take(
    reading: Reading, row: int, ids: list[int], images: list[Encoded], before: tuple[Read | None, int], *, left: bool
) -> Read | None:
    """What is kept of row ``row``, whose prompt was ``ids``; ``None`` where the cache has let go of something.

    Args:
        reading: of its batch.
        row, ids, images: which row, all its ids, all its pictures.
        before: what was read earlier, and how many ids of that were used.
        left: whether the new ids were padded on the left.
    """
    cache, (old, past) = reading.cache, before
    total = reading.mask.shape[1]
    if cache is None or any(layer.keys.shape[-2] != total for layer in cache.layers):  # a sliding window
        return None
    new, width = len(ids) - past, reading.hidden.shape[1]
    start = width - new if left else 0
    columns = slice(total - width + start, total - width + start + new)
    layers = [(layer.keys[row][:, columns], layer.values[row][:, columns]) for layer in cache.layers]
    hidden = reading.hidden[row, start : start + new]
    if old is None or not past:
        return Read(ids, list(images), [(k.clone(), v.clone()) for k, v in layers], hidden.clone())
    layers = [
        (torch.cat([a[:, :past], k], dim=1), torch.cat([b[:, :past], v], dim=1))
        for (a, b), (k, v) in zip(old.layers, layers, strict=True)
    ]
    return Read(ids, list(images), layers, torch.cat([old.hidden[:past], hidden]))


def worth_keeping(model: MMInterleaved, length: int, rows: int) -> bool:
    """Whether a full batch of documents of ``length`` tokens stays within `KEPT_BYTES`: a matter of the item alone."""
    library = model.language.body.config
    heads = getattr(library, "num_key_value_heads", None) or library.num_attention_heads
    width = getattr(library, "head_dim", None) or library.hidden_size // library.num_attention_heads
    each = 2 * library.num_hidden_layers * heads * width + library.hidden_size
    return each * length * rows * model.boi_embedding.element_size() <= KEPT_BYTES


def context_limit(config: ModelConfig) -> int:
    """Tokens that the language model holds."""
    return int(config.language.transformers["max_position_embeddings"])


def check_room(config: ModelConfig, index: int, tokens: int, images: int) -> None:
    """Raises TextTooLongError where piece ``index`` needs too many tokens or stands behind too many images."""
    limit = context_limit(config)
    if tokens > limit:
        raise TextTooLongError(
            f"piece {index} needs a context of {tokens} tokens, the model holds {limit}",
            remedy="shorten the texts or use fewer images",
        )
    most = config.language.mmfs.max_images - 1 if config.language.mmfs is not None else images
    if images > most:
        raise TextTooLongError(
            f"piece {index} stands behind {images} images, the model tells {most} apart", remedy="use fewer images"
        )
