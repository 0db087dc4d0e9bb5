"""Interleaved text and images ↔ token ids, index maps and loss masks: the one place that knows the layout.

Layout of a sequence:  ``<s> text … <BoI> <image>×K text … </s>``; several documents may be packed one after another,
each opening with ``<s>``. An image is ``<BoI>`` followed by K placeholders whose embeddings the model replaces by the
image's K visual tokens. Source: paper section 3.1; conventions of the released checkpoint (golden vectors).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mmi_engine.model.config import SpecialTokens
from mmi_engine.pieces import Piece as Piece

NO_LOSS = -100
"""Target id that cross-entropy ignores."""


class TextTokenizer(Protocol):
    """What the engine asks of a tokenizer: plain text to ids and back, without special tokens."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass
class Sequence:
    """One tokenised row: ids, its images in order of appearance, and which ids carry a text loss."""

    ids: list[int]
    images: list[Any] = field(default_factory=list)
    targets: list[int] | None = None


@dataclass
class InterleavedBatch:
    """A right-padded batch (left-padded for text generation).

    text_ids ``[B, T]`` long · attention_mask ``[B, T]`` long, 0 on padding · images ``[ΣN, 3, h, w]`` in [0, 1], in
    order of appearance over the batch · image_counts ``[B]`` long · target_ids ``[B, T]`` long, −100 = no loss, aligned
    with text_ids (the model shifts) · latents ``[ΣN, C, h', w']`` scaled, or moments ``[ΣN, 2C, h', w']``
    (posterior mean and standard deviation, unscaled), or images_dec ``[ΣN, 3, H, W]`` in [0, 1], of the pictures to be
    drawn · image_loss_mask ``[ΣN]`` float.
    """

    text_ids: Tensor
    attention_mask: Tensor
    images: Tensor
    image_counts: Tensor
    target_ids: Tensor | None = None
    latents: Tensor | None = None
    images_dec: Tensor | None = None
    image_loss_mask: Tensor | None = None
    moments: Tensor | None = None

    def to(self, device: torch.device | str) -> InterleavedBatch:
        """The same batch on another device; from pinned memory the host does not wait."""
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return replace(self, **moved)

    def pin_memory(self) -> InterleavedBatch:
        """The same batch in page-locked memory."""
        return replace(self, **{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in vars(self).items()})


def tokenize(pieces: SequenceOf[Piece], tokenizer: TextTokenizer, tokens: SpecialTokens, per_image: int) -> Sequence:
    """A document's pieces as one sequence that opens with ``<s>``; no ``</s>``.

    Neighbouring texts are joined by a space; spaces next to an image are dropped.
    """
    ids: list[int] = [tokens.bos]
    images: list[Any] = []
    texts: list[str] = []
    for piece in [*pieces, Piece("image")]:
        if piece.kind == "text":
            texts.append(str(piece.value).strip())
            continue
        ids += tokenizer.encode(" ".join(t for t in texts if t)) if any(texts) else []
        texts = []
        if piece.value is not None:
            ids += image_block(tokens, per_image)
            images.append(piece.value)
    return Sequence(ids, images)


def image_block(tokens: SpecialTokens, per_image: int) -> list[int]:
    """``<BoI>`` and the placeholders of one image."""
    return [tokens.boi] + [tokens.image] * per_image


def text_targets(
    ids: Tensor, tokens: SpecialTokens, *, skip_imageless: bool = False, prompt_lengths: SequenceOf[int] | None = None
) -> Tensor:
    """Targets of the text loss aligned with ``ids`` ``[B, T]`` (−100 = no loss).

    No loss on padding, placeholders, ``<s>`` and a ``<BoI>`` straight after ``<s>``; ``</s>`` and every other
    ``<BoI>`` are targets.

    Args:
        ids: ``[B, T]``, right-padded with ``tokens.pad``.
        tokens: the special tokens.
        skip_imageless: also drop text before which no ``<BoI>`` stands since its ``<s>`` (LAION pairs only).
        prompt_lengths: per row, how many leading ids belong to the prompt and carry no loss.
    """
    drop = (ids == tokens.pad) | (ids == tokens.image) | (ids == tokens.bos)
    after_bos = torch.zeros_like(drop)
    after_bos[:, 1:] = ids[:, :-1] == tokens.bos
    drop |= (ids == tokens.boi) & after_bos
    if skip_imageless:
        opened = ((ids == tokens.boi).cumsum(1) - _at(last_bos(ids, tokens), (ids == tokens.boi).cumsum(1))) > 0
        drop |= ~opened
    if prompt_lengths is not None:
        positions = torch.arange(ids.shape[1], device=ids.device)
        drop |= positions[None] < torch.as_tensor(prompt_lengths, device=ids.device)[:, None]
    return ids.masked_fill(drop, NO_LOSS)


