"""The image decoder: the context of an image → 77 tokens → diffusion U-Net with MMFS → latent → picture.

Place in the flow: behind the language model. Hidden states from the document's ``<s>`` to the image's ``<BoI>``,
nearest first, are projected, get 1-D positions and are resampled to the U-Net's text condition; the U-Net's MMFS looks
at the image before. Source: paper section 3.2 and Eq. 3; docs/model.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from mmi_engine.model.config import ImageDecoderConfig
from mmi_engine.model.positions import sincos_1d
from mmi_engine.model.resampler import QFormer
from mmi_engine.model.unet import MMFSUNet
from mmi_engine.model.vae import ImageCodec


@dataclass
class Draws:
    """Random numbers of one training step; drawn in this order when not given.

    uncond_uniform ``[N, 1, 1]`` in [0, 1) · vae_noise ``[N, C, h, w]`` · diffusion_noise ``[R·N, C, h, w]`` ·
    timesteps ``[R·N]`` long, with R noise levels per image.
    """

    uncond_uniform: Tensor | None = None
    vae_noise: Tensor | None = None
    diffusion_noise: Tensor | None = None
    timesteps: Tensor | None = None


@dataclass
class DiffusionResult:
    """The image loss and what it was made of; ``per_image`` ``[R·N]`` before masking."""

    loss: Tensor
    per_image: Tensor
    prediction: Tensor
    noisy: Tensor
    latents: Tensor


class ImageDecoder(nn.Module):
    """Context resampler, learnt unconditional embedding, U-Net with MMFS, VAE and noise schedule."""

    def __init__(
        self,
        config: ImageDecoderConfig,
        d_llm: int,
        d_value: int,
        unet: UNet2DConditionModel | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.d_context = config.context_resampler.encoder_hidden_size
        self.context_proj = nn.Linear(d_llm, self.d_context)
        self.context_resampler = QFormer(config.context_resampler)
        shape = (1, config.context_resampler.num_queries, config.context_resampler.hidden_size)
        self.unconditional = nn.Parameter(torch.randn(shape) * 0.02)
        self.unet = MMFSUNet(unet or UNet2DConditionModel(**config.unet), config.mmfs, d_value, config.maps)
        self.codec = ImageCodec(config.vae, vae)
        self.scheduler = DDPMScheduler(**config.scheduler)

    def context_tokens(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Text condition of the U-Net.

        Args:
            hidden: ``[N, K, d_llm]`` hidden states, nearest first.
            mask: ``[N, K]``, 0 on padding.

        Returns:
            ``[N, 77, C]``.
        """
        return resampled_context(self.context_proj, self.context_resampler, hidden, mask)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor,
        features: list[Tensor],
        visible: Tensor,
        latents: Tensor,
        noise_repeats: int = 1,
        seeing: int | None = None,
        draw: bool = True,
        timestep_shift: float = 1.0,
        cells: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean loss of N pictures given their contexts, and the :meth:`context_tokens` it was made with.

        Args:
            draw: without it the :meth:`diffusion_loss` is left out and counts as 0.
            timestep_shift: above 1 more of the time steps are noisy ones, see :func:`shifted_timesteps`.
            hidden, mask, features, visible, latents, noise_repeats, seeing, cells: see there.
        """
        tokens = self.context_tokens(hidden, mask)
        if not draw:
            return tokens.new_zeros(()), tokens
        weights = torch.full((len(latents),), 1 / len(latents), device=latents.device)
        steps = None
        if timestep_shift != 1:
            count = self.scheduler.config.num_train_timesteps
            steps = shifted_timesteps(len(latents) * noise_repeats, count, timestep_shift, latents.device)
        loss = self.diffusion_loss(
            tokens,
            features,
            visible,
            latents=latents,
            images=None,
            weights=weights,
            draws=Draws(timesteps=steps),
            noise_repeats=noise_repeats,
            seeing=seeing,
            cells=cells,
        ).loss
        return loss, tokens

    def diffusion_loss(
        self,
        tokens: Tensor,
        features: list[Tensor],
        visible: Tensor,
        *,
        latents: Tensor | None,
        images: Tensor | None,
        weights: Tensor,
        draws: Draws,
        moments: Tensor | None = None,
        noise_repeats: int = 1,
        seeing: int | None = None,
        cells: Tensor | None = None,
    ) -> DiffusionResult:
        """Mean squared error on noise or velocity, Eq. 3.

        Args:
            tokens: ``[N, 77, C]`` of :meth:`context_tokens`.
            features: feature maps ``[N, M, C, h_l, w_l]`` of the context images.
            visible: ``[N, M]``.
            latents: ``[N, C, h, w]`` scaled; or ``None`` and
            images: ``[N, 3, H, W]`` in [0, 1], encoded without gradient; unless there are
            moments: ``[N, 2C, h, w]``, the posterior's mean and standard deviation, computed before.
            weights: ``[N]`` multiplies every image's loss; the loss is their weighted sum.
            draws: random numbers; missing ones are drawn.
            noise_repeats: noise levels per image; context and features are computed once for all of them.
            seeing: see :meth:`MMFSUNet.look`.
            cells: ``[N, h, w]`` what every cell of an image's latent counts; all alike by default.
        """
        batch = len(tokens)
        uniform = draws.uncond_uniform if draws.uncond_uniform is not None else torch.rand_like(tokens[:, :1, :1])
        dropped = uniform < self.config.unconditional_probability
        tokens = torch.where(dropped, self.unconditional.to(tokens.dtype), tokens)
        if latents is None and moments is not None:
            latents = self.codec.sample(*moments.chunk(2, 1), draws.vae_noise)
        elif latents is None:
            assert images is not None
            with torch.no_grad():
                latents = self.codec.encode(images, draws.vae_noise)
        vision = self.unet.look(features, visible, seeing)
        if noise_repeats > 1:
            latents, tokens = latents.repeat(noise_repeats, 1, 1, 1), tokens.repeat(noise_repeats, 1, 1)
            vision = None if vision is None else vision.repeat(noise_repeats, batch)
            weights = weights.repeat(noise_repeats) / noise_repeats
            cells = None if cells is None else cells.repeat(noise_repeats, 1, 1)
        noise = draws.diffusion_noise if draws.diffusion_noise is not None else torch.randn_like(latents)
        steps = draws.timesteps
        if steps is None:
            steps = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        prediction = self.unet(noisy.to(tokens.dtype), steps, tokens, vision)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, steps) if velocity else noise
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none")
        per_image = (errors if cells is None else errors * cells[:, None]).mean(dim=(1, 2, 3))
        loss = (per_image * self._snr_weight(steps) * weights).sum()
        return DiffusionResult(loss, per_image.detach(), prediction, noisy, latents)

    def _snr_weight(self, steps: Tensor) -> Tensor | float:
        """Min-SNR-γ weight per time step (Hang et al. 2023), 1 when the option is off.

        It vanishes with the SNR. A schedule with zero terminal SNR starts to draw exactly there, where layout and
        colours are decided, so such a model should leave the option off.
        """
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return 1.0
        alphas = self.scheduler.alphas_cumprod.to(steps.device)[steps]
        snr = alphas / (1 - alphas)
        divisor = snr + 1 if self.scheduler.config.prediction_type == "v_prediction" else snr
        return snr.clamp(max=gamma) / divisor


def resampled_context(projection: nn.Linear, resampler: QFormer, hidden: Tensor, mask: Tensor) -> Tensor:
    """See :meth:`ImageDecoder.context_tokens`."""
    positions = sincos_1d(torch.arange(hidden.shape[1], device=hidden.device), projection.out_features)
    return resampler(projection(hidden) + positions.to(hidden.dtype), mask)


def shifted_timesteps(number: int, steps: int, shift: float, device: torch.device) -> Tensor:
    """Random time steps ``[number]`` in 0 … steps − 1, u → shift·u / (1 + (shift − 1)·u) of a uniform u.

    With ``shift`` above 1 training spends more on noisy steps, where layout, pose and colours are decided; Esser et
    al. 2024, Eq. 23.
    """
    uniform = torch.rand(number, device=device)
    return (shift * uniform / (1 + (shift - 1) * uniform) * steps).long().clamp(max=steps - 1)
