#!/usr/bin/env python3
"""Small random models to try `mmi model` with, no download needed: parts of other models, and a released checkpoint.

    python small_models.py parts DIR            vision trunk, language model, diffusion folder, and parts.toml
    python small_models.py released MODEL DIR   a model as a released checkpoint: pickled shards, released names

The parts are made with the libraries' own configurations and saved as the libraries save them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from mmi_engine.toon.tokenizer import PATH as TOKENIZER
from mmi_engine.toon.tokenizer import VOCABULARY

SPEC = """name = "small"

[vision]
model = "vision"                # a folder beside this file, a path, or a hub id

[language]
model = "language"

[image]
model = "image"                 # with unet/, vae/ and scheduler/

[config.visual_resampler]       # any value of config.json; without it, the released model's
num_queries = 4
hidden_size = 32
num_layers = 2
num_heads = 2
intermediate_size = 64

[config.language.mmfs]
heads = 2
width = 16

[config.image_decoder.mmfs]
heads = 2
width = 16
"""


def parts(folder: Path) -> None:
    """Write all parts."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder / "vision")
    text = LlamaConfig(**sizes, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, max_position_embeddings=256)
    LlamaForCausalLM(text).save_pretrained(folder / "language")
    shutil.copyfile(TOKENIZER, folder / "language" / "tokenizer.json")
    UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=32,
    ).save_pretrained(folder / "image" / "unet")
    stages = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(**stages, block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(folder / "image" / "vae")
    DDPMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "image" / "scheduler")
    (folder / "parts.toml").write_text(SPEC, encoding="utf-8")


def released(name: str, folder: Path) -> None:
    """Write a model's weights under their released names, in two shards, with its sizes and tokenizer beside them."""
    from safetensors.torch import load_file

    from mmi_engine.model.config import ModelConfig
    from mmi_engine.model.names import NameTable
    from mmi_engine.model_info import locate

    model = locate(name)
    table = NameTable(ModelConfig.load(model))
    tensors = {table.to_released(name): value for name, value in load_file(model / "model.safetensors").items()}
    folder.mkdir(parents=True)
    for number in range(2):
        part = dict(list(tensors.items())[number::2])
        torch.save(part, folder / f"pytorch_model-{number + 1:05}-of-00002.bin")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(model / name, folder / name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["parts"] and len(sys.argv) == 3:
        parts(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["released"] and len(sys.argv) == 4:
        released(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(__doc__)
