"""The Vision Transformer that the adapter walks: patch embedding, positions, first norm and a list of layers.

Place in the flow: first stop of an image inside ``vision``. No final norm and no pooling: the layers' raw output goes
on. The layers are those of the transformers library. Source: Dosovitskiy et al. 2021; Radford et al. 2021 (CLIP, with
its norm before the first layer); architecture section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmi_engine.model.config import VisionConfig
from mmi_engine.model.positions import interpolate_position_embedding


class Trunk(nn.Module):
    """A plain ViT in pieces.

    Args:
        patch_embedding: convolution with stride = kernel = patch size, 3 → C channels.
        class_embedding: ``[C]`` or ``[prefix, C]`` for tokens in front of the patches, or ``None``.
        position_embedding: ``[prefix + G * G, C]`` for the base grid of G × G patches.
        pre_norm: norm before the first layer, ``nn.Identity()`` for trunks without.
        layers: each called as ``layer(hidden, None)`` with hidden ``[N, prefix + patches, C]``, returning the same.
    """

    def __init__(
        self,
        patch_embedding: nn.Conv2d,
        class_embedding: nn.Parameter | None,
        position_embedding: nn.Parameter,
        pre_norm: nn.Module,
        layers: nn.ModuleList,
    ) -> None:
        super().__init__()
        self.patch_embedding = patch_embedding
        self.class_embedding = class_embedding
        self.position_embedding = position_embedding
        self.pre_norm = pre_norm
        self.layers = layers
        self.prefix = 0 if class_embedding is None else class_embedding.numel() // position_embedding.shape[-1]

    def embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """First hidden states of normalised images.

        Args:
            pixels: ``[N, 3, h, w]``; h and w may differ from the base grid, whose position embedding is then resized
                (bicubic, corners not aligned). Pixels beyond the last whole patch are ignored.

        Returns:
            ``[N, prefix + h_p · w_p, C]`` and the patch grid ``(h_p, w_p)``.
        """
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # (N, C, h_p, w_p)
        grid = (patches.shape[-2], patches.shape[-1])
        hidden = patches.flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            prefix = self.class_embedding.view(1, self.prefix, -1).expand(len(hidden), -1, -1)
            hidden = torch.cat([prefix, hidden], dim=1)
        positions = interpolate_position_embedding(self.position_embedding, grid, prefix=self.prefix)
        return self.pre_norm(hidden + positions), grid


def clip_trunk(config: VisionConfig) -> Trunk:
    """A freshly initialised CLIP vision transformer of the sizes in ``config``, in pieces."""
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
        )
    )
    embeddings = clip.embeddings
    return Trunk(
        embeddings.patch_embedding,
        embeddings.class_embedding,
        embeddings.position_embedding.weight,
        clip.pre_layrnorm,
        clip.encoder.layers,
    )
