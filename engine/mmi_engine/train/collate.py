"""Planned rows → a batch: pictures loaded, mirrored and cut once for encoder and decoder, losses masked.

Place in the flow: :class:`Feed` is what the loop's loader calls, ``batch(index)``, a pure function of the seed and the
index. A document whose picture cannot be loaded is left out of its row and counted; nothing takes its place.
Shapes: see :class:`mmi_engine.sequence.InterleavedBatch`; pictures travel as uint8 ``[ΣN, side, side, 3]``.
Source: loss rules of paper appendix B and of the released checkpoint (docs/training.md).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmi_engine.data.images import ImageLoader, prepare
from mmi_engine.data.maps import Palette, load_map
from mmi_engine.errors import ItemError, TextTooLongError
from mmi_engine.sequence import NO_LOSS, InterleavedBatch, Piece, image_block, pad_rows, text_targets
from mmi_engine.tasks.ground import to_square
from mmi_engine.train.documents import BOX_ROOM, View, box_text
from mmi_engine.train.moments import Moments, key_of
from mmi_engine.train.packing import Blend, Encoded, Layout, Planned, Slot, Stream, encode


@dataclass
class ManifestBatch:
    """A batch, the names of its documents (``set:id``), what was dropped for it and why, and the places of the padded
    row: ``tokens`` of them are no padding."""

    inputs: InterleavedBatch
    names: list[str]
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    keys: list[str] = field(default_factory=list)
    """With kept latents: a picture's key, empty where nothing is to be drawn."""
    known: dict[str, np.ndarray] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> ManifestBatch:
        """The batch on ``device``, pictures as float ``[ΣN, 3, side, side]`` in [0, 1]."""
        inputs = self.inputs.to(device)
        drawn = None if inputs.images_dec is None else _as_float(inputs.images_dec)
        return replace(self, inputs=replace(inputs, images=_as_float(inputs.images), images_dec=drawn))

    def pin_memory(self) -> ManifestBatch:
        """The batch in page-locked memory."""
        return replace(self, inputs=self.inputs.pin_memory())


def _as_float(pictures: Tensor) -> Tensor:
    return pictures.permute(0, 3, 1, 2).float() / 255


@dataclass
class Sizes:
    """Sides of the pictures in pixels; ``decoder`` 0 where no image is learnt."""

    encoder: int
    decoder: int


@dataclass
class _Row:
    """What a row has come to so far."""

    ids: list[int] = field(default_factory=list)
    silent: list[bool] = field(default_factory=list)
    encoder: list[np.ndarray] = field(default_factory=list)
    decoder: list[np.ndarray] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


