"""Training sequences of the built-in world: (seed, index) → one row of packed documents; rows → a batch.

Between the cache of drawn pictures and the model. Each row is a function of (seed, index) alone, so that a run resumes
in the middle of an epoch by knowing its step. A row is filled with documents drawn from the task mixture until the next
one does not fit; every document opens with ``<s>`` and ends with ``</s>``. A prompt's own tokens carry no loss, and
only pictures that a task asks for carry the image loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmi_engine.errors import ConfigError
from mmi_engine.model.config import SpecialTokens
from mmi_engine.sequence import (
    NO_LOSS,
    InterleavedBatch,
    Piece,
    TextTokenizer,
    image_block,
    pad_rows,
    text_targets,
    tokenize,
)
from mmi_engine.train.balance import cell_weights, class_weights
from mmi_engine.train.cache import FRAMES, Cache
from mmi_engine.train.tasks import BUILDERS, Document, Reference, texts_before
from mmi_engine.train.words import labels

TRIES = 4
"""Documents drawn for the gap at a row's end before it is closed."""


@dataclass
class Row:
    """Tokenised documents one after another: ids, which of them carry no loss, images and names."""

    ids: list[int] = field(default_factory=list)
    silent: list[bool] = field(default_factory=list)
    images: list[Reference] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


