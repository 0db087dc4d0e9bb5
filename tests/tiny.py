"""A complete model of a few thousand weights, for tests: same modules, small numbers."""

from __future__ import annotations

import torch

from mmi_engine.model.config import (
    GenerationDefaults,
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
from mmi_engine.model.tokenizer import DirectoryTokenizer
from mmi_engine.toon.tokenizer import PATH, VOCABULARY


def tiny_config(**changes: object) -> ModelConfig:
    """Like the embedded model in every respect but size; ``changes`` replace top-level fields."""
    mmfs = {"heads": 2, "points": 2, "width": 8}
    former = {"hidden_size": 16, "cross_attention_frequency": 1, "num_layers": 1, "num_heads": 2}
    former |= {"intermediate_size": 16, "dropout": 0.0}
    vae = {
        "in_channels": 12,
        "out_channels": 12,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 16,
    }
    unet = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    }
    llm = {
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
    }
    scheduler = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "clip_sample": False}
    fields: dict[str, object] = {
        "name": "tiny",
        "tokens": SpecialTokens(1, 2, VOCABULARY - 1, VOCABULARY, VOCABULARY + 1),
        "vision": VisionConfig(32, 8, 16, 16, 4, 2, extra_extractors=1, stem_channels=4),
        "visual_resampler": QFormerConfig(num_queries=3, encoder_hidden_size=16, **former),
        "language": LanguageConfig(llm, MMFSConfig(**mmfs, levels=(8, 4, 2)), mmfs_every=2, mmfs_base=4),
        "image_decoder": ImageDecoderConfig(
            context_resampler=QFormerConfig(num_queries=5, encoder_hidden_size=24, qk_norm=False, **former),
            unet=unet,
            vae=VAEConfig(vae, patch=2, image_size=32),
            scheduler=scheduler,
            mmfs=MMFSConfig(**mmfs, levels=(16, 8, 4, 2), max_images=10, offset_init=1.0),
        ),
        "generation": GenerationDefaults(steps=3, guidance=2.0, scheduler="ddim"),
    }
    return ModelConfig(**{**fields, **changes})  # type: ignore[arg-type]


def tiny_model(seed: int = 0, config: ModelConfig | None = None) -> MMInterleaved:
    """In eval mode, with gates and zero convolutions opened so that every path matters."""
    torch.manual_seed(seed)
    model = MMInterleaved(config or tiny_config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".gate", "gamma")) or "zero_conv" in name or name == "boi_embedding":
                parameter.normal_(std=0.5)
            if "offsets.weight" in name:
                parameter.normal_(std=0.2)
        model.text_head.head_new.weight.normal_(std=0.2)
    model.tokenizer = DirectoryTokenizer(PATH.parent)
    return model