class Feed:
    """Batches by index.

    Args:
        blend: the stream of planned rows.
        layout: tokens and row length.
        sizes: of the pictures.
        palette: colours of semantic maps.
        moments: kept latents.

    A batch without a picture gets a black one that carries no loss: the visual tokenizer must have something to read,
    and all parts of the model take part in every step.
    """

    def __init__(
        self, blend: Blend, layout: Layout, sizes: Sizes, palette: Palette, moments: Moments | None = None
    ) -> None:
        self.blend, self.layout, self.sizes, self.palette = blend, layout, sizes, palette
        self.moments = moments

    def batch(self, index: int, size: int) -> ManifestBatch:
        """Rows ``index · size`` … of the stream as one right-padded batch."""
        rows, flags = [], []
        dropped: Counter[str] = Counter()
        for number in range(index * size, (index + 1) * size):
            stream, planned = self.blend.row(number)
            dropped += planned.dropped
            rows.append(self._row(stream, planned, dropped))
            flags.append(stream.entry.skip_imageless)
        keep = [place for place, row in enumerate(rows) if row.ids] or [0]
        rows, flags = [rows[place] for place in keep], [flags[place] for place in keep]
        if not rows[0].ids:  # nothing of the batch is left: an empty document, without loss
            rows[0].ids, rows[0].silent = [self.layout.tokens.bos, self.layout.tokens.eos], [True, True]
        tokens = sum(len(row.ids) for row in rows)
        if not any(row.drawn for row in rows):
            rows, flags = [*rows, self._blank()], [*flags, False]
        made = ManifestBatch(
            self._inputs(rows, flags),
            [name for row in rows for name in row.names],
            dropped,
            tokens,
        )
        return self._looked_up(made) if self.moments is not None else made

    def _looked_up(self, batch: ManifestBatch) -> ManifestBatch:
        """The batch with what is kept of its pictures' latents, and without their squares where that is all."""
        assert self.moments is not None
        squares, mask = batch.inputs.images_dec, batch.inputs.image_loss_mask
        if squares is None or mask is None:
            return batch
        keys = [key_of(squares[n].numpy()) if float(mask[n]) else "" for n in range(len(squares))]
        known = self.moments.known(keys)
        all_known = all(not key or key in known for key in keys)
        inputs = replace(batch.inputs, images_dec=None) if all_known else batch.inputs
        return replace(batch, inputs=inputs, keys=keys, known=known)

    def encoded(self, batch: ManifestBatch) -> ManifestBatch:
        """The batch with latents' moments in place of squares; called by the process that has the codec."""
        if self.moments is None or not batch.keys:
            return batch
        moments = self.moments.of(batch.keys, batch.known, batch.inputs.images_dec)
        return replace(batch, inputs=replace(batch.inputs, images_dec=None, moments=moments), keys=[], known={})

    def _blank(self) -> _Row:
        """A document of one black picture without any loss."""
        ids = [self.layout.tokens.bos, *image_block(self.layout.tokens, self.layout.per_image), self.layout.tokens.eos]
        seen, target = (np.zeros((side, side, 3), np.uint8) for side in (self.sizes.encoder, self.sizes.decoder))
        return _Row(ids, [True] * len(ids), [seen], [target], [False])

    def _inputs(self, rows: list[_Row], skip_imageless: list[bool]) -> InterleavedBatch:
        tokens = self.layout.tokens
        ids, mask = pad_rows([row.ids for row in rows], tokens.pad)
        silent, _ = pad_rows([[int(flag) for flag in row.silent] for row in rows], 1)
        targets = text_targets(ids, tokens)
        some = torch.tensor(skip_imageless)
        if bool(some.any()):
            targets[some] = text_targets(ids[some], tokens, skip_imageless=True)
        drawn = [float(flag) for row in rows for flag in row.drawn]
        learns = bool(self.sizes.decoder) and bool(drawn)
        return InterleavedBatch(
            text_ids=ids,
            attention_mask=mask,
            images=_stack([array for row in rows for array in row.encoder], self.sizes.encoder),
            image_counts=torch.tensor([len(row.drawn) for row in rows]),
            target_ids=targets.masked_fill(silent.bool(), NO_LOSS),
            images_dec=_stack([array for row in rows for array in row.decoder], self.sizes.decoder) if learns else None,
            image_loss_mask=torch.tensor(drawn) if learns else None,
        )

    def _row(self, stream: Stream, planned: Planned, dropped: Counter[str]) -> _Row:
        row = _Row()
        for slot in planned.slots:
            try:
                self._append(row, stream, slot)
            except ItemError as error:
                dropped[error.code] += 1
        return row

    def _append(self, row: _Row, stream: Stream, slot: Slot) -> None:
        """Add a document, or a part of one, to the row; nothing of it when a picture fails."""
        name, document = stream.document(slot.position)
        loader = ImageLoader(stream.index.root)
        views = [piece.value for piece in document.pieces if piece.kind == "image"]
        loaded: dict[int, Image.Image] = {}
        if document.box is not None:
            loaded[0] = loader.load(views[0].reference)
            written = box_text(document.box, *loaded[0].size, flip=document.flip)
            document.pieces[-1] = Piece("text", str(document.pieces[-1].value).replace(BOX_ROOM, written))
        encoded: Encoded = encode(document, self.layout)
        last = len(encoded.ids) if slot.last is None else slot.last
        if len(row.ids) + last - slot.first > self.layout.row_tokens:
            raise TextTooLongError("the document is longer than was planned")
        shown = [number for number, start in enumerate(encoded.starts) if slot.first <= start < last]
        made = []
        for number in shown:
            picture = loaded[number] if number in loaded else self.load(views[number], loader)
            made.append(self._squares(picture, views[number], document.flip))
        row.encoder += [seen for seen, _ in made]
        row.decoder += [target for _, target in made]
        row.drawn += [document.drawn[number] for number in shown]
        row.ids += encoded.ids[slot.first : last]
        row.silent += encoded.silent[slot.first : last]
        row.names.append(name)

    def load(self, view: View, loader: ImageLoader) -> Image.Image:
        """A picture, or a semantic map in its colours; raises ImageError."""
        if view.kind == "map":
            return load_map(loader, view.reference, self.palette)
        return loader.load(view.reference)

    def _squares(self, picture: Image.Image, view: View, flip: bool) -> tuple[np.ndarray, np.ndarray]:
        """One view of a picture as uint8 squares for encoder and decoder."""
        if view.fit == "squeeze":
            picture = to_square(picture, "squeeze")[0]
        if flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        seen = np.asarray(prepare(picture, self.sizes.encoder), np.uint8)
        if not self.sizes.decoder:
            return seen, np.zeros((0, 0, 3), np.uint8)
        if self.sizes.decoder == self.sizes.encoder:
            return seen, seen
        return seen, np.asarray(prepare(picture, self.sizes.decoder), np.uint8)


def _stack(arrays: list[np.ndarray], side: int) -> Tensor:
    """uint8 ``[N, side, side, 3]``, also of no picture."""
    return torch.from_numpy(np.stack(arrays)) if arrays else torch.zeros((0, side, side, 3), dtype=torch.uint8)


def describe(feed: Feed, rows: int = 64) -> dict[str, Any]:
    """Documents per set, tokens, pictures and filling of the first ``rows`` rows (nothing is loaded)."""
    counts: Counter[str] = Counter()
    tokens, images = [], []
    for number in range(rows):
        stream, planned = feed.blend.row(number)
        counts[stream.entry.name] += len(planned.slots)
        tokens.append(planned.tokens)
        images.append(planned.images)
    longest = feed.layout.row_tokens if feed.layout.pack else max(tokens)
    return {
        "documents": dict(counts),
        "tokens_per_row": round(float(np.mean(tokens)), 1),
        "images_per_row": round(float(np.mean(images)), 2),
        "filled": round(sum(tokens) / (rows * longest), 4),
    }