@dataclass
class Batch:
    """What the model reads, and the documents it is made of. ``inputs.images`` is still uint8 ``[ΣN, 128, 128, 3]``
    here, a quarter of the bytes between processes and devices; :meth:`to` makes it float ``[ΣN, 3, 128, 128]``."""

    inputs: InterleavedBatch
    names: list[str]
    words: Tensor | None = None
    """Per image the classes of :mod:`mmi_engine.train.words`: of its detailed captions."""
    told: Tensor | None = None
    """Per image the classes of the text right before it."""
    cells: Tensor | None = None
    """Per image what the cells of its latents count, see :mod:`mmi_engine.train.balance`."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``, ready for the model."""
        inputs = self.inputs.to(device)
        images = inputs.images.permute(0, 3, 1, 2).float() / 255
        rest = (None if part is None else part.to(device) for part in (self.words, self.told, self.cells))
        return Batch(replace(inputs, images=images), self.names, *rest)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (what a loader does for CUDA)."""
        return replace(self, inputs=self.inputs.pin_memory())


class Mixture:
    """Rows and batches by index.

    Args:
        cache: drawn pictures and texts, with latents under the array name ``latents``.
        latents: name of the latents' array, see :meth:`mmi_engine.train.cache.Cache.encode`; ``None`` for batches
            without.
        scale: what latents are multiplied by.
        weights: task → probability of being drawn next (a document that does not fit the row's end is dropped).
        row_tokens: longest row.
        per_image: placeholders of one image.
        row_images: images of every row, see :class:`mmi_engine.train.recipe.DataConfig`; 0 for any number.
        words: batches hold the classes of :mod:`mmi_engine.train.words`.
        class_balance, emphasis: above 0 batches hold the weights of :mod:`mmi_engine.train.balance`.

    Raises:
        ConfigError: unknown task, or no task with a positive weight.
    """

    def __init__(
        self,
        cache: Cache,
        latents: str | None,
        scale: float,
        tokenizer: TextTokenizer,
        tokens: SpecialTokens,
        *,
        weights: dict[str, float],
        seed: int,
        row_tokens: int,
        per_image: int,
        row_images: int = 0,
        words: bool = False,
        class_balance: float = 0.0,
        emphasis: Mapping[str, float] | None = None,
    ) -> None:
        unknown = sorted(set(weights) - set(BUILDERS))
        if unknown or not any(weights.values()):
            what = f"unknown task {unknown[0]!r}" if unknown else "no task has a positive weight"
            raise ConfigError(f"data.mixture: {what}", remedy=f"tasks: {', '.join(BUILDERS)}")
        self.cache, self.latents, self.scale = cache, latents, scale
        self.tokenizer, self.tokens = tokenizer, tokens
        self.seed, self.row_tokens, self.per_image, self.row_images = seed, row_tokens, per_image, row_images
        self.words = words
        self.class_weights = class_weights(cache, class_balance, emphasis or {}) if class_balance else None
        self.tasks = [task for task, weight in weights.items() if weight]
        total = sum(weights.values())
        self.edges = np.cumsum([weights[task] / total for task in self.tasks])

    @cached_property
    def palette(self) -> np.ndarray:
        """uint8 [classes, 3], the colours of semantic maps."""
        from mmi_engine.toon.draw import PALETTE

        return np.asarray(PALETTE, np.uint8)

    def document(self, rng: np.random.Generator) -> Document:
        """Draw a task, a story and a frame."""
        task = self.tasks[min(int(np.searchsorted(self.edges, rng.random(), side="right")), len(self.tasks) - 1)]
        story, frame = int(rng.integers(self.cache.stories)), int(rng.integers(FRAMES))
        return BUILDERS[task](self.cache.texts(story), story, frame, rng)

    def row(self, index: int) -> Row:
        """Row ``index``, a function of (seed, index)."""
        rng = np.random.default_rng((self.seed, index))
        row, misses = Row(), 0
        while misses < TRIES:
            document = self.document(rng)
            ids = [*self._ids(document.pieces), self.tokens.eos]
            if row.ids and not self._fits(len(row.ids) + len(ids), len(row.images) + len(document.drawn)):
                misses += 1
                continue
            row.ids += ids
            row.silent += self._silent(document, len(ids))
            row.images += [piece.value for piece in document.pieces if piece.kind == "image"]
            row.drawn += document.drawn
            row.names.append(document.name)
            row.told += texts_before(document.pieces)
        return self._filled(row)

    def _silent(self, document: Document, length: int) -> list[bool]:
        """Which of a document's ``length`` ids carry no loss: those of pieces that come from the user."""
        prompt = len(self._ids(document.pieces[: document.prompt])) if document.prompt else 0
        silent = [True] * prompt + [False] * (length - prompt)
        for number in document.asked:
            start, end = (len(self._ids(document.pieces[:n])) for n in (number, number + 1))
            silent[start:end] = [True] * (end - start)
        return silent

    def _fits(self, tokens: int, images: int) -> bool:
        """Whether a row of so many tokens and images leaves room for the blank images it lacks."""
        if self.row_images:
            tokens += max(0, self.row_images - images) * len(self._blank)
        return tokens <= self.row_tokens and (not self.row_images or images <= self.row_images)

    @cached_property
    def _blank(self) -> list[int]:
        """A document of one image that nobody asks anything about."""
        return [self.tokens.bos, *image_block(self.tokens, self.per_image), self.tokens.eos]

    def _filled(self, row: Row) -> Row:
        missing = max(0, self.row_images - len(row.images))
        row.ids += self._blank * missing
        row.silent += [True] * (len(self._blank) * missing)
        row.images += [Reference("blank", 0, 0)] * missing
        row.drawn += [False] * missing
        row.told += [""] * missing
        return row

    def _ids(self, pieces: list[Piece]) -> list[int]:
        return tokenize(pieces, self.tokenizer, self.tokens, self.per_image).ids

    def batch(self, index: int, size: int) -> Batch:
        """Rows ``index·size`` … as one right-padded batch."""
        rows = [self.row(index * size + i) for i in range(size)]
        length = max(len(row.ids) for row in rows)
        length = max(length, self.row_tokens) if self.row_images else length
        ids, mask = pad_rows([row.ids for row in rows], self.tokens.pad, length=length)
        silent, _ = pad_rows([[int(flag) for flag in row.silent] for row in rows], 1, length=length)
        targets = text_targets(ids, self.tokens).masked_fill(silent.bool(), NO_LOSS)
        references = [reference for row in rows for reference in row.images]
        latent_rng = np.random.default_rng((self.seed, index, 1))
        inputs = InterleavedBatch(
            text_ids=ids,
            attention_mask=mask,
            images=self.pictures(references),
            image_counts=torch.tensor([len(row.images) for row in rows]),
            target_ids=targets,
            latents=None if self.latents is None else self.sampled_latents(references, latent_rng),
            image_loss_mask=torch.tensor([float(flag) for row in rows for flag in row.drawn]),
        )
        batch = Batch(inputs, [name for row in rows for name in row.names], cells=self.cells(references))
        if not self.words:
            return batch
        shown = [" / ".join(self._details(reference)) for reference in references]
        return replace(batch, words=labels(shown), told=labels(text for row in rows for text in row.told))

    def _details(self, reference: Reference) -> list[str]:
        """The detailed captions of a picture; none of a map or blank."""
        if reference.kind != "pictures":
            return []
        captions: list[str] = self.cache.texts(reference.story)["frames"][reference.frame]["details"]
        return captions

    def pictures(self, references: list[Reference]) -> Tensor:
        """uint8 ``[N, 128, 128, 3]``; semantic maps in their palette's colours."""
        arrays = []
        for reference in references:
            if reference.kind == "blank":
                arrays.append(np.zeros_like(self.cache.picture(0, 0)))
                continue
            array = self.cache.array(reference.kind, reference.story)[reference.frame]
            arrays.append(self.palette[array] if reference.kind == "maps" else array)
        return torch.from_numpy(np.stack(arrays))

    def cells(self, references: list[Reference]) -> Tensor | None:
        """Weights ``[N, h, w]`` of the cells of latents; ``None`` where all count alike."""
        if self.class_weights is None or self.latents is None:
            return None
        side = self.cache.array(self.latents, 0).shape[-1]
        maps = np.stack([self.cache.array("maps", r.story)[r.frame] for r in references])
        return torch.from_numpy(cell_weights(maps, self.class_weights, side))

    def sampled_latents(self, references: list[Reference], rng: np.random.Generator) -> Tensor:
        """Scaled latents ``[N, C, h, w]``, a sample of the codec's posterior each; zeros for all but pictures."""
        assert self.latents is not None
        moments = np.stack([self.cache.array(self.latents, r.story)[r.frame] for r in references]).astype(np.float32)
        mean, deviation = np.split(moments, 2, axis=1)
        sample = mean + deviation * rng.standard_normal(mean.shape, dtype=np.float32)
        drawn = np.array([r.kind == "pictures" for r in references], np.float32)[:, None, None, None]
        return torch.from_numpy(sample * drawn * self.scale)


def mixture_counts(mixture: Mixture, rows: int) -> dict[str, int]:
    """How many documents of each task the first ``rows`` rows hold (for the run directory and tests)."""
    counts = dict.fromkeys(mixture.tasks, 0)
    for index in range(rows):
        for name in mixture.row(index).names:
            counts[name.split(":")[0]] += 1
    return counts


def describe(mixture: Mixture, rows: int = 64) -> str:
    """JSON summary of the data stream: documents per task, tokens and images per row."""
    drawn = [mixture.row(index) for index in range(rows)]
    summary = {
        "documents": mixture_counts(mixture, rows),
        "tokens_per_row": round(float(np.mean([len(row.ids) for row in drawn])), 1),
        "images_per_row": round(float(np.mean([len(row.images) for row in drawn])), 2),
        "drawn_images_per_row": round(float(np.mean([sum(row.drawn) for row in drawn])), 2),
    }
    return json.dumps(summary, indent=2) + "\n"
