"""Task ``image_decoder``: L_NIP alone (paper Eq. 3), on contexts that the frozen rest of the model computes beforehand.

    rows → frozen visual tokenizer and language model, once → hidden states, feature maps and latents on the device
         → every step: a random choice of pictures → context resampler, U-Net with MMFS → image loss

A step of joint training spends most of its time on what the image decoder only reads. Kept, it is computed once for
thousands of steps; after ``data.kept_steps`` the next ``data.kept_rows`` rows take its place. Everything is a function
of (seed, step), so a resumed run keeps the same rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from mmi_engine.errors import ConfigError
from mmi_engine.model.image_decoder import ImageDecoder, resampled_context
from mmi_engine.model.interleaved import MMInterleaved, previous_images
from mmi_engine.runtime import no_collection
from mmi_engine.sequence import decoder_visibility, image_contexts
from mmi_engine.train.cache import Cache
from mmi_engine.train.interleaved import InterleavedTask, redraw
from mmi_engine.train.loader import stream
from mmi_engine.train.precision import DTYPES, run_in
from mmi_engine.train.recipe import Recipe
from mmi_engine.train.words import TokenWords, word_loss

KEEP_BATCH = 64
"""Rows whose contexts are computed at a time."""
KEEP_SEED = 7_000_003


@dataclass(frozen=True)
class Choice:
    """A micro-batch before it is looked up: ``draws`` ``[P]`` in [0, 1) choose among the pictures kept for ``turn``."""

    turn: int
    draws: np.ndarray

    def pin_memory(self) -> Choice:
        """Nothing to pin."""
        return self


@dataclass
class Pictures:
    """What the image decoder reads about P pictures.

    hidden ``[P, K, d_llm]`` contexts, nearest first · mask ``[P, K]`` long · features maps ``[P, M, C, h_l, w_l]`` of
    the images before · visible ``[P, M]`` · latents ``[P, C, h, w]`` scaled · seeing: how many see an image; they come
    first. told ``[P, classes]``: of the text before each, for :mod:`mmi_engine.train.words`. cells ``[P, h, w]``: what
    each cell counts, see :mod:`mmi_engine.train.balance`.
    """

    hidden: Tensor
    mask: Tensor
    features: list[Tensor]
    visible: Tensor
    latents: Tensor
    seeing: int
    told: Tensor | None = None
    cells: Tensor | None = None


class Kept:
    """Contexts and features of some rows on the model's device, in ``dtype``; pictures to draw in two lists.

    Pictures that see an image before them and those that see none are listed apart, so that every batch holds the same
    number of each and its shapes repeat. Without ``draw`` feature maps, by far the most of it, are not kept.
    """

    def __init__(self, model: MMInterleaved, dtype: torch.dtype, draw: bool = True) -> None:
        self.model, self.dtype, self.draw = model, dtype, draw
        self.hidden: list[Tensor] = []
        self.features: list[list[Tensor]] = []
        self.latents: list[Tensor] = []
        self.told: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.records: list[tuple[Tensor, ...]] = []
        self.images = self.rows = 0

    @torch.no_grad()
    def add(self, batch: Any, redrawn: float) -> None:
        """Compute and keep one batch of rows (on the device)."""
        inputs, model = batch.inputs, self.model
        if redrawn:
            inputs = redraw(model, inputs, redrawn)
        visual = model.visual_tokenizer(inputs.images)
        hidden = model.hidden_states(inputs, visual)
        tokens, count = model.config.tokens, model.config.image_decoder.context_images
        rows, columns, mask = image_contexts(inputs.text_ids, tokens)
        visible = decoder_visibility(inputs.text_ids, tokens, count)
        drawn = ((mask.sum(1) > 2) & inputs.image_loss_mask.bool()).nonzero().squeeze(1)
        order = torch.arange(len(rows), device=rows.device)
        before = previous_images(order + self.images, count)  # (ΣN, M) numbers of images
        ends, lengths = columns[:, 0], mask.sum(1)
        record = (rows + self.rows, ends, lengths, order + self.images, before, visible)
        self.records.append(tuple(part[drawn] for part in record))
        self.hidden.append(hidden.to(self.dtype))
        self.features.append([maps.to(self.dtype) for maps in visual.features] if self.draw else [])
        self.latents.append(inputs.latents.half())
        if batch.told is not None:
            self.told.append(batch.told)
        if batch.cells is not None:
            self.weights.append(batch.cells.half())
        self.images, self.rows = self.images + len(inputs.images), self.rows + len(hidden)

    def close(self) -> None:
        """Join what was added and sort the pictures into seeing and blind ones.

        Raises:
            ConfigError: there is no picture to learn from.
        """
        length = max(part.shape[1] for part in self.hidden)
        padded = [nn.functional.pad(part, (0, 0, 0, length - part.shape[1])) for part in self.hidden]
        self.states = torch.cat(padded)  # (rows, T, d)
        self.maps = [torch.cat(level) for level in zip(*self.features, strict=True)]
        self.targets = torch.cat(self.latents)
        self.words = torch.cat(self.told) if self.told else None
        self.cells = torch.cat(self.weights) if self.weights else None
        self.row, self.end, self.length, self.image, self.before, self.visible = (
            torch.cat(column) for column in zip(*self.records, strict=True)
        )
        if not len(self.row):
            raise ConfigError(
                "data.mixture: no row has a picture to draw", remedy="mix in story, t2i or seg2img, or keep more rows"
            )
        sees = self.visible.any(dim=1)
        self.seeing, self.blind = sees.nonzero().squeeze(1), (~sees).nonzero().squeeze(1)
        self.hidden, self.features, self.latents, self.told, self.weights, self.records = [], [], [], [], [], []

    def count_seeing(self, pictures: int) -> int:
        """How many of so many pictures see an image: the share among all that are kept, to the nearest eighth."""
        share = len(self.seeing) / (len(self.seeing) + len(self.blind))
        return round(round(share * 8) / 8 * pictures)

    def numbers(self, draws: np.ndarray) -> Tensor:
        """Draws in [0, 1) → pictures: the first ones among the seeing, the rest among the blind, in proportion."""
        seeing = self.count_seeing(len(draws))
        uniform = torch.from_numpy(draws).to(self.row.device)
        parts = [(uniform[:seeing], self.seeing), (uniform[seeing:], self.blind)]
        return torch.cat([numbers[(u * len(numbers)).long()] for u, numbers in parts if len(u)])

    def pictures(self, draws: np.ndarray) -> Pictures:
        """Look the chosen pictures up."""
        chosen = self.numbers(draws)
        back = torch.arange(self.states.shape[1], device=chosen.device)[None]
        columns = self.end[chosen, None] - back
        mask = back < self.length[chosen, None]
        hidden = self.states[self.row[chosen, None], columns.clamp(min=0)]
        features = [maps[self.before[chosen].clamp(min=0)] for maps in self.maps]
        latents = self.targets[self.image[chosen]].float()
        told = None if self.words is None else self.words[self.image[chosen]]
        cells = None if self.cells is None else self.cells[self.image[chosen]].float()
        visible, seeing = self.visible[chosen], self.count_seeing(len(draws))
        return Pictures(hidden, mask.long(), features, visible, latents, seeing, told, cells)


class ContextWords(nn.Module):
    """How well context tokens tell the words before the picture, and how far they went from what they were.

    Args:
        decoder: of which the context resampler is trained; a copy of it stays as it is.
        words, keep: weights of :func:`mmi_engine.train.words.word_loss` and of the mean squared distance.
    """

    def __init__(self, decoder: ImageDecoder, words: float, keep: float) -> None:
        super().__init__()
        self.words, self.keep = words, keep
        config = decoder.config.context_resampler
        self.head = TokenWords(config.num_queries, config.hidden_size)
        self.projection, self.resampler = (
            copy.deepcopy(part).requires_grad_(False) for part in (decoder.context_proj, decoder.context_resampler)
        )

    def forward(self, tokens: Tensor, hidden: Tensor, mask: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Both losses, not weighted; ``tokens`` are the context tokens of ``hidden`` and ``mask``."""
        said = word_loss(self.head(tokens), told)
        if not self.keep:
            return said, torch.zeros_like(said)
        with torch.no_grad():
            before = resampled_context(self.projection, self.resampler, hidden.float(), mask)
        return said, F.mse_loss(tokens.float(), before)


