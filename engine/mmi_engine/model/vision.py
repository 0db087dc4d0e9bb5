"""Images → visual tokens for the language model and feature maps for MMFS: the entrance of every picture.

    images [N,3,h,w] in [0,1] ─ CLIP normalisation ─ ViT trunk walked by the adapter ─┬─ F1..F4 + positions
                                                                                      └─ last hidden states ─ Linear,
        LayerNorm, + positions, LayerNorm ─ Q-Former ─ Linear ─ tokens [N, queries, d]

The trunk's class token (if it has one) is read by the Q-Former like a patch and has a zero position. The four feature
maps have 4, 2, 1 and ½ times the patch grid's sides. Source: paper section 3.2; docs/model.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmi_engine.model.adapter import ViTAdapter, to_map
from mmi_engine.model.config import VisionConfig
from mmi_engine.model.kept import Keeps
from mmi_engine.model.positions import interpolate_position_embedding, resize_grid, sincos_2d
from mmi_engine.model.resampler import QFormer
from mmi_engine.model.trunk import Trunk, fresh_trunk

TOKEN_NORM_EPS = 1e-6


@dataclass(frozen=True)
class VisualOutput:
    """What the visual tokenizer makes of N images.

    Attributes:
        tokens: ``[N, queries, d_llm]``, to be placed at the image placeholders.
        features: F1..F4, ``[N, C, h_l, w_l]`` with positions added, finest first, in channels-last memory:
            ``features[l].permute(0, 2, 3, 1).flatten(1, 2)`` is a token list without a copy.
        last_hidden: ``[N, 1 + patches, C]``, the trunk's output before any norm.
        image_embeds: ``[N, patches, C]``, the patch part of ``last_hidden`` with positions added.
    """

    tokens: Tensor
    features: tuple[Tensor, ...]
    last_hidden: Tensor
    image_embeds: Tensor


class VisualTokenizer(Keeps):
    """Trunk, adapter and resampler.

    Args:
        config: sizes of trunk and adapter.
        resampler: Q-Former that reads ``config.hidden_size`` channels.
        d_llm: width of the language model.
        trunk: a trunk of the sizes in ``config``; ``None`` makes a fresh one.

    Raises:
        ValueError: resampler or trunk have another width.
    """

    clip_mean: Tensor
    clip_std: Tensor
    positions: Tensor

    def __init__(
        self,
        config: VisionConfig,
        resampler: QFormer,
        d_llm: int,
        *,
        trunk: Trunk | None = None,
    ) -> None:
        super().__init__()
        channels = config.hidden_size
        if resampler.config.encoder_hidden_size != channels:
            raise ValueError(
                f"the visual resampler reads {resampler.config.encoder_hidden_size} channels, the trunk has {channels}"
            )
        self.config = config
        self.trunk = fresh_trunk(config) if trunk is None else trunk
        if self.trunk.channels != channels:
            raise ValueError(f"the trunk has {self.trunk.channels} channels, its configuration says {channels}")
        self.register_buffer("clip_mean", torch.tensor(config.mean).view(1, 3, 1, 1))
        self.register_buffer("clip_std", torch.tensor(config.std).view(1, 3, 1, 1))
        self.adapter = ViTAdapter(
            channels,
            config.num_heads,
            groups=config.groups,
            stem=config.stem_channels,
            points=config.deform_points,
            value_ratio=config.value_ratio,
            ffn_ratio=config.ffn_ratio,
            extra_extractors=config.extra_extractors,
        )
        table = sincos_2d(config.positions_grid, config.positions_grid, channels)
        self.register_buffer("positions", torch.cat([table.new_zeros(self.trunk.prefix, channels), table]))
        self.project_in = nn.Linear(channels, channels)
        self.norm_in = nn.LayerNorm(channels, eps=TOKEN_NORM_EPS)
        self.norm_out = nn.LayerNorm(channels, eps=TOKEN_NORM_EPS)
        self.resampler = resampler
        self.project_out = nn.Linear(resampler.config.hidden_size, d_llm)
        # Small start: untrained visual tokens must not disturb a trained language model.
        nn.init.normal_(self.project_out.weight, std=1e-3)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, images: Tensor) -> VisualOutput:
        """Encode images.

        Args:
            images: ``[N, 3, h, w]`` in [0, 1]; h and w multiples of the patch size. Sizes other than the configured
                one resize the position tables.

        Raises:
            ValueError: a side is not a multiple of the patch size.
        """
        height, width = images.shape[-2:]
        if height % self.config.patch_size or width % self.config.patch_size:
            raise ValueError(f"images of {height} × {width} px do not divide into patches of {self.config.patch_size}")
        pixels = ((images - self.clip_mean) / self.clip_std).to(self.project_in.weight.dtype)
        hidden, maps = self.adapter(self.trunk, pixels)

        grid = (height // self.config.patch_size, width // self.config.patch_size)
        positions = interpolate_position_embedding(self.positions, grid, prefix=self.trunk.prefix).to(hidden.dtype)
        tokens = self.norm_out(self.norm_in(self.project_in(hidden)) + positions)
        return VisualOutput(
            tokens=self.project_out(self.resampler(tokens)),
            features=tuple(feature_map + self._map_positions(feature_map) for feature_map in maps),
            last_hidden=hidden,
            image_embeds=(hidden + positions)[:, self.trunk.prefix :],
        )

    def _map_positions(self, feature_map: Tensor) -> Tensor:
        """Position table for a map ``[N, C, h, w]``, as ``[1, C, h, w]`` in channels-last memory, once per size."""
        shape = (feature_map.shape[-2], feature_map.shape[-1])
        keeps = self.kept.may(self.training, (self.positions,))
        tables: dict[tuple[Any, ...], Tensor] = self.kept.get((self.positions,), dict) if keeps else {}
        key = (*shape, feature_map.dtype)
        if key not in tables:
            cells = resize_grid(self.positions[self.trunk.prefix :], shape)
            tables[key] = to_map(cells.unsqueeze(0), shape).to(feature_map.dtype)
        return tables[key]
