"""Named sets of numbers: the embedded model ``toon`` and the layout of the released 13B checkpoint.

Both go through the same modules; nothing else distinguishes them. Source of the released numbers: paper Table 11 and
the public configurations of CLIP ViT-L/14, Vicuna-13B v1.3 and Stable Diffusion 2.1-base.
"""

from __future__ import annotations

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


def toon_config(vae: VAEConfig, vocabulary: int) -> ModelConfig:
    """The embedded model: 128 px pictures, a 16 × 16 latent, about 15 M parameters.

    Args:
        vae: of the trained codec.
        vocabulary: ordinary ids of the tokenizer, padding included (its last id); ``<BoI>`` and the placeholder follow.
    """
    mmfs = {"heads": 4, "points": 4, "width": 64}
    width = 128
    return ModelConfig(
        name="toon",
        tokens=SpecialTokens(bos=1, eos=2, pad=vocabulary - 1, boi=vocabulary, image=vocabulary + 1),
        vision=VisionConfig(
            image_size=128,
            patch_size=16,
            hidden_size=width,
            intermediate_size=3 * width,
            num_layers=4,
            num_heads=4,
            stem_channels=16,
        ),
        visual_resampler=QFormerConfig(
            num_queries=16,
            hidden_size=width,
            encoder_hidden_size=width,
            cross_attention_frequency=1,
            num_layers=2,
            num_heads=4,
            intermediate_size=2 * width,
            dropout=0.0,
        ),
        language=LanguageConfig(
            transformers={
                "model_type": "llama",
                "hidden_size": 192,
                "intermediate_size": 512,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-6,
            },
            mmfs=MMFSConfig(**mmfs, levels=(16, 8, 4), max_images=50, offset_init=3.0),
            mmfs_every=2,
            mmfs_base=8,
        ),
        image_decoder=ImageDecoderConfig(
            context_resampler=QFormerConfig(
                num_queries=16,
                hidden_size=width,
                encoder_hidden_size=192,
                cross_attention_frequency=1,
                num_layers=1,
                num_heads=4,
                intermediate_size=2 * width,
                qk_norm=False,
                dropout=0.0,
            ),
            unet={
                "sample_size": vae.latent_size,
                "in_channels": vae.latent_channels,
                "out_channels": vae.latent_channels,
                "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
                "block_out_channels": [96, 160],
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "attention_head_dim": 4,
                "cross_attention_dim": width,
                "use_linear_projection": True,
            },
            vae=vae,
            scheduler={
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "num_train_timesteps": 1000,
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
                "clip_sample": False,
            },
            # twice as wide as the language model's: what the picture before shows is copied through here
            mmfs=MMFSConfig(heads=8, points=4, width=128, levels=(32, 16, 8, 4), max_images=10, offset_init=1.0),
        ),
        generation=GenerationDefaults(steps=10, guidance=2.0, scheduler="unipc", fast_steps=5, fast_guidance=2.0),
    )


def released_config(image_size: int = 512, input_size: int = 224) -> ModelConfig:
    """The released 13B layout (CLIP ViT-L/14, Vicuna-13B, SD 2.1-base).

    Args:
        image_size: of the pictures it draws, px.
        input_size: of the pictures it reads, 224 or 448 px.
    """
    return ModelConfig(
        name="mm-interleaved-13b",
        tokens=SpecialTokens(),
        vision=VisionConfig(image_size=input_size, table_grid=None if input_size == 224 else 16),
        visual_resampler=QFormerConfig(),
        language=LanguageConfig(
            transformers={
                "model_type": "llama",
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_hidden_layers": 40,
                "num_attention_heads": 40,
                "num_key_value_heads": 40,
                "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-6,
            },
            mmfs=MMFSConfig(),
        ),
        image_decoder=ImageDecoderConfig(
            context_resampler=QFormerConfig(
                num_queries=77,
                hidden_size=1024,
                encoder_hidden_size=5120,
                cross_attention_frequency=1,
                num_layers=1,
                num_heads=16,
                intermediate_size=3072,
                qk_norm=False,
                dropout=0.0,
            ),
            unet={
                "sample_size": image_size // 8,
                "block_out_channels": [320, 640, 1280, 1280],
                "layers_per_block": 2,
                "cross_attention_dim": 1024,
                "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": True,
            },
            vae=VAEConfig(
                {
                    "down_block_types": ["DownEncoderBlock2D"] * 4,
                    "up_block_types": ["UpDecoderBlock2D"] * 4,
                    "block_out_channels": [128, 256, 512, 512],
                    "layers_per_block": 2,
                    "latent_channels": 4,
                    "sample_size": 768,
                    "scaling_factor": 0.18215,
                },
                image_size=image_size,
            ),
            scheduler={
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "num_train_timesteps": 1000,
                "prediction_type": "epsilon",
                "variance_type": "fixed_small",
                "timestep_spacing": "leading",
                "steps_offset": 1,
                "clip_sample": False,
            },
        ),
    )
