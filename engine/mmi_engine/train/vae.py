"""Task ``vae``: train the image codec alone, as in latent diffusion, before anything else is trained.

Pictures (or random crops of them) → codec → L1 + MSE + edges + a very small KL towards the standard normal. The edge
term is an L1 on differences of neighbouring pixels: flat drawings carry their meaning (digits, mouths) in edges, which
pixel losses alone blur. Exported with ``scaling_factor`` = 1 / standard deviation of the latents of held-out pictures.
Source: Rombach et al. 2022, section 3.1 and appendix G; no adversarial loss, drawings have no texture to invent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmi_engine.errors import ConfigError, ModelError
from mmi_engine.model.checkpoint import load_model, save_model
from mmi_engine.model.config import VAEConfig
from mmi_engine.model.vae import ImageCodec
from mmi_engine.train.cache import FRAMES, Cache
from mmi_engine.train.recipe import Recipe
from mmi_engine.train.sections import LossConfig

PREVIEW = 6


class CodecObjective(nn.Module):
    """``forward(pictures [N, 3, H, W] in [0, 1]) -> (loss, parts)``."""

    def __init__(self, codec: ImageCodec, weights: LossConfig) -> None:
        super().__init__()
        self.codec, self.weights = codec, weights

    def forward(self, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction losses are means over pixels in [-1, 1]; KL is the mean over latent elements."""
        posterior = self.codec.posterior(pictures)
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        if self.weights.latent_noise:
            level = self.weights.latent_noise * torch.rand_like(latents[:, :1, :1, :1])  # of every picture its own
            latents = latents + level * posterior.mean.detach().std() * torch.randn_like(latents)
        rebuilt, target = self.codec.reconstruct(latents).float(), pictures * 2 - 1
        parts = {
            "l1": F.l1_loss(rebuilt, target),
            "mse": F.mse_loss(rebuilt, target),
            "edge": edge_loss(rebuilt, target),
            "kl": 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean(),
        }
        loss = sum(getattr(self.weights, name) * value for name, value in parts.items())
        return loss, {name: value.detach() for name, value in parts.items()}


@torch.no_grad()
def start_linear(codec: ImageCodec, pictures: Tensor, constant: float = 100.0) -> None:
    """Start a single-level codec as the best linear one (principal components of its patches), free to leave it.

    From random weights, hundreds of steps pass before such a network shows as much as the colour of a patch. Here the
    first step already has what linear coding can give:

    - encoder input: the principal components ``p`` and ``-p`` of a patch; output: ``silu(p) - silu(-p) = p`` exactly;
      decoder likewise, back through the transposed components. Components are divided by the square root of their
      spread, so that latents are of similar size, the coarse ones first.
    - residual branches end in a zero convolution, so that they start as nothing.
    - group normalisation (one group) would wipe out contrast: two channels are held at ±``constant``, where they alone
      decide mean and variance, and every norm's weight is set so that the norm leaves the others as they are.
      Gradients of those two channels are masked.

    Args:
        codec: ``block_out_channels`` of one level, ``norm_num_groups`` 1.
        pictures: ``[N, 3, H, W]`` in [0, 1] to take the components from.
    """
    vae, count = codec.vae, codec.config.latent_channels
    width, held = vae.encoder.conv_in.out_channels, _held(codec)
    half = width // 2
    mean, basis, scale = principal_components(pictures, codec.config.patch)
    for part in (vae.encoder, vae.decoder):
        _quieten(part, held, constant * math.sqrt(2 / width))
    kept = min(half - 1, len(basis))
    forward = torch.cat([basis[:kept] / scale[:kept], -basis[:kept] / scale[:kept]])
    _set_centre(vae.encoder.conv_in, forward, _pairs(kept, half), -forward @ mean)
    _set_centre(vae.decoder.conv_in, torch.cat([torch.eye(count), -torch.eye(count)]), _pairs(count, half))
    for layer in (vae.encoder.conv_in, vae.decoder.conv_in):
        layer.weight[list(held)] = 0
        layer.bias[list(held)] = torch.tensor([constant, -constant])
    difference = torch.zeros(count, width)
    difference[range(count), range(count)], difference[range(count), range(half, half + count)] = 1.0, -1.0
    for part in (vae.encoder, vae.decoder):
        part.conv_out.weight.zero_()
    _set_centre(vae.encoder.conv_out, difference, list(range(count)))
    _set_centre(vae.decoder.conv_out, (basis * scale)[:count].T @ difference, list(range(len(mean))), mean)
    for layer, size in ((vae.quant_conv, 2 * count), (vae.post_quant_conv, count)):
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[range(count), range(count)] = 1.0
        layer.bias[count:size] = -8.0  # the posterior starts almost without noise
    hold_contrast(codec)


