"""The Vision Transformer that the adapter walks: patch embedding, positions, first norm and a list of layers.

Place in the flow: first stop of an image inside ``vision``. No final norm and no pooling: the layers' raw output goes
on. Patch embedding and layers are those of the transformers library, and any of its plain vision transformers will do
(:func:`take_apart`); the released model's is CLIP ViT-L/14. Source: Dosovitskiy et al. 2021; Radford et al. 2021 (CLIP,
with its norm before the first layer); docs/model.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from mmi_engine.errors import ModelError
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
        self.channels = position_embedding.shape[-1]
        self.prefix = 0 if class_embedding is None else class_embedding.numel() // self.channels

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


def take_apart(model: PreTrainedModel) -> Trunk:
    """The trunk inside a plain vision transformer of the transformers library, sharing its memory.

    Args:
        model: CLIP or SigLIP vision model, ViT, DINOv2 …: convolutional patches, learnt absolute positions, at most
            one class token and no other, layers called as ``layer(hidden, mask)``. Its final norm, pooling and head
            are left behind.

    Raises:
        ModelError: the model is built otherwise.
    """
    embeddings = getattr(model, "embeddings", None)
    patches = getattr(embeddings, "patch_embeddings", None)
    patches = getattr(patches, "projection", None) or getattr(embeddings, "patch_embedding", None)
    positions = getattr(embeddings, "position_embeddings", None)
    if positions is None:
        positions = getattr(getattr(embeddings, "position_embedding", None), "weight", None)
    holder = getattr(model, "encoder", model)
    layers = getattr(holder, "layers", None) or getattr(holder, "layer", None)
    more_tokens = any(hasattr(embeddings, name) for name in ("register_tokens", "distillation_token"))
    if (
        more_tokens
        or not isinstance(patches, nn.Conv2d)
        or not isinstance(positions, nn.Parameter)
        or not isinstance(layers, nn.ModuleList)
    ):
        raise ModelError(
            f"{type(model).__name__} is not a plain vision transformer with learnt absolute positions",
            remedy="use a CLIP, SigLIP, ViT or DINOv2 vision model",
        )
    if positions.ndim == 3:
        positions = nn.Parameter(positions.detach()[0], requires_grad=positions.requires_grad)
    class_token = getattr(embeddings, "class_embedding", getattr(embeddings, "cls_token", None))
    if class_token is not None and class_token.ndim != 1:
        class_token = nn.Parameter(class_token.detach().flatten(), requires_grad=class_token.requires_grad)
    return Trunk(patches, class_token, positions, getattr(model, "pre_layrnorm", nn.Identity()), layers)


def fresh_trunk(config: VisionConfig) -> Trunk:
    """A freshly initialised vision transformer of the family and sizes in ``config``, in pieces.

    Raises:
        ModelError: the family is unknown.
    """
    if config.family not in FAMILIES:
        raise ModelError(
            f"vision.family {config.family!r} is unknown", remedy=f"known families: {', '.join(sorted(FAMILIES))}"
        )
    make, settings, options = FAMILIES[config.family]
    sizes = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
    }
    if config.family == "dinov2":
        sizes["mlp_ratio"] = config.intermediate_size // config.hidden_size
    else:
        sizes["intermediate_size"] = config.intermediate_size
    return take_apart(make(settings(**sizes, **options)))


FAMILIES: dict[str, tuple[Callable[..., PreTrainedModel], Callable[..., PretrainedConfig], dict[str, bool]]] = {
    "clip_vision_model": (CLIPVisionModel, CLIPVisionConfig, {}),
    "siglip_vision_model": (SiglipVisionModel, SiglipVisionConfig, {"vision_use_head": False}),
    "vit": (ViTModel, ViTConfig, {}),
    "dinov2": (Dinov2Model, Dinov2Config, {}),
}
"""``model_type`` → model, configuration, further settings."""