class _Loss(nn.Module):
    """L_NIP, and the losses on context tokens, as a function of tensors alone, which is what can be recorded."""

    def __init__(self, objective: ImageDecoderObjective, seeing: int) -> None:
        super().__init__()
        self.decoder, self.words = objective.model.image_decoder, objective.words
        self.noise_repeats, self.seeing, self.dtype = objective.noise_repeats, seeing, objective.dtype
        self.draw, self.shift = objective.draw, objective.timestep_shift

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor,
        visible: Tensor,
        latents: Tensor,
        told: Tensor,
        cells: Tensor,
        *features: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (hidden, mask, list(features), visible, latents)
        weights_of_cells = cells if cells.numel() else None
        arguments = (*inputs, self.noise_repeats, self.seeing, self.draw, self.shift, weights_of_cells)
        loss, tokens = run_in(self.dtype, self.decoder, *arguments)
        return (loss, *self.words(tokens, hidden, mask, told)) if self.words else (loss,)


class ImageDecoderObjective(nn.Module):
    """``forward(pictures) -> (loss, parts)``: L_NIP of the image decoder of ``model``, not weighted by λ.

    Args:
        model: of which the image decoder is trained.
        noise_repeats, dtype, draw: as in :class:`mmi_engine.train.interleaved.InterleavedObjective`.
        cuda_graph: record forward and backward pass on first use, and again when shapes change. Recording runs the step
            a few times, so the step after it draws other noise than it would have drawn otherwise.
        words, keep: see :class:`ContextWords`.
        timestep_shift: see :func:`mmi_engine.model.image_decoder.shifted_timesteps`.
    """

    def __init__(
        self,
        model: MMInterleaved,
        noise_repeats: int,
        dtype: torch.dtype,
        cuda_graph: bool = False,
        draw: bool = True,
        words: float = 0.0,
        keep: float = 0.0,
        timestep_shift: float = 1.0,
    ) -> None:
        super().__init__()
        self.timestep_shift = timestep_shift
        self.model, self.noise_repeats, self.dtype, self.cuda_graph = model, noise_repeats, dtype, cuda_graph
        self.draw, self.words = draw, ContextWords(model.image_decoder, words, keep) if words else None
        self._recorded: dict[tuple[Any, ...], Callable[..., tuple[Tensor, ...]]] = {}

    def forward(self, pictures: Pictures) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and, detached, its parts."""
        p = pictures
        told = p.mask.new_zeros((len(p.mask), 1)) if p.told is None else p.told
        cells = p.latents.new_empty(0) if p.cells is None else p.cells
        tensors = (p.hidden, p.mask, p.visible, p.latents, told, cells, *p.features)
        if self.cuda_graph and self.training and p.hidden.is_cuda:
            losses = self._record(tensors, p.seeing)(*tensors)
        else:
            losses = _Loss(self, p.seeing)(*tensors)
        if not self.words:
            return losses[0], {"image": losses[0].detach()}
        image, said, moved = losses
        found = {"words": said, "moved": moved if self.words.keep else None, "image": image if self.draw else None}
        parts = {name: loss.detach() for name, loss in found.items() if loss is not None}
        return image + self.words.words * said + self.words.keep * moved, parts

    def _record(self, tensors: tuple[Tensor, ...], seeing: int) -> Callable[..., tuple[Tensor, ...]]:
        key = (seeing, *[tuple(tensor.shape) for tensor in tensors])
        if key not in self._recorded:
            core = _Loss(self, seeing).train(self.training)
            sample = tuple(tensor.clone() for tensor in tensors)
            with no_collection():
                self._recorded = {key: torch.cuda.make_graphed_callables(core, sample, allow_unused_input=True)}
        return self._recorded[key]


class ImageDecoderTask(InterleavedTask):
    """The task the loop runs; held-out losses, preview and export are those of joint training.

    Raises:
        ConfigError: ``loop.cuda_graph`` without a CUDA device.
    """

    def __init__(self, recipe: Recipe, train: Cache, val: Cache, progress: Callable[[int, int], None]) -> None:
        super().__init__(recipe, train, val, progress)
        if recipe.loop.cuda_graph and self.model.device.type != "cuda":
            raise ConfigError("loop.cuda_graph needs a CUDA device", remedy="set loop.cuda_graph=false")
        self.joint = self.module
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for name, parameter in self.model.image_decoder.named_parameters():
            parameter.requires_grad_(not name.startswith("codec.") and not name.endswith("ignore_token"))
        self.dtype = DTYPES[recipe.loop.precision]
        loss = recipe.loss
        self.module = ImageDecoderObjective(
            self.model,
            loss.noise_repeats,
            self.dtype,
            recipe.loop.cuda_graph,
            draw=loss.image > 0,
            words=loss.words,
            keep=loss.keep,
            timestep_shift=loss.timestep_shift,
        )
        self.processes = PartialState().num_processes
        self.turn = -1
        self.kept: Kept | None = None

    def batch(self, index: int) -> Choice:  # type: ignore[override]
        """Which pictures micro-batch ``index`` learns from."""
        loop, data = self.recipe.loop, self.recipe.data
        turn = index // self.processes // (data.kept_steps * loop.accumulate)
        rng = np.random.default_rng((self.recipe.seed, index, 2))
        return Choice(turn, rng.random(loop.batch_size))

    def to_device(self, batch: Any, device: Any) -> Any:
        """Look a :class:`Choice` up among what is kept, after keeping what its turn needs."""
        if not isinstance(batch, Choice):
            return super().to_device(batch, device)
        if batch.turn != self.turn:
            self.turn, self.kept = batch.turn, None  # the old ones go before the new ones come
            self.kept = self._keep(batch.turn)
        assert self.kept is not None
        return self.kept.pictures(batch.draws)

    def ids(self, batch: Any) -> list[str]:
        """The turn and the numbers of its pictures."""
        assert self.kept is not None
        return [f"rows {batch.turn}: picture {int(n)}" for n in self.kept.numbers(batch.draws)]

    def size(self, batch: Any) -> int:
        """Noisy pictures."""
        return len(batch.draws) * self.recipe.loss.noise_repeats

    def evaluate(self, samples: int) -> dict[str, float]:
        """See :meth:`InterleavedTask.evaluate`."""
        module, self.module = self.module, self.joint
        try:
            return super().evaluate(samples)
        finally:
            self.module = module

    def _keep(self, turn: int) -> Kept:
        rows, training = self.recipe.data.kept_rows, self.model.training
        batches = -(-rows // KEEP_BATCH)
        kept = Kept(self.model, self.dtype, self.recipe.loss.image > 0)
        self.model.eval()
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(KEEP_SEED + turn)
            indices = range(turn * batches, (turn + 1) * batches)
            make = self._rows
            for _, batch in stream(make, indices, workers=self.recipe.data.loaders, pin=bool(devices)):
                kept.add(batch.to(self.model.device), self.recipe.data.redrawn)
        self.model.train(training)
        kept.close()
        return kept

    def _rows(self, index: int) -> Any:
        return self.train.batch(index, KEEP_BATCH)
