"""A golden bundle on disk: ``model_config.json``, ``model.safetensors`` and ``caseK_*.{json,safetensors}``.

The bundle carries its dimensions; nothing here assumes the size of any of them.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmi_engine.errors import VerifyError
from mmi_engine.model.config import (
    ImageDecoderConfig,
    LanguageConfig,
    MMFSConfig,
    ModelConfig,
    QFormerConfig,
    SpecialTokens,
    VAEConfig,
    VisionConfig,
)
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.names import NameReport, load_released

RELEASED_LLM_HEADS = 16
RELEASED_UNET_HEADS = 16
RELEASED_UNET_WIDTH = 1024
RELEASED_POINTS = 8
"""Hard-coded in the released implementation, hence in no configuration of a bundle."""


class Bundle:
    """One bundle directory.

    Raises:
        VerifyError: the directory is no bundle, or a file of it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise VerifyError(
                f"{directory} is not a directory", remedy="give a golden bundle, or none for the built-in"
            )
        self.cases = sorted(p.stem for p in self.directory.glob("case*.safetensors"))
        if not self.cases:
            raise VerifyError(f"{directory} holds no case*.safetensors", remedy="give a golden bundle directory")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of ``NAME.safetensors``."""
        path = self.directory / f"{name}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise VerifyError(f"{path} cannot be read: {error}", remedy="fetch the bundle again") from error

    def description(self, name: str) -> Any:
        """Content of ``NAME.json``."""
        path = self.directory / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise VerifyError(f"{path} cannot be read: {error}", remedy="fetch the bundle again") from error

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The released state dictionary (or the part of it that the bundle's cases need)."""
        return self.tensors("model")

    @cached_property
    def config(self) -> ModelConfig:
        """Model configuration in our terms."""
        return released_config(self.description("model_config"))

    @cached_property
    def model(self) -> MMInterleaved:
        """The model with the bundle's weights, in eval mode, float32."""
        torch.manual_seed(0)
        model = MMInterleaved(self.config).eval()
        with torch.no_grad():
            self.report: NameReport = load_released(model, self.config, self.weights)
        # The released layout of the convolutions, so that differences are the algorithm's and not the library's.
        return model.to(memory_format=torch.contiguous_format)


def released_config(described: dict[str, Any]) -> ModelConfig:
    """``model_config.json`` of a bundle as a :class:`ModelConfig`."""
    sizes, clip = described["config"], described["clip"]
    vision = VisionConfig(
        **{k: clip[k] for k in ("image_size", "patch_size", "hidden_size", "intermediate_size", "hidden_act")},
        num_layers=clip["num_hidden_layers"],
        num_heads=clip["num_attention_heads"],
        layer_norm_eps=clip["layer_norm_eps"],
    )
    ids = described["special_token_dict"]
    tokens = SpecialTokens(
        ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"], ids["soi_token_id"], ids["image_token_id"]
    )
    llm = {k: described["llm"][k] for k in _LLM_KEYS if described["llm"].get(k) is not None}
    llm_levels = tuple(described["llm"].get("spatial_shapes", (32, 16, 8)))
    language = LanguageConfig(
        transformers={"model_type": "llama", **llm},
        mmfs=MMFSConfig(RELEASED_LLM_HEADS, RELEASED_POINTS, vision.hidden_size, llm_levels, 50, 3.0),
        mmfs_every=sizes["freq"],
        mmfs_base=16,
    )
    decoder = ImageDecoderConfig(
        context_resampler=_qformer(sizes["ctx"], qk_norm=False),
        unet=described["unet"],
        vae=VAEConfig(described["vae"], patch=1, image_size=sizes["image_size"]),
        scheduler={
            **{k: described["scheduler"][k] for k in _SCHEDULER_KEYS},
            "variance_type": "fixed_small",
            "timestep_spacing": "leading",
        },
        mmfs=MMFSConfig(RELEASED_UNET_HEADS, RELEASED_POINTS, RELEASED_UNET_WIDTH, (64, 32, 16, 8), 10, 1.0),
    )
    return ModelConfig("golden", tokens, vision, _qformer(sizes["vis"], qk_norm=True), language, decoder)


_LLM_KEYS = (
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
)
_SCHEDULER_KEYS = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "num_train_timesteps",
    "prediction_type",
    "steps_offset",
    "clip_sample",
)


def _qformer(sizes: dict[str, Any], *, qk_norm: bool) -> QFormerConfig:
    return QFormerConfig(
        num_queries=sizes["num_queries"],
        hidden_size=sizes["hidden_size"],
        encoder_hidden_size=sizes["encoder_hidden_size"],
        cross_attention_frequency=sizes["cross_attention_frequency"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        intermediate_size=sizes["intermediate_size"],
        qk_norm=sizes.get("qk_normalization", qk_norm),
        dropout=0.1 if qk_norm else 0.0,
    )
