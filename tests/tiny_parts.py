"""Tiny parts with random weights, made with the libraries' own configurations and saved as they save them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from mmi_engine.toon.tokenizer import PATH, VOCABULARY

VISION = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, {"intermediate_size": 32}),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {"intermediate_size": 32}),
    "vit": (ViTModel, ViTConfig, {"intermediate_size": 32}),
    "dinov2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2}),
}
LANGUAGE: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
}
DIFFUSION: dict[str, tuple[dict[str, Any], str]] = {
    # SD 1.5: one head count, convolutional projections, narrow text; SD 2.1: a count per stage, linear ones, velocity
    "sd15": ({"attention_head_dim": 2, "cross_attention_dim": 24, "use_linear_projection": False}, "epsilon"),
    "sd21": ({"attention_head_dim": [2, 4], "cross_attention_dim": 32, "use_linear_projection": True}, "v_prediction"),
}


def make_vision(folder: Path, family: str) -> Path:
    make, settings, extra = VISION[family]
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    make(settings(**sizes, **extra)).save_pretrained(folder)
    return folder


def make_language(folder: Path, family: str) -> Path:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **{**sizes, **LANGUAGE[family]})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    shutil.copyfile(PATH, folder / "tokenizer.json")
    return folder


def make_diffusion(folder: Path, kind: str, *, text_encoder: bool = False) -> Path:
    special, prediction = DIFFUSION[kind]
    UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=2,
        **special,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        sample_size=16,
    ).save_pretrained(folder / "vae")
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    PNDMScheduler(**schedule, prediction_type=prediction, skip_prk_steps=True).save_pretrained(folder / "scheduler")
    if text_encoder:
        width = special["cross_attention_dim"]
        sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
        CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=6, bos_token_id=4, eos_token_id=5)).save_pretrained(
            folder / "text_encoder"
        )
        words = folder / "tokenizer"
        words.mkdir()
        vocabulary = {"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "<|startoftext|>": 4, "<|endoftext|>": 5}
        (words / "vocab.json").write_text(json.dumps(vocabulary))
        (words / "merges.txt").write_text("#version: 0.2\n")
        (words / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder


COMBINATIONS = [
    ("clip", "llama", "sd15"),
    ("siglip", "mistral", "sd21"),
    ("vit", "qwen2", "sd15"),
    ("dinov2", "qwen3", "sd21"),
]
"""Every family at least once."""

SPEC = """
name = "{name}"
[vision]
model = "vision"
[language]
model = "language"
[image]
model = "image"
[config.visual_resampler]
num_queries = 3
hidden_size = 16
num_layers = 2
num_heads = 2
intermediate_size = 16
[config.language]
mmfs_every = 2
[config.language.mmfs]
heads = 2
points = 2
width = 8
[config.image_decoder.mmfs]
heads = 2
points = 2
width = 8
"""


def make_parts(
    folder: Path, vision: str = "clip", language: str = "llama", diffusion: str = "sd21", *, text_encoder: bool = False
) -> Path:
    """All parts and their specification ``parts.toml``; returns that."""
    torch.manual_seed(0)
    make_vision(folder / "vision", vision)
    make_language(folder / "language", language)
    make_diffusion(folder / "image", diffusion, text_encoder=text_encoder)
    (folder / "parts.toml").write_text(SPEC.format(name=f"{vision}-{language}-{diffusion}"))
    return folder / "parts.toml"
