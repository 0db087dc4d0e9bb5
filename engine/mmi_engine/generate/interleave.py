"""Interleaved generation: fill every missing text and picture of a document, in order, each from all before it.

Place in the flow: the one path behind all generating commands. A document is a list of pieces; in each round the next
missing piece of every document is made, documents whose next piece has the same shape together. A finished picture is
rounded to 8 bits and encoded like a given one, so a story continues from what its user sees.

An item's bytes do not depend on its neighbours: shapes follow from the item alone (its length rounded up, its number of
images), short batches are filled up with copies, every picture has its own random generator, and all samplers and
reductions work row by row. Source: docs/model.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mmi_engine.data.images import prepare
from mmi_engine.errors import TextTooLongError
from mmi_engine.generate.continuous import write_texts
from mmi_engine.generate.document import Document
from mmi_engine.generate.encoding import encode, to_picture
from mmi_engine.generate.image import Denoising, ImageRequest, denoise, to_images
from mmi_engine.generate.reading import (
    Prompt,
    Reading,
    Values,
    check_room,
    context_limit,
    join,
    padded,
    read,
    take,
    worth_keeping,
)
from mmi_engine.generate.reuse import Encoded, PictureStore, Reuse
from mmi_engine.generate.score import option_scores
from mmi_engine.generate.settings import Settings
from mmi_engine.generate.text import generate_text
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.packed import packed
from mmi_engine.model.rows import drawn_together, invariant_rows, steady
from mmi_engine.model.vision import VisualOutput
from mmi_engine.pieces import Piece
from mmi_engine.sequence import context_columns, pad_rows, tokenize

Shape = tuple[str, int, int, int]
"""What must agree within a batch: kind, padded length of what was read before and is new, number of images."""


def fill(
    model: MMInterleaved,
    items: Sequence[Sequence[Piece]],
    seeds: Sequence[int],
    settings: Settings,
    batch_size: int,
    free: Sequence[int] | None = None,
    pictures: PictureStore | None = None,
    continuous: bool = False,
) -> list[list[Piece]]:
    """Values for all missing pieces.

    Args:
        model: with its tokenizer.
        items: documents; a text's value is a string, an image's a PIL picture, ``None`` is generated.
        seeds: one per document, ≥ 0.
        settings: decoding choices.
        batch_size: rows of every batch; fewer documents are filled up.
        free: per document, how many pictures may be added after its last piece, the model deciding where text ends and
            a picture begins.
        pictures: encoded pictures to use and to add to, of this model; default a store that ends with the call.
        continuous: write texts by `continuous.py`.

    Returns:
        The documents with values (and, with ``free``, further pieces); pictures as RGB at the decoder's size.

    Raises:
        TextTooLongError: a document does not fit into the model's context. A free continuation ends where it is full.
        FloatingPointError: the model produced NaN or infinity.
    """
    free = free or [0] * len(items)
    documents = [
        Document(list(item), seed, extra, len(item)) for item, seed, extra in zip(items, seeds, free, strict=True)
    ]
    maker = Maker(model, settings, batch_size, pictures=pictures, continuous=continuous)
    with torch.no_grad():
        while maker.round(documents):
            pass
    return [document.pieces for document in documents]


class Maker:
    """One run over a few documents; `rank.py` scores candidates with its parts."""

    def __init__(
        self,
        model: MMInterleaved,
        settings: Settings,
        batch_size: int,
        *,
        pictures: PictureStore | None = None,
        reuse: Reuse | None = None,
        continuous: bool = False,
    ) -> None:
        self.model, self.settings, self.continuous = packed(steady(model)), settings, continuous
        self.reuse = reuse or Reuse()
        self.pictures = PictureStore() if pictures is None else pictures
        self.batch_size = invariant_rows(batch_size, model.device)
        self.tokens, self.config = model.config.tokens, model.config
        self.plan = Denoising.choose(settings, model.config.generation)
        self.dtype = model.boi_embedding.dtype
        self.limit = context_limit(model.config)

    def round(self, documents: list[Document]) -> bool:
        """Make one piece of every unfinished document; False when there was none."""
        waiting: dict[Shape, list[tuple[Document, int]]] = {}
        unfinished = [document for document in documents if document.unfinished]
        if not self.reuse.pictures:
            for document in unfinished:
                document.encoded = []
        self.encode([(document, self._cut(document)) for document in unfinished])
        for document in documents:
            index = document.next_missing()
            if index is None:
                index = self._open_free(document)
            if index is None:
                continue
            try:
                shape = self._shape(document, index)
            except TextTooLongError:
                if not self._end_free(document, index):
                    raise
                continue
            waiting.setdefault(shape, []).append((document, index))
        if self.continuous:
            texts = {shape: waiting.pop(shape) for shape in list(waiting) if shape[0] == "text"}
            self._write_together([(*place, shape) for shape, group in texts.items() for place in group])
            if texts and not waiting:
                return True
        for (kind, *_), group in waiting.items():
            for start in range(0, len(group), self.batch_size):
                self.make(kind, group[start : start + self.batch_size])
        return bool(waiting)

    def make(self, kind: str, part: list[tuple[Document, int]]) -> None:
        """One piece of every document in ``part``, all of one shape."""
        {"image": self._draw, "text": self._write, "options": self._choose}[kind](part)

    def _open_free(self, document: Document) -> int | None:
        """Free continuation: the index of a new text piece, unless the document has ended."""
        if document.free <= 0 or document.ended:
            return None
        document.pieces.append(Piece("text"))
        return len(document.pieces) - 1

    def _end_free(self, document: Document, index: int) -> bool:
        """End a free continuation that has no room for piece ``index``; False where there is nothing to show for it."""
        if index < document.given or not document.made:
            return False
        del document.pieces[index:]
        document.ended = True
        return True

    def _cut(self, document: Document) -> int:
        """How many pieces precede the next missing one."""
        index = document.next_missing()
        return len(document.pieces) if index is None else index

    def _ids(self, document: Document, index: int) -> list[int]:
        """Prompt of piece ``index``: everything before it, and ``<BoI>`` when a picture is to come."""
        before = document.pieces[:index]
        ids = tokenize(before, self.model.tokenizer, self.tokens, self.config.tokens_per_image).ids
        if document.pieces[index].kind == "image":
            return [*ids, self.tokens.boi]
        return ids

    def _known(self, document: Document, ids: list[int]) -> int:
        """How many of ``ids`` the language model has read before."""
        return document.read.shared(ids, document.encoded, self.tokens) if document.read is not None else 0

    def _shape(self, document: Document, index: int) -> Shape:
        """See `Shape`."""
        piece, ids = document.pieces[index], self._ids(document, index)
        length, known = len(ids), self._known(document, ids)
        kind = "options" if piece.options else str(piece.kind)
        new_tokens = self.settings.max_new_tokens if kind == "text" else 0
        check_room(self.config, index, length + new_tokens, len(document.encoded))
        return kind, padded(known) if known else 0, padded(length - known), len(document.encoded)

    def encode(self, wanted: list[tuple[Document, int]]) -> None:
        """Encode the images before the next missing piece that are not encoded yet, each content once."""
        size = self.config.vision.image_size
        todo: list[tuple[Document, Image.Image]] = []
        for document, cut in wanted:
            images = [p.value for p in document.pieces[:cut] if p.kind == "image"]
            todo += [(document, prepare(image, size)) for image in images[len(document.encoded) :]]
        if not self.reuse.pictures:
            for (document, _), encoded in zip(todo, self._encoded([picture for _, picture in todo]), strict=True):
                document.encoded.append(encoded)
            return
        keys = [PictureStore.key(picture, self.batch_size) for _, picture in todo]
        found = {key: self.pictures.get(key) for key in keys}
        missing = {key: picture for key, (_, picture) in zip(keys, todo, strict=True) if found[key] is None}
        for key, encoded in zip(missing, self._encoded(list(missing.values())), strict=True):
            found[key] = self.pictures.put(key, encoded)
        for key, (document, _) in zip(keys, todo, strict=True):
            encoded_once = found[key]
            assert encoded_once is not None
            document.encoded.append(encoded_once)

    def _encoded(self, pictures: list[Image.Image]) -> list[Encoded]:
        return encode(self.model, pictures, self.batch_size, values=self.reuse.values)

    def _fill_up(self, part: list[tuple[Document, int]]) -> list[tuple[Document, int]]:
        """A full batch: the part and copies of its first row."""
        return [*part, *[part[0]] * (self.batch_size - len(part))]

    def _visual(self, rows: list[tuple[Document, int]]) -> VisualOutput | None:
        """Visual tokens of the images of every row but the first few; feature maps of all, where they are used."""
        encoded = [e for document, _ in rows for e in document.encoded]
        if not encoded:
            return None
        new = [e.tokens for document, seen in rows for e in document.encoded[seen:]]
        tokens = torch.stack(new) if new else encoded[0].tokens.new_zeros(0, *encoded[0].tokens.shape)
        levels = range(0 if self.reuse.values else len(encoded[0].features))
        features = tuple(torch.stack([e.features[level] for e in encoded]) for level in levels)
        return VisualOutput(tokens, features, tokens.new_zeros(0), tokens.new_zeros(0))

    def _values(self, rows: list[Document]) -> Values | None:
        """Projected values of the rows' pictures, as they are kept with these."""
        first = rows[0].encoded
        if not self.reuse.values or not first or not first[0].values:
            return None
        layers = [
            torch.stack([torch.cat([e.values[layer] for e in document.encoded]) for document in rows])
            for layer in range(len(first[0].values))
        ]
        maps = first[0].features[self.config.language.finest_map :]
        return Values(layers, [(m.shape[1], m.shape[2]) for m in maps], len(first))

    def prompt(self, batch: list[tuple[Document, int]], *, left: bool) -> Prompt:
        """The batch's prompts behind what was read of them before, padded to their common rounded-up length."""
        rows = [self._ids(document, index) for document, index in batch]
        known = [self._known(document, ids) for (document, _), ids in zip(batch, rows, strict=True)]
        new = [ids[count:] for ids, count in zip(rows, known, strict=True)]
        ids, mask = pad_rows(new, self.tokens.pad, left=left, length=padded(len(new[0])))
        seen = [ids[:count].count(self.tokens.boi) for ids, count in zip(rows, known, strict=True)]
        documents, device = [document for document, _ in batch], self.model.device
        counts = torch.tensor([len(document.encoded) for document in documents])
        visual = self._visual(list(zip(documents, seen, strict=True)))
        past = join([(d.read, count) for d, count in zip(documents, known, strict=True)], self.tokens.pad, device)
        return Prompt(ids.to(device), mask.to(device), visual, counts.to(device), self._values(documents), past)

    def _read(self, part: list[tuple[Document, int]], *, left: bool) -> tuple[Prompt, Reading]:
        """Read the prompts of a full batch; keep what its documents' next pieces will read on from."""
        batch = self._fill_up(part)
        prompt = self.prompt(batch, left=left)
        kept = [document.goes_on(index) and self._worth_keeping(document, index) for document, index in part]
        reading = read(self.model, prompt, keep=left or any(kept))
        for row, (document, index) in enumerate(part):
            ids = self._ids(document, index)
            before = (document.read, self._known(document, ids))
            document.read = take(reading, row, ids, document.encoded, before, left=left) if kept[row] else None
        return prompt, reading

    def _worth_keeping(self, document: Document, index: int) -> bool:
        return self.reuse.prefix and worth_keeping(self.model, len(self._ids(document, index)), self.batch_size)

    def _write(self, part: list[tuple[Document, int]]) -> None:
        """Generate one text of every document in ``part``."""
        prompt, reading = self._read(part, left=True)
        generators = [document.generator(index) for document, index in self._fill_up(part)]
        made = generate_text(
            self.model, prompt, self.settings, generators=generators, reuse=self.reuse, reading=reading
        )
        for (document, index), ids in zip(part, made.ids, strict=False):
            self._give_text(document, index, ids)

    def _write_together(self, places: list[tuple[Document, int, Shape]]) -> None:
        """Generate one text of every document, of whatever shapes, by continuous batching."""
        made = write_texts(
            self.model,
            [shape for _, _, shape in places],
            lambda some: self.prompt([places[number][:2] for number in some], left=True),
            self.settings,
            self.batch_size,
            [document.generator(index) for document, index, _ in places],
        )
        for (document, index, _), ids in zip(places, made, strict=True):
            self._give_text(document, index, ids)

    def _give_text(self, document: Document, index: int, ids: list[int]) -> None:
        """Piece ``index`` has been written: ``ids`` with ``<s>`` and, where there is one, the stop id."""
        ended = ids[-1] if ids[-1] in (self.tokens.eos, self.tokens.boi) else None
        text = self.model.tokenizer.decode([i for i in ids[1:] if i not in (ended, self.tokens.image)])
        document.give(index, text)
        if document.free and index == len(document.pieces) - 1:
            self._go_on(document, text, ended)

    def _choose(self, part: list[tuple[Document, int]]) -> None:
        """Give every document in ``part`` the most likely of its options; one document at a time fills the batch."""
        for document, index in part:
            piece = document.pieces[index]
            rows = [self.continuation(document.pieces[:index], option) for option in piece.options]
            longest = max(map(len, rows)) + len(self._ids(document, index))
            if longest > self.limit:
                raise TextTooLongError(
                    f"prompt and longest option take {longest} tokens, the model holds {self.limit}",
                    remedy="shorten the options",
                )
            prompt = self.prompt([(document, index)] * self.batch_size, left=True)
            scores = tuple(option_scores(self.model, prompt, rows))
            document.give(index, piece.options[scores.index(max(scores))], scores)

    def continuation(self, before: list[Piece], text: str) -> list[int]:
        """Token ids of a text behind other pieces, joined as `tokenize` joins texts."""
        per_image = self.config.tokens_per_image
        start = tokenize(before, self.model.tokenizer, self.tokens, per_image).ids
        whole = tokenize([*before, Piece("text", text)], self.model.tokenizer, self.tokens, per_image).ids
        if whole[: len(start)] == start and len(whole) > len(start):
            return whole[len(start) :]
        return self.model.tokenizer.encode(f" {text}")  # the boundary fell inside a token

    def _go_on(self, document: Document, text: str, ended: int | None) -> None:
        """After a freely written text: open a picture where the model asked for one, else end the document."""
        if not text:
            document.pieces.pop()
        if ended == self.tokens.boi:
            document.pieces.append(Piece("image"))
            document.free -= 1
        else:
            document.ended = True

    def _draw(self, part: list[tuple[Document, int]]) -> None:
        """Generate one picture of every document in ``part``."""
        request = self._request(part)
        latents = self._denoise(request)
        if not bool(torch.isfinite(latents).all()):
            raise FloatingPointError("the denoised latents are not finite")
        pictures = self._decode(latents)
        if not bool(torch.isfinite(pictures).all()):
            raise FloatingPointError("the decoded pictures are not finite")
        for (document, index), picture in zip(part, pictures, strict=False):
            document.give(index, to_picture(picture))

    def _denoise(self, request: ImageRequest) -> Tensor:
        """Latents ``[N, C, h, w]``."""
        count = drawn_together(len(request.tokens), self.model.device)
        parts = [denoise(self.model, part, self.plan, reuse=self.reuse) for part in request.split(count)]
        return torch.cat(parts)[: len(request.tokens)]

    def _decode(self, latents: Tensor) -> Tensor:
        """Pictures ``[N, 3, H, W]`` in [0, 1]."""
        return to_images(self.model, latents)

    def _request(self, part: list[tuple[Document, int]]) -> ImageRequest:
        """Context tokens and image features of the pictures to draw, of a full batch."""
        batch = self._fill_up(part)
        before = [(document.read, self._known(document, self._ids(document, index))) for document, index in batch]
        prompt, reading = self._read(part, left=False)
        context = [
            hidden if old is None else torch.cat([old.hidden[:count], hidden, hidden[: width - count]])
            for (old, count), hidden, width in [
                (found, hidden, reading.mask.shape[1] - reading.hidden.shape[1])
                for found, hidden in zip(before, reading.hidden, strict=True)
            ]
        ]
        ends = torch.tensor([len(self._ids(document, index)) - 1 for document, index in batch])
        columns, mask = context_columns(torch.zeros_like(ends), ends, length=reading.mask.shape[1])
        device, rows = self.model.device, torch.arange(len(batch))[:, None]
        hidden = torch.stack(context)[rows.to(device), columns.to(device)]
        condition = self.model.image_decoder.context_tokens(hidden, mask.to(device))
        features, visible = self._context_images([document for document, _ in batch])
        generators = [document.generator(index) for document, index in batch]
        return ImageRequest(condition, features, visible, generators)

    def _context_images(self, rows: list[Document]) -> tuple[list[Tensor], Tensor]:
        """Maps ``[N, M, C, h_l, w_l]`` of the images that the U-Net sees, and their visibility ``[N, M]``."""
        count = min(len(rows[0].encoded), self.config.image_decoder.context_images)
        device = self.model.device
        if count == 0:  # zero maps that nobody sees
            vision = self.config.vision
            sides = vision.feature_sizes
            maps = [torch.zeros(len(rows), 1, vision.hidden_size, s, s, device=device, dtype=self.dtype) for s in sides]
            return maps, torch.zeros(len(rows), 1, dtype=torch.long, device=device)
        levels = range(len(rows[0].encoded[0].features))
        maps = [
            torch.stack([torch.stack([e.features[level] for e in row.encoded[-count:]]) for row in rows])
            for level in levels
        ]
        return maps, torch.ones(len(rows), count, dtype=torch.long, device=device)