def hold_contrast(codec: ImageCodec) -> None:
    """Mask the gradients of the two held channels of a codec that :func:`start_linear` began, wherever they occur."""
    for part in (codec.vae.encoder, codec.vae.decoder):
        for name, layer in part.named_modules():
            if name == "conv_in" or name.endswith(("conv2", "norm1", "conv_norm_out")):
                _mask_gradients(layer, _held(codec))


def _held(codec: ImageCodec) -> tuple[int, int]:
    width = codec.vae.encoder.conv_in.out_channels
    return width - 2, width - 1


def principal_components(pictures: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[D]``, components ``[D, D]`` (rows, largest first) and √spread ``[D, 1]`` of ``patch`` × ``patch`` pieces.

    D = 3·patch², in the order of pixel-unshuffle, of pictures ``[N, 3, H, W]`` brought to [-1, 1].
    """
    vectors = F.pixel_unshuffle(pictures * 2 - 1, patch).permute(0, 2, 3, 1).flatten(0, 2)
    mean = vectors.mean(0)
    _, spread, basis = torch.linalg.svd(vectors - mean, full_matrices=False)
    return mean, basis, (spread / math.sqrt(len(vectors))).sqrt()[:, None] + 0.1


def _quieten(part: nn.Module, held: tuple[int, ...], norm_weight: float) -> None:
    """Residual branches to zero, norms to the identity on all channels but the ``held`` ones."""
    for name, layer in part.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif name.endswith(("norm1", "conv_norm_out")):
            layer.weight.fill_(norm_weight)
            layer.weight[list(held)] = 0


def _pairs(count: int, half: int) -> list[int]:
    return [*range(count), *range(half, half + count)]


def _set_centre(layer: nn.Conv2d, matrix: Tensor, rows: list[int], bias: Tensor | None = None) -> None:
    """Let output channels ``rows`` of a 3 × 3 convolution be ``matrix`` times the input at the same place."""
    layer.weight[rows] = 0
    layer.weight[rows, : matrix.shape[1], 1, 1] = matrix
    layer.bias[rows] = 0 if bias is None else bias


def _mask_gradients(layer: nn.Module, channels: tuple[int, ...]) -> None:
    """Keep output ``channels`` of a layer as they are."""
    for parameter in layer.parameters(recurse=False):
        mask = torch.ones(len(parameter), *[1] * (parameter.ndim - 1))
        mask[list(channels)] = 0
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))


def edge_loss(rebuilt: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the horizontal and vertical finite differences of two images ``[N, C, H, W]``."""
    error = rebuilt - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def psnr(rebuilt: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], over all pixels of all images together."""
    return -10 * math.log10(max(1e-12, float(F.mse_loss(rebuilt.float(), target.float()))))


class CodecTask:
    """The task the loop runs; ``train`` and ``val`` are caches of drawn pictures.

    The recipe's ``model`` is a fresh codec's configuration, or only ``base``: a model whose codec is trained further,
    all the rest of it (scaling factor included) left alone and exported with it.
    """

    def __init__(self, recipe: Recipe, train: Cache, val: Cache) -> None:
        self.recipe, self.train, self.val = recipe, train, val
        self.whole = load_model(recipe.model["base"]) if set(recipe.model) == {"base"} else None
        codec = self.whole.codec.train() if self.whole else ImageCodec(codec_config(recipe.model))
        codec.to(memory_format=torch.channels_last)
        single_level = len(codec.vae.config.block_out_channels) == 1
        if single_level and self.whole:
            hold_contrast(codec)
        elif single_level:
            start_linear(codec, to_float(torch.from_numpy(np.stack([train.picture(i, 0) for i in range(100)]))))
        self.module: nn.Module = CodecObjective(codec, recipe.loss)
        self.codec = codec
        side = recipe.data.crop
        if side % codec.config.downsampling:
            raise ConfigError(
                f"data.crop must be a multiple of {codec.config.downsampling}", remedy="correct the recipe"
            )

    def batch(self, index: int) -> Tensor:
        """Micro-batch ``index``: uint8 ``[N, side, side, 3]``, pictures drawn with replacement, cropped at random."""
        rng = np.random.default_rng((self.recipe.seed, index))
        side, rows = self.recipe.data.crop, []
        for number in rng.integers(self.train.stories * FRAMES, size=self.recipe.loop.batch_size):
            picture = self.train.picture(*divmod(int(number), FRAMES))
            if side:
                top, left = (int(rng.integers(limit - side + 1)) for limit in picture.shape[:2])
                picture = picture[top : top + side, left : left + side]
            rows.append(picture)
        return torch.from_numpy(np.stack(rows))

    def to_device(self, batch: Tensor, device: Any) -> Tensor:
        """float ``[N, 3, H, W]`` in [0, 1]."""
        return to_float(batch).to(device)

    def ids(self, batch: Tensor) -> list[str]:
        """Hashes of the pictures: crops have no name, but the same batch gives the same hashes."""
        return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in batch]

    def size(self, batch: Tensor) -> int:
        """Pictures in the batch."""
        return len(batch)

    def _held_out(self, count: int) -> Tensor:
        frames = [self.val.picture(*divmod(i, FRAMES)) for i in range(min(count, self.val.stories * FRAMES))]
        device = next(self.codec.parameters()).device
        return to_float(torch.from_numpy(np.stack(frames))).to(device)

    @torch.no_grad()
    def evaluate(self, samples: int) -> dict[str, float]:
        """PSNR in dB of reconstructions of held-out pictures from the posterior mean, and the latents' spread."""
        pictures = self._held_out(samples)
        means = torch.cat([self.codec.posterior(part).mean for part in pictures.split(16)])
        rebuilt = torch.cat([self.codec.reconstruct(part) for part in means.split(16)])
        rebuilt = (rebuilt / 2 + 0.5).clamp(0, 1)
        return {"psnr": psnr(rebuilt, pictures), "latent_std": float(means.std())}

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Originals above, reconstructions below."""
        pictures = self._held_out(PREVIEW)
        rebuilt = self.codec.reconstruct(self.codec.posterior(pictures).mean) / 2 + 0.5
        rows = [torch.cat(list(images.clamp(0, 1)), dim=2) for images in (pictures, rebuilt)]
        grid = (torch.cat(rows, dim=1).permute(1, 2, 0).cpu() * 255).round().to(torch.uint8)
        Image.fromarray(grid.numpy()).save(path)

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        """Codec directory (``codec.json``, ``codec.safetensors``, the measured scaling factor), or the whole model."""
        if self.whole:
            save_model(self.whole, directory, dtype=torch.float16)
            return
        spread = self.evaluate(self.recipe.loop.eval_samples)["latent_std"]
        config = dataclasses.replace(
            self.codec.config, diffusers={**self.codec.config.diffusers, "scaling_factor": round(1 / spread, 5)}
        )
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous().clone() for name, value in self.codec.state_dict().items()}
        save_file(weights, directory / "codec.safetensors")
        (directory / "codec.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")


def to_float(pictures: Tensor) -> Tensor:
    """uint8 ``[N, H, W, 3]`` → float ``[N, 3, H, W]`` in [0, 1], channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float() / 255


def codec_config(table: dict[str, Any]) -> VAEConfig:
    """The recipe's ``[model]`` table as the codec's configuration.

    Raises:
        ConfigError: a key that ``VAEConfig`` does not have.
    """
    known = {f.name for f in dataclasses.fields(VAEConfig)}
    for key in table:
        if key not in known:
            raise ConfigError(f"model: unknown key {key!r}", remedy=f"known keys: {', '.join(sorted(known))}")
    return VAEConfig(**table)


def load_codec(name: str | Path) -> ImageCodec:
    """A codec that :meth:`CodecTask.export` wrote, or that of the model ``name`` (``toon`` or a directory).

    Raises:
        ModelError: no codec there.
    """
    directory = Path(name)
    if str(name) == "toon" or (directory / "config.json").is_file():
        return load_model(name).codec
    if not (directory / "codec.json").is_file():
        raise ModelError(f"no codec in {directory}", remedy="train one with `mmi train --recipe toon_vae`")
    codec = ImageCodec(VAEConfig(**json.loads((directory / "codec.json").read_text(encoding="utf-8"))))
    codec.load_state_dict(load_file(directory / "codec.safetensors"))
    return codec.eval()