def last_bos(ids: Tensor, tokens: SpecialTokens) -> Tensor:
    """Index of the last ``<s>`` at or before every position, 0 where none precedes: ``[B, T]`` long."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return torch.where(ids == tokens.bos, positions, torch.zeros_like(positions)).cummax(dim=1).values


def image_positions(ids: Tensor, tokens: SpecialTokens) -> tuple[Tensor, Tensor]:
    """Row and column of the ``<BoI>`` of every image, row by row: two ``[ΣN]`` long.

    A ``<BoI>`` without a placeholder behind it announces an image that is still to be drawn and is not counted.
    """
    begun = torch.zeros_like(ids, dtype=torch.bool)
    begun[:, :-1] = ids[:, 1:] == tokens.image
    rows, columns = ((ids == tokens.boi) & begun).nonzero(as_tuple=True)
    return rows, columns


def language_visibility(ids: Tensor, tokens: SpecialTokens, max_images: int) -> Tensor:
    """Which image of its row a token sees: ``[B, T, M]`` long.

    Those of its own document whose placeholder block has begun at or before it: an image's own tokens see that image,
    its ``<BoI>`` does not.
    """
    visible = ids.new_zeros(*ids.shape, max_images)
    rows, columns = image_positions(ids, tokens)
    positions = torch.arange(ids.shape[1], device=ids.device)
    same_document = last_bos(ids, tokens)[rows] <= columns[:, None]  # (ΣN, T)
    begun = positions[None] > columns[:, None]
    visible.transpose(1, 2)[rows, _order_in_row(rows)] = (begun & same_document).long()
    return visible


def decoder_visibility(ids: Tensor, tokens: SpecialTokens, context_images: int = 1) -> Tensor:
    """Which of the ``context_images`` images before it an image may look at: ``[ΣN, context_images]`` long.

    Column −1 is the image straight before it in the same row and document, column −2 the one before that.
    """
    rows, columns = image_positions(ids, tokens)
    order, starts = _order_in_row(rows), last_bos(ids, tokens)
    visible = ids.new_zeros(len(rows), context_images)
    for back in range(1, context_images + 1):
        has = order >= back
        previous = (torch.arange(len(rows), device=ids.device) - back).clamp(min=0)
        same = columns[previous] >= starts[rows, columns]
        visible[:, -back] = (has & same).long()
    return visible


def image_contexts(ids: Tensor, tokens: SpecialTokens) -> tuple[Tensor, Tensor, Tensor]:
    """Where the context of every image lies: hidden states from its document's ``<s>`` to its ``<BoI>``, reversed.

    Returns:
        rows ``[ΣN]``, columns ``[ΣN, K]`` (nearest first; 0 on padding) and mask ``[ΣN, K]`` long.
    """
    rows, columns = image_positions(ids, tokens)
    starts = last_bos(ids, tokens)[rows, columns]
    return rows, *context_columns(starts, columns)


def context_columns(starts: Tensor, ends: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Columns ``ends … starts`` counted down, and their mask: two ``[N, K]``, K the longest context or ``length``."""
    if length is None:
        length = int((ends - starts).max()) + 1 if len(ends) else 1
    back = torch.arange(length, device=ends.device)[None]
    columns = ends[:, None] - back
    mask = columns >= starts[:, None]
    return columns.clamp(min=0) * mask, mask.long()


def pad_rows(
    rows: SequenceOf[SequenceOf[int]], value: int, *, left: bool = False, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor ``[B, T]`` and its attention mask, padded on the right (or left) up to ``length``."""
    length = length or max(len(row) for row in rows)
    ids = torch.full((len(rows), length), value, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, where] = torch.tensor(list(row), dtype=torch.long)
        mask[index, where] = 1
    return ids, mask


def _order_in_row(rows: Tensor) -> Tensor:
    """0, 1, 2 … for the images of each row; ``rows`` is sorted."""
    positions = torch.arange(len(rows), device=rows.device)
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = rows[1:] != rows[:-1]
    return (
        positions - torch.where(first, positions, torch.zeros_like(positions)).cummax(0).values if len(rows) else rows
    )


def _at(index: Tensor, values: Tensor) -> Tensor:
    """``values[b, index[b, t]]``."""
    return values.gather(1, index)
