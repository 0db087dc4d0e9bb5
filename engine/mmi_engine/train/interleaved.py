"""Task ``interleaved``: the whole model, L = L_NTP + λ L_NIP (paper Eq. 5), everything trained but the codec.

    Mixture.batch → MMInterleaved(batch) → text loss + λ · image loss (``noise_repeats`` noise levels per picture)

Held-out loss, a contact sheet of drawn stories and the exported model directory use the averaged weights.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn

from mmi_engine.errors import ConfigError
from mmi_engine.model.checkpoint import save_model
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.presets import toon_config
from mmi_engine.model.tokenizer import DirectoryTokenizer
from mmi_engine.model.vae import ImageCodec
from mmi_engine.sequence import InterleavedBatch
from mmi_engine.toon.tokenizer import VOCABULARY
from mmi_engine.train import foundation
from mmi_engine.train.cache import FRAMES, Cache
from mmi_engine.train.data import Batch, Mixture, describe
from mmi_engine.train.precision import DTYPES, run_in
from mmi_engine.train.recipe import Recipe
from mmi_engine.train.vae import load_codec, to_float
from mmi_engine.train.words import MapWords, TokenWords, word_loss

PREVIEW_STORIES = 3
LATENT_ERROR = 0.1
"""Standard deviation of the noise on scaled latents that stands for errors of sampling."""
EVALUATION_BATCH = 8
WORD_MAP = 1
"""Which feature map words are told from: the finest that the language model reads."""
TOON_TOKENIZER = Path(__file__).resolve().parent.parent / "toon" / "data"


class InterleavedObjective(nn.Module):
    """``forward(batch) -> (loss, parts)`` around the model, so that data parallelism wraps one module.

    Args:
        model: to be trained.
        noise_repeats: noise levels per picture.
        redrawn: share of pictures that the encoder sees as the codec draws them. In a story the model reads its own
            pictures back, which are never as sharp as the ones it is trained on.
        dtype: in which forward and backward pass compute; the weights stay in float32 and are cast for every batch.
            Unlike autocast nothing in between goes back to float32, save softmax, statistics of norms and losses.
        draw: False leaves the image decoder and its loss out.
        words: weight of the loss of :mod:`mmi_engine.train.words` on visual tokens and the map of stride 8.
    """

    def __init__(
        self,
        model: MMInterleaved,
        noise_repeats: int,
        redrawn: float = 0.0,
        dtype: torch.dtype = torch.float32,
        draw: bool = True,
        words: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.noise_repeats, self.redrawn, self.dtype = model, noise_repeats, redrawn, dtype
        self.draw, self.words = draw, words
        if words:
            config = model.config
            self.token_words = TokenWords(config.tokens_per_image, model.language.d_model)
            self.map_words = MapWords(config.vision.hidden_size)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss, and L_NTP and L_NIP apart."""
        inputs = redraw(self.model, batch.inputs, self.redrawn) if self.redrawn and self.training else batch.inputs
        if not self.draw:
            inputs = replace(inputs, latents=None)
        if self.dtype != torch.float32:
            inputs = replace(inputs, images=inputs.images.to(self.dtype))
        output = run_in(self.dtype, self.model, inputs, noise_repeats=self.noise_repeats)
        parts = {"text": output.loss_text.detach()}
        if output.loss_image is not None:
            parts["image"] = output.loss_image.detach()
        if not self.words or batch.words is None:
            return output.loss, parts
        tokens, feature_map = output.visual.tokens, output.visual.features[WORD_MAP]
        said = word_loss(self.token_words(tokens), batch.words), word_loss(self.map_words(feature_map), batch.words)
        parts["words"], parts["map_words"] = said[0].detach(), said[1].detach()
        return output.loss + self.words * (said[0] + said[1]), parts


@torch.no_grad()
def redraw(model: MMInterleaved, inputs: InterleavedBatch, share: float) -> InterleavedBatch:
    """A ``share`` of the images replaced by what the codec makes of their latents, off by a little as in sampling."""
    assert inputs.latents is not None
    chosen = torch.rand(len(inputs.images), device=inputs.images.device) < share
    chosen &= inputs.latents.flatten(1).any(1)  # semantic maps have no latents
    latents = inputs.latents + LATENT_ERROR * torch.randn_like(inputs.latents)
    if inputs.latents.is_cuda:  # all of them, so that shapes repeat
        drawn = model.codec.decode(latents)
        images = torch.where(chosen[:, None, None, None], drawn.to(inputs.images.dtype), inputs.images)
        return replace(inputs, images=images)
    if not bool(chosen.any()):
        return inputs
    images = inputs.images.clone()
    images[chosen] = model.codec.decode(latents[chosen]).to(images.dtype)
    return replace(inputs, images=images)


