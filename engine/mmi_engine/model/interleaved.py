"""MM-Interleaved: the whole model, and its training forward pass.

    images ─ visual tokenizer ─┬─ visual tokens at the placeholders ─┐
                               └─ feature maps F1..F4 ───────────────┤
    ids ─ word embedding ────────────────────────────────────────────┴─ language model with MMFS
        ├─ text head → next-token loss
        └─ context of every image → image decoder with MMFS → diffusion loss

Source: paper section 3, Eq. 1 to 4; docs/model.md. Generation lives in ``mmi_engine.generate``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmi_engine.model.config import ModelConfig
from mmi_engine.model.image_decoder import DiffusionResult, Draws, ImageDecoder
from mmi_engine.model.language import LanguageModel, TextHead, VisualContext
from mmi_engine.model.resampler import QFormer
from mmi_engine.model.trunk import Trunk
from mmi_engine.model.vae import ImageCodec
from mmi_engine.model.vision import VisualOutput, VisualTokenizer
from mmi_engine.sequence import (
    NO_LOSS,
    InterleavedBatch,
    decoder_visibility,
    image_contexts,
    image_positions,
    language_visibility,
)


@dataclass
class Output:
    """Losses of one batch (scalars), logits ``[B, T, vocabulary]`` and what the visual tokenizer made of its images;
    ``loss_image`` is ``None`` without pictures."""

    loss: Tensor
    loss_text: Tensor
    loss_image: Tensor | None
    logits: Tensor
    visual: VisualOutput
    diffusion: DiffusionResult | None = None


@dataclass
class Parts:
    """Trained parts of other models to build a model around; their sizes are those of its configuration."""

    trunk: Trunk
    body: PreTrainedModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL


class MMInterleaved(nn.Module):
    """The assembled model. :func:`mmi_engine.model.checkpoint.load_model` sets ``tokenizer``, and ``placement``
    when its layers are spread over devices.

    Args:
        config: all sizes.
        parts: modules to be used instead of fresh ones; everything between them is new.
    """

    def __init__(self, config: ModelConfig, parts: Parts | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Any = None
        self.placement: Any = None
        self.graphs: Any = None  # recorded steps, `generate/graphs.py`; None: every step is computed as it comes
        channels = config.vision.hidden_size
        self.language = LanguageModel(config.language, config.tokens, channels, parts and parts.body)
        d_llm = self.language.d_model
        former = QFormer(config.visual_resampler)
        self.visual_tokenizer = VisualTokenizer(config.vision, former, d_llm, trunk=parts and parts.trunk)
        self.boi_embedding = nn.Parameter(torch.zeros(1, d_llm))
        self.text_head = TextHead(d_llm, config.tokens)
        self.image_decoder = ImageDecoder(
            config.image_decoder, d_llm, channels, parts and parts.unet, parts and parts.vae
        )
        self.channels_last()

    def channels_last(self) -> MMInterleaved:
        """Lay the U-Net's weights out channels-last: on a CPU it runs nearly twice as fast."""
        self.image_decoder.unet.to(memory_format=torch.channels_last)
        return self

    @property
    def codec(self) -> ImageCodec:
        """Pixels ↔ latents."""
        return self.image_decoder.codec

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.boi_embedding.device

    def set_backend(self, name: str) -> None:
        """Choose the deformable-sampling kernel (``auto``, ``torch``, ``numba`` …) of every layer."""
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = name

    def embed(self, ids: Tensor, visual_tokens: Tensor) -> Tensor:
        """Input embeddings ``[B, T, d]``: words, the learnt addition on ``<BoI>``, visual tokens ``[ΣN, K, d]``."""
        tokens = self.config.tokens
        embeds = self.language.embed(ids)
        embeds = embeds + (ids == tokens.boi)[..., None] * self.boi_embedding.to(embeds.dtype)
        placeholders = ids == tokens.image
        return embeds.masked_scatter(placeholders[..., None], visual_tokens.to(embeds.dtype))

    def visual_context(self, ids: Tensor, features: tuple[Tensor, ...], counts: Tensor) -> VisualContext | None:
        """What the language model's MMFS sees of the images ``features`` (maps ``[ΣN, C, h, w]``)."""
        images = int(counts.max()) if len(counts) else 0
        visible = language_visibility(ids, self.config.tokens, images)
        return self.language.visual_context([per_row(m, counts) for m in features], visible)

    def forward(self, batch: InterleavedBatch, *, draws: Draws | None = None, noise_repeats: int = 1) -> Output:
        """Losses of a batch; see :class:`mmi_engine.sequence.InterleavedBatch` for its shapes."""
        assert batch.target_ids is not None
        visual = self.visual_tokenizer(batch.images)
        hidden = self.hidden_states(batch, visual)
        logits = self.text_head(hidden)
        targets = batch.target_ids[:, 1:]
        loss_text = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=NO_LOSS)
        if not bool((targets != NO_LOSS).any()):
            loss_text = logits.sum() * 0.0  # the mean over nothing would be NaN
        loss = self.config.loss_text_weight * loss_text
        if batch.latents is None and batch.images_dec is None and batch.moments is None:
            return Output(loss, loss_text, None, logits, visual)
        diffusion = self.image_loss(batch, hidden, visual, draws or Draws(), noise_repeats)
        loss = loss + self.config.loss_image_weight * diffusion.loss
        return Output(loss, loss_text, diffusion.loss, logits, visual, diffusion)

    def hidden_states(self, batch: InterleavedBatch, visual: VisualOutput) -> Tensor:
        """Hidden states ``[B, T, d]`` of a right-padded batch."""
        embeds = self.embed(batch.text_ids, visual.tokens)
        context = self.visual_context(batch.text_ids, visual.features, batch.image_counts)
        return self.language(embeds, batch.attention_mask, context)

    def image_loss(
        self, batch: InterleavedBatch, hidden: Tensor, visual: VisualOutput, draws: Draws, noise_repeats: int
    ) -> DiffusionResult:
        """Diffusion loss of every image of the batch given its context."""
        tokens = self.config.tokens
        rows, columns, mask = image_contexts(batch.text_ids, tokens)
        condition = self.image_decoder.context_tokens(hidden[rows[:, None], columns], mask)
        counted = (mask.sum(1) > 2).to(condition.dtype)  # only <s><BoI> before it: no context, no loss
        if batch.image_loss_mask is not None:
            counted = counted * batch.image_loss_mask
        visible = decoder_visibility(batch.text_ids, tokens, self.config.image_decoder.context_images)
        features = [previous_images(m, visible.shape[1]) for m in visual.features]
        latents, pictures, moments = batch.latents, batch.images_dec, batch.moments
        divisor = counted.sum().clamp(min=1) if self.config.image_loss_mean == "counted" else float(len(counted))
        if draws.uncond_uniform is None:  # an image without weight need not be drawn; given draws fix the row count
            kept = counted.nonzero().squeeze(1)
            if len(kept) == 0:
                return DiffusionResult(condition.sum() * 0.0, condition.new_zeros(0), *[condition.new_zeros(0)] * 3)
            condition, visible, counted = condition[kept], visible[kept], counted[kept]
            features = [m[kept] for m in features]
            latents = None if latents is None else latents[kept]
            pictures = None if pictures is None else pictures[kept]
            moments = None if moments is None else moments[kept]
        return self.image_decoder.diffusion_loss(
            condition,
            features,
            visible,
            latents=latents,
            images=pictures,
            moments=moments,
            weights=counted / divisor,
            draws=draws,
            noise_repeats=noise_repeats,
        )

    def image_sites(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of every image's ``<BoI>``."""
        return image_positions(ids, self.config.tokens)


def per_row(maps: Tensor, counts: Tensor) -> Tensor:
    """``[ΣN, C, h, w]`` → ``[B, M, C, h, w]`` with M the largest count, zeros where a row has fewer images."""
    images = int(counts.max()) if len(counts) else 0
    order = torch.arange(images, device=maps.device)
    present = order[None] < counts[:, None]
    index = (counts.cumsum(0) - counts)[:, None] + order[None]
    if bool(present.all()):
        return maps[index]
    return maps[index.clamp(max=max(len(maps) - 1, 0))] * present[..., None, None, None].to(maps.dtype)


def previous_images(maps: Tensor, count: int) -> Tensor:
    """``[ΣN, C, h, w]`` → ``[ΣN, count, C, h, w]``: the ``count`` images before each, last column the nearest."""
    index = torch.arange(len(maps), device=maps.device)[:, None] - torch.arange(count, 0, -1, device=maps.device)[None]
    return maps[index.clamp(min=0)]
