"""Picture generation: 77 context tokens and the image before → denoised latent → picture.

Place in the flow: ``interleave`` (or a parity check) has run the language model; here the U-Net denoises the pictures
of several items at once. Both halves of classifier-free guidance see the same image features, only the tokens differ.
Every item has one random generator: it gives the initial latent and then every step's noise, so an item's picture does
not depend on its neighbours. Source: docs/model.md; schedulers are diffusers'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from mmi_engine.generate.graphs import fixed_unet
from mmi_engine.generate.reuse import Reuse, unet_anew
from mmi_engine.generate.settings import Settings
from mmi_engine.generate.shares import Predict, predicting
from mmi_engine.model.config import GenerationDefaults
from mmi_engine.model.interleaved import MMInterleaved

_SCHEDULERS: dict[str, Any] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


@dataclass
class ImageRequest:
    """Pictures to draw.

    tokens: context tokens ``[N, 77, C]``; features: maps of the context images ``[N, M, C, h_l, w_l]``;
    visible: ``[N, M]``; generators: one per picture.
    """

    tokens: Tensor
    features: list[Tensor]
    visible: Tensor
    generators: list[torch.Generator]

    def split(self, count: int) -> Iterator[ImageRequest]:
        """The same in parts of ``count`` pictures, the last one filled up from the front."""
        total = len(self.tokens)
        for start in range(0, total, count):
            rows = [row % total for row in range(start, start + count)]
            features = [maps[rows] for maps in self.features]
            yield ImageRequest(self.tokens[rows], features, self.visible[rows], [self.generators[row] for row in rows])


@dataclass(frozen=True)
class Denoising:
    """Steps, guidance and scheduler after the model's defaults have filled in what the user left open."""

    steps: int
    guidance: float
    scheduler: str

    @classmethod
    def choose(cls, settings: Settings, defaults: GenerationDefaults) -> Denoising:
        """User's choice before the model's."""
        return cls(
            settings.steps if settings.steps is not None else defaults.steps,
            settings.guidance if settings.guidance is not None else defaults.guidance,
            settings.scheduler if settings.scheduler is not None else defaults.scheduler,
        )


Observer = Callable[[str, Tensor], None]
"""Told of intermediate tensors by name; parity checks listen."""


@torch.no_grad()
def denoise(
    model: MMInterleaved,
    request: ImageRequest,
    plan: Denoising,
    observe: Observer = lambda name, value: None,
    reuse: Reuse | None = None,
) -> Tensor:
    """Scaled latents ``[N, C, h, w]`` of the requested pictures; ``reuse``: what is computed once, default all."""
    decoder = model.image_decoder
    dtype = request.tokens.dtype
    scheduler = make_scheduler(model, plan.scheduler)
    scheduler.set_timesteps(plan.steps)
    size, channels = decoder.config.vae.latent_size, decoder.config.vae.latent_channels
    latents = torch.cat([_normal((1, channels, size, size), g) for g in request.generators]).to(model.device, dtype)
    latents = latents * scheduler.init_noise_sigma
    observe("init_latents", latents)
    # diffusers takes a list of generators, one per row, wherever a step draws noise.
    noise = {"generator": request.generators} if plan.scheduler == "ddpm" else {}
    guided = plan.guidance != 1.0
    with _predicting(model, request, scheduler, latents, guided, reuse is None or reuse.values) as predict:
        for index, step in enumerate(scheduler.timesteps):
            predicted = predict(scheduler.scale_model_input(latents, step), step)
            if guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + plan.guidance * (conditional - unconditional)
            if index == 0:
                observe("first_eps_after_guidance", predicted)
            latents = scheduler.step(predicted, step, latents, **noise).prev_sample
            if index == 0:
                observe("latents_after_step0", latents)
    observe("final_latents", latents)
    return latents


@contextmanager
def _predicting(
    model: MMInterleaved, request: ImageRequest, scheduler: Any, latents: Tensor, guided: bool, once: bool
) -> Iterator[Predict]:
    """Predictions for both halves of guidance; without ``once`` as the released engine computes them."""
    decoder, tokens, steps = model.image_decoder, request.tokens, scheduler.timesteps
    unet, batch = decoder.unet, len(tokens)
    halves = [decoder.unconditional.to(tokens.dtype).expand_as(tokens), tokens] if guided else [tokens]
    if not once:
        whole, vision = torch.cat(halves), unet_anew(unet, request.features, request.visible, len(halves))
        yield lambda inputs, step: unet(torch.cat([inputs] * len(halves)), step, whole, vision)
        return
    seen = unet.look(request.features, request.visible)
    if model.graphs is None or model.graphs.compiled:
        with predicting(unet, latents, halves, seen, len(steps)) as predict:
            yield predict
        return
    seen = seen.repeat(2, batch) if guided and seen is not None else seen
    seen = seen if seen is None or unet.indexes(tokens.dtype) else seen.side_by_side()
    yield fixed_unet(model, model.graphs, latents, steps[0], torch.cat(halves), seen)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


def make_scheduler(model: MMInterleaved, name: str) -> Any:
    """A fresh diffusers scheduler (it keeps state between steps) with the model's own noise schedule."""
    return _SCHEDULERS[name].from_config(dict(model.image_decoder.scheduler.config))


def to_images(model: MMInterleaved, latents: Tensor) -> Tensor:
    """Pictures ``[N, 3, H, W]`` in [0, 1]."""
    return model.codec.decode(latents.to(next(model.codec.parameters()).dtype)).float()
