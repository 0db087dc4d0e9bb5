"""Checkpoints in the released layout with few weights, and the shapes of the full one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tiny import tiny_config, tiny_model
from torch import Tensor

from mmi_engine.model.config import ModelConfig, VAEConfig
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.names import NameTable

POSITION_IDS = "visual_tokenizer.encoder.vision_model.embeddings.position_ids"


def small_config() -> ModelConfig:
    """The tiny model without what the released layout does not know."""
    config = tiny_config()
    decoder = config.image_decoder
    vae = {**decoder.vae.diffusers, "in_channels": 3, "out_channels": 3}
    unet = {**decoder.unet, "sample_size": 16}
    return replace(
        config,
        name="small",
        image_decoder=replace(decoder, vae=VAEConfig(vae, patch=1, image_size=32), unet=unet),
    )


def small_model() -> MMInterleaved:
    """With random weights everywhere."""
    return tiny_model(config=small_config())


def released_state(model: MMInterleaved) -> dict[str, Tensor]:
    """The model's weights under their released names, fixed tables included."""
    table = NameTable(model.config)
    state = {table.to_released(name): value.clone() for name, value in model.state_dict().items()}
    for name, value in model.named_buffers():
        if name.endswith(".positions") and table.to_released(name) not in state:
            state[table.to_released(name)] = value.clone()
    assert None not in state
    return state


def write_shards(state: dict[str, Tensor], folder: Path, shards: int = 3, ending: str = "bin") -> Path:
    """Deal a state dictionary to shards in the order of its names."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    for number in range(shards):
        part = {name: state[name].contiguous() for name in names[number::shards]}
        path = folder / f"pytorch_model-{number + 1:05}-of-{shards:05}.{ending}"
        save_file(part, path) if ending == "safetensors" else torch.save(part, path)
    return folder
