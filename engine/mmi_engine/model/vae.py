"""Pixels ↔ latents: the image decoder's VAE, between the U-Net and the picture.

A diffusers ``AutoencoderKL`` used as it is. The embedded model puts a pixel-unshuffle of 2 in front of it (and its
inverse behind), which moves the costly full-resolution convolutions to a quarter of the positions; the released model
has patch 1, i.e. no rearrangement. Source: docs/model.md; latent diffusion (Rombach et al. 2022).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from mmi_engine.model.config import VAEConfig


class ImageCodec(nn.Module):
    """Images in [0, 1] to scaled latents and back.

    Shapes: images ``[N, 3, H, W]`` with H and W multiples of ``config.downsampling``; latents
    ``[N, latent_channels, H / downsampling, W / downsampling]``, multiplied by the VAE's scaling factor.
    """

    def __init__(self, config: VAEConfig, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        self.config = config
        self.vae = vae or AutoencoderKL(**config.diffusers)

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by so that they have about unit variance."""
        return float(self.vae.config.scaling_factor)

    def posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        """Posterior over unscaled latents of ``images`` ``[N, 3, H, W]`` in [0, 1]."""
        pixels = F.pixel_unshuffle(images * 2 - 1, self.config.patch)
        return self.vae.encode(pixels).latent_dist

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents: a posterior sample (standard normal ``noise`` of the latent's shape, drawn when ``None``)."""
        posterior = self.posterior(images)
        return self.sample(posterior.mean, posterior.std, noise)

    def sample(self, mean: Tensor, deviation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents from a posterior's unscaled mean and standard deviation ``[N, C, h, w]``."""
        mean, deviation = mean.contiguous(), deviation.contiguous()  # random numbers fill a tensor in memory's order
        if noise is None:
            noise = torch.randn_like(mean)
        return (mean + deviation * noise) * self.scaling_factor

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Decoder output for unscaled latents, in [-1, 1] up to overshoot (not clamped, for losses)."""
        return F.pixel_shuffle(self.vae.decode(latents).sample, self.config.patch)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1] from scaled latents."""
        return (self.reconstruct(latents / self.scaling_factor) / 2 + 0.5).clamp(0, 1)
