"""ViT-Adapter: a convolutional branch around a plain ViT that turns one patch grid into a feature pyramid.

Place in the flow: ``vision`` feeds the normalised image to :class:`SpatialPrior` (strides 4, 8, 16, 32) and walks the
trunk in groups of layers; before each group an :class:`Injector` lets the patch tokens read the pyramid, after it an
:class:`Extractor` lets the pyramid read the patch tokens, both by ordinary deformable attention.
Source: Chen et al. 2023, "Vision Transformer Adapter for Dense Predictions", sections 3.2 to 3.4; Zhu et al. 2021,
"Deformable DETR", Eq. 2; docs/model.md.

Shapes: token lists ``[N, positions, C]``; "shapes" are the (height, width) of the maps inside a list, finest first.
Maps ``[N, C, h, w]`` are kept in channels-last memory, so that a map and its token list are two views of one buffer
and a norm over channels runs along memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_engine.model.trunk import Trunk
from mmi_kernels import deform_attention

Shape = tuple[int, int]

PRIOR_NORM_EPS = 1e-6
ADAPTER_NORM_EPS = 1e-5


def to_tokens(feature_map: Tensor) -> Tensor:
    """Map ``[N, C, h, w]`` → tokens ``[N, h * w, C]``, row-major; no copy for channels-last memory."""
    return feature_map.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, shape: Shape) -> Tensor:
    """Tokens ``[N, h * w, C]`` → map ``[N, C, h, w]`` in channels-last memory, without a copy."""
    return tokens.unflatten(1, shape).permute(0, 3, 1, 2)


def cell_centres(shapes: Sequence[Shape], device: torch.device | None = None) -> Tensor:
    """Reference points: centres of all cells of all maps, ``[Σ h·w, 2]`` as (x, y) in (0, 1), float32."""
    points = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        points.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1))
    return torch.cat(points)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map ``[N, C, h, w]``, computed in float32 whatever the dtype of the map."""

    def forward(self, feature_map: Tensor) -> Tensor:
        cells = feature_map.permute(0, 2, 3, 1)
        normed = F.layer_norm(cells.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(feature_map.dtype).permute(0, 3, 1, 2)


class DeformableAttention(nn.Module):
    """Every query samples a few points per map and sums them with softmax weights over levels × points.

    Args:
        channels: width of queries and of the features read.
        heads, levels, points: sampling points per query: heads × levels × points.
        value_ratio: inner width of the values as a share of ``channels``.

    Raises:
        ValueError: the inner width is not a multiple of ``heads``.
    """

    def __init__(self, channels: int, heads: int, levels: int, points: int, value_ratio: float) -> None:
        super().__init__()
        width = int(channels * value_ratio)
        if width % heads:
            raise ValueError(f"deformable attention: value width {width} is not a multiple of {heads} heads")
        self.heads, self.levels, self.points = heads, levels, points
        self.backend = "auto"
        self.offsets = nn.Linear(channels, heads * levels * points * 2)
        self.weights = nn.Linear(channels, heads * levels * points)
        self.value = nn.Linear(channels, width)
        self.output = nn.Linear(width, channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Points start on one ray per head, point p at p + 1 cells in the largest coordinate; weights start equal."""
        nn.init.zeros_(self.offsets.weight)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        rays = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (H, 2)
        rays = rays / rays.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        bias = rays[:, None, None] * steps[:, None]  # (H, 1, P, 2)
        self.offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, reference: Tensor, features: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """Sample ``features`` around the reference point of each query.

        Args:
            query: ``[N, Q, C]``.
            reference: ``[Q, 2]`` as (x, y) in [0, 1].
            features: ``[N, Σ h·w, C]``, the maps of ``shapes`` one after the other.
            shapes: (height, width) of the ``levels`` maps.

        Returns:
            ``[N, Q, C]``.
        """
        value = self.value(features).unflatten(-1, (self.heads, -1))  # (N, S, H, D)
        sampled = deform_attention(
            value, shapes, self.offsets(query), self.weights(query), reference, backend=self.backend
        )
        return self.output(sampled.to(query.dtype))


class Injector(nn.Module):
    """Patch tokens read the pyramid; the result is scaled by a per-channel ``gamma`` that starts at zero."""

    def __init__(self, channels: int, heads: int, points: int, value_ratio: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(channels, eps=ADAPTER_NORM_EPS)
        self.feature_norm = nn.LayerNorm(channels, eps=ADAPTER_NORM_EPS)
        self.attention = DeformableAttention(channels, heads, 3, points, value_ratio)
        self.gamma = nn.Parameter(torch.zeros(channels))

    def forward(self, patches: Tensor, reference: Tensor, pyramid: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """``patches [N, G, C]`` after reading ``pyramid [N, S, C]``; ``reference [G, 2]``."""
        read = self.attention(self.query_norm(patches), reference, self.feature_norm(pyramid), shapes)
        return torch.addcmul(patches, self.gamma.to(patches.dtype), read.to(patches.dtype))


class ConvFFN(nn.Module):
    """Feed-forward layer with a depthwise 3×3 convolution on each map of the pyramid in between."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Linear(hidden, channels)

    def forward(self, pyramid: Tensor, shapes: Sequence[Shape]) -> Tensor:
        """``[N, Σ h·w, C]`` → the same shape."""
        parts = self.expand(pyramid).split([height * width for height, width in shapes], dim=1)
        mixed = [to_tokens(self.depthwise(to_map(part, shape))) for part, shape in zip(parts, shapes, strict=True)]
        return self.project(F.gelu(torch.cat(mixed, dim=1)))


class Extractor(nn.Module):
    """The pyramid reads the patch tokens and passes a feed-forward layer, both as residuals."""

    def __init__(self, channels: int, heads: int, points: int, value_ratio: float, ffn_ratio: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(channels, eps=ADAPTER_NORM_EPS)
        self.feature_norm = nn.LayerNorm(channels, eps=ADAPTER_NORM_EPS)
        self.attention = DeformableAttention(channels, heads, 1, points, value_ratio)
        self.ffn_norm = nn.LayerNorm(channels, eps=ADAPTER_NORM_EPS)
        self.ffn = ConvFFN(channels, int(channels * ffn_ratio))

    def forward(
        self, pyramid: Tensor, reference: Tensor, patches: Tensor, shapes: Sequence[Shape], grid: Shape
    ) -> Tensor:
        """``pyramid [N, S, C]`` (maps of ``shapes``) after reading ``patches [N, G, C]`` (one map of ``grid``)."""
        read = self.attention(self.query_norm(pyramid), reference, self.feature_norm(patches), [grid])
        pyramid = pyramid + read
        return pyramid + self.ffn(self.ffn_norm(pyramid), shapes)


class SpatialPrior(nn.Module):
    """Small convolutional network: image → maps of strides 4, 8, 16 and 32, all projected to the trunk's width.

    Args:
        channels: width of the trunk.
        stem: channels of stride 4; the later stages have 2, 4 and 4 times as many.
    """

    def __init__(self, channels: int, stem: int) -> None:
        super().__init__()

        def convolution(inside: int, outside: int, stride: int) -> list[nn.Module]:
            norm = ChannelLayerNorm(outside, eps=PRIOR_NORM_EPS)
            return [nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False), norm, nn.ReLU()]

        widths = (stem, 2 * stem, 4 * stem, 4 * stem)
        self.stem = nn.Sequential(
            *convolution(3, stem, 2),
            *convolution(stem, stem, 1),
            *convolution(stem, stem, 1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*convolution(widths[i], widths[i + 1], 2)) for i in range(len(widths) - 1)
        )
        self.project = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """``pixels [N, 3, h, w]`` → four maps ``[N, channels, h/4 … h/32, w/4 … w/32]``."""
        feature_map = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        maps = [self.project[0](feature_map)]
        for stage, project in zip(self.stages, self.project[1:], strict=True):
            feature_map = stage(feature_map)
            maps.append(project(feature_map))
        return maps


class Interaction(nn.Module):
    """What happens around one group of trunk layers: an injector before, one or more extractors after."""

    def __init__(
        self, channels: int, heads: int, points: int, value_ratio: float, ffn_ratio: float, extra_extractors: int
    ) -> None:
        super().__init__()
        self.injector = Injector(channels, heads, points, value_ratio)
        self.extractor = Extractor(channels, heads, points, value_ratio, ffn_ratio)
        self.extra_extractors = nn.ModuleList(
            Extractor(channels, heads, points, value_ratio, ffn_ratio) for _ in range(extra_extractors)
        )


def initialise_adapter(module: nn.Module) -> None:
    """Start values for training from scratch, to be used with ``Module.apply``: truncated normal 0.02 for linear
    layers, He-normal over the outgoing connections for convolutions; deformable attention sets its own."""
    if isinstance(module, DeformableAttention):
        module.reset_parameters()
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        outgoing = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / outgoing))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Upsampling(nn.ConvTranspose2d):
    """Transposed 2×2 convolution of stride 2. Its windows do not overlap, so it is one matrix product per cell, which
    keeps channels-last memory; the library's kernel does not on the CPU, and costs more backwards."""

    bias: nn.Parameter

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 2, stride=2)

    def forward(self, feature_map: Tensor) -> Tensor:  # type: ignore[override]
        """``[N, C, h, w]`` → ``[N, C, 2 h, 2 w]``."""
        weight = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 · 2 · C_out, C_in)
        windows = F.linear(feature_map.permute(0, 2, 3, 1), weight, self.bias.repeat(4))
        windows = windows.unflatten(-1, (2, 2, -1)).transpose(2, 3)  # (N, h, 2, w, 2, C)
        return windows.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class ViTAdapter(nn.Module):
    """The whole branch, walked together with a trunk.

    Args:
        channels, heads: width and attention heads of the trunk.
        groups: number of interactions; the trunk's layers are split into as many equal groups.
        stem: stem width of the spatial prior.
        points, value_ratio, ffn_ratio: deformable points per head and map, inner widths of values and feed-forward.
        extra_extractors: further extractors after the last group.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        groups: int = 4,
        stem: int = 64,
        points: int = 4,
        value_ratio: float = 0.5,
        ffn_ratio: float = 0.25,
        extra_extractors: int = 2,
    ) -> None:
        super().__init__()
        self.prior = SpatialPrior(channels, stem)
        self.level_embed = nn.Parameter(torch.empty(3, channels))
        self.interactions = nn.ModuleList(
            Interaction(channels, heads, points, value_ratio, ffn_ratio, extra_extractors if i == groups - 1 else 0)
            for i in range(groups)
        )
        self.up = Upsampling(channels)
        self.apply(initialise_adapter)
        nn.init.normal_(self.level_embed)

    def forward(self, trunk: Trunk, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run trunk and branch on normalised images.

        Args:
            trunk: embeds ``pixels`` and owns the layers.
            pixels: ``[N, 3, h, w]``, normalised, sides a multiple of the trunk's patch size.

        Returns:
            Hidden states after the last layer ``[N, prefix + h_p · w_p, C]`` (not normed) and four maps
            ``[N, C, 4 h_p, 4 w_p]``, ``2 h_p``, ``h_p`` and ``h_p / 2`` for a patch grid of ``h_p × w_p``.
        """
        hidden, grid = trunk.embed(pixels)
        finest, *coarser = self.prior(resize_image(pixels, (16 * grid[0], 16 * grid[1])))
        shapes = [tuple(feature_map.shape[-2:]) for feature_map in coarser]
        levels = zip(coarser, self.level_embed, strict=True)
        pyramid = torch.cat([to_tokens(feature_map) + level for feature_map, level in levels], dim=1)
        patch_centres = cell_centres([grid], pixels.device)
        pyramid_centres = cell_centres(shapes, pixels.device)

        group_outputs = []
        interactions: list[Any] = list(self.interactions)
        depth = len(trunk.layers) // len(interactions)
        for i, interaction in enumerate(interactions):
            prefix, patches = hidden[:, : trunk.prefix], hidden[:, trunk.prefix :]
            patches = interaction.injector(patches, patch_centres, pyramid, shapes)
            hidden = torch.cat([prefix, patches], dim=1)
            for layer in trunk.layers[i * depth : (i + 1) * depth]:
                hidden = layer(hidden, None)
            patches = hidden[:, trunk.prefix :]
            for extractor in (interaction.extractor, *interaction.extra_extractors):
                pyramid = extractor(pyramid, pyramid_centres, patches, shapes, grid)
            group_outputs.append(to_map(patches, grid))

        parts = pyramid.split([height * width for height, width in shapes], dim=1)
        coarser = [to_map(part, shape) for part, shape in zip(parts, shapes, strict=True)]
        maps = [finest + self.up(coarser[0]), *coarser]
        return hidden, [
            own + resize_image(patches, own.shape[-2:]) for own, patches in zip(maps, group_outputs, strict=True)
        ]


def resize_image(image: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of ``[N, C, h, w]`` without corner alignment; the input itself where the size is right."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=tuple(size), mode="bilinear", align_corners=False)