class InterleavedTask:
    """The task the loop runs.

    Args:
        recipe: its ``[model]`` table as :func:`build_model` reads it.
        train, val: caches of drawn pictures; latents are computed here where they are missing.
        progress: called with (shards encoded, shards in all).
    """

    def __init__(self, recipe: Recipe, train: Cache, val: Cache, progress: Callable[[int, int], None]) -> None:
        self.recipe = recipe
        torch.manual_seed(recipe.seed)  # fresh weights are the same in every process and run
        self.model = build_model(recipe)
        self.module: nn.Module = InterleavedObjective(
            self.model,
            recipe.loss.noise_repeats,
            recipe.data.redrawn,
            DTYPES[recipe.loop.precision],
            draw=recipe.loss.image > 0,
            words=recipe.loss.words if recipe.task == "interleaved" else 0.0,
        )
        for parameter in self.model.codec.parameters():
            parameter.requires_grad_(False)
        self.model.to(PartialState().device)  # encoding what is missing may as well be fast
        key = codec_key(self.model.codec)
        encoder = posterior_moments(self.model.codec)
        needed = recipe.loss.image > 0 or recipe.data.redrawn > 0 or recipe.task == "image_decoder"
        names = [cache.encode(key, encoder, progress) if needed else None for cache in (train, val)]
        self.train, self.val = (self._mixture(*pair) for pair in zip((train, val), names, strict=True))

    def _mixture(self, cache: Cache, latents: str | None) -> Mixture:
        return Mixture(
            cache,
            latents,
            self.model.codec.scaling_factor,
            self.model.tokenizer,
            self.model.config.tokens,
            weights=self.recipe.data.mixture,
            seed=self.recipe.seed,
            row_tokens=self.recipe.data.row_tokens,
            per_image=self.model.config.tokens_per_image,
            row_images=self.recipe.data.row_images,
            words=self.recipe.loss.words > 0,
            class_balance=self.recipe.loss.class_balance,
            emphasis=self.recipe.loss.emphasis,
        )

    def batch(self, index: int) -> Batch:
        """Micro-batch ``index``."""
        return self.train.batch(index, self.recipe.loop.batch_size)

    def to_device(self, batch: Batch, device: Any) -> Batch:
        """The batch on ``device``."""
        return batch.to(device)

    def ids(self, batch: Batch) -> list[str]:
        """``task:story.frame`` of every document."""
        return batch.names

    def size(self, batch: Batch) -> int:
        """Pictures that the image decoder learns from."""
        assert batch.inputs.image_loss_mask is not None
        return int(batch.inputs.image_loss_mask.sum()) * self.recipe.loss.noise_repeats

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """Held-out L_NTP and L_NIP over about ``samples`` rows, with the same noise every time."""
        state, totals = torch.get_rng_state(), defaultdict[str, float](float)
        batches = max(1, samples // EVALUATION_BATCH)
        for index in range(batches):
            torch.manual_seed(index)
            batch = self.to_device(self.val.batch(index, EVALUATION_BATCH), self.model.device)
            _, parts = self.module(batch)
            for name, value in parts.items():
                totals[name] += float(value) / batches
        torch.set_rng_state(state)
        return dict(totals)

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Held-out stories: true frames above; below, the first frame given and the other four drawn."""
        from mmi_engine.generate.interleave import fill
        from mmi_engine.generate.settings import Settings
        from mmi_engine.sequence import Piece

        cache, items, rows = self.val.cache, [], []
        for story in range(PREVIEW_STORIES):
            texts, pieces = cache.texts(story)["texts"], []
            for frame, text in enumerate(texts):
                given = Image.fromarray(np.asarray(cache.picture(story, frame))) if frame == 0 else None
                pieces += [Piece("text", text), Piece("image", given)]
            items.append(pieces)
        filled = fill(self.model, items, list(range(PREVIEW_STORIES)), Settings(), PREVIEW_STORIES)
        for story, pieces in enumerate(filled):
            drawn = [np.asarray(piece.value.convert("RGB")) for piece in pieces if piece.kind == "image"]
            rows += [np.concatenate([cache.picture(story, f) for f in range(FRAMES)], 1), np.concatenate(drawn, 1)]
        Image.fromarray(np.concatenate(rows)).save(path)

    def export(self, directory: Path) -> None:
        """Model directory with the weights stored in fp16."""
        save_model(self.model, directory, dtype=torch.float16)
        (directory / "data.json").write_text(describe(self.train), encoding="utf-8")


def build_model(recipe: Recipe) -> MMInterleaved:
    """The model directory ``model.base`` to go on from, or for ``toon`` a fresh model of its shape around the codec of
    ``data.codec``; with ``model.partial`` ``toon`` is the model that ships. The other keys are those of
    :mod:`mmi_engine.train.foundation`.

    Raises:
        ConfigError, ModelError: ``model.base`` missing, keys that need weights to start from and find none, or as
            :func:`mmi_engine.train.foundation.load`.
    """
    if recipe.model.get("base") != "toon" or recipe.model.get("partial"):
        if not recipe.model.get("partial") and set(recipe.model) - {"base", "partial"}:
            remedy = "remove the other keys of [model], or set model.partial=true to begin what they change fresh"
            raise ConfigError("a trained model keeps its configuration", remedy=remedy)
        found = foundation.load(recipe, whole=True)
        found.model.config = found.config_to_keep()
        return found.model
    if "fresh" in recipe.model:
        remedy = "model.partial=true starts from the embedded model"
        raise ConfigError("model.fresh: every weight of a fresh model begins fresh", remedy=remedy)
    codec = load_codec(recipe.data.codec)
    model = MMInterleaved(foundation.changed(toon_config(codec.config, VOCABULARY), recipe))
    model.codec.load_state_dict(codec.state_dict())
    model.tokenizer = DirectoryTokenizer(TOON_TOKENIZER)
    return model


def codec_key(codec: ImageCodec) -> str:
    """Short hash of the encoder's weights: the name under which its latents are cached."""
    digest = hashlib.sha256()
    for name, value in sorted(codec.vae.state_dict().items()):
        if not name.startswith(("decoder", "post_quant")):
            digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:10]


def posterior_moments(codec: ImageCodec) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 pictures ``[n, H, W, 3]`` → float16 ``[n, 2C, h, w]``: posterior mean and standard deviation, unscaled."""

    @torch.no_grad()
    def encode(pictures: np.ndarray) -> np.ndarray:
        device = next(codec.parameters()).device
        posterior = codec.posterior(to_float(torch.from_numpy(np.array(pictures))).to(device))
        return torch.cat([posterior.mean, posterior.std], dim=1).cpu().numpy().astype(np.float16)

    return encode
