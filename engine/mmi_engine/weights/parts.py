"""Parts of other models: vision trunk, language model, U-Net, VAE and noise schedule, from a folder or the hub.

Place in the flow: `assemble.py` opens the parts that a configuration names. They are read by the libraries they come
from; a part with weights missing is refused, never filled up with random ones. Returned beside every module are its
sizes in our terms. Families tested: CLIP, SigLIP, ViT, DINOv2; Llama, Mistral, Qwen 2, Qwen 3; U-Nets of the SD 1.5
and 2.1 kind with `AutoencoderKL`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from mmi_engine.errors import ModelError
from mmi_engine.model.config import VisionConfig
from mmi_engine.model.positions import interpolate_position_embedding
from mmi_engine.model.trunk import FAMILIES, Trunk, take_apart
from mmi_engine.weights.find import complete, from_hub, read_json

LANGUAGE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Decoder layers of exactly: norm, attention, sum, norm, FFN, sum."""
LANGUAGE_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "initializer_range"),
    *("attention_bias", "mlp_bias", "attention_dropout", "sliding_window", "use_sliding_window"),
    *("max_window_layers", "layer_types"),
)
SEVERAL_TEXTS = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "encoder_hid_dim")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
USUAL_NORMALISATION = {"siglip_vision_model": HALF, "vit": HALF, "dinov2": IMAGENET}
SMALL_FILES = ["*.json", "*.model", "*.txt"]
DIFFUSION = {
    ".safetensors": ["*diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"],
    ".bin": ["*diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"],
}
"""Weights of a diffusion repository that are read: not those of whole checkpoints, half precision or other EMAs."""
BASE = "base model"


def locate_part(name: str, what: str) -> Path:
    """Folder of a part: a path, else the hub's cache, else the network.

    Of a hub repository only what is needed is fetched: safetensors, pickled shards where there are none. What an
    interrupted download left is completed.

    Args:
        name: folder or hub id.
        what: ``vision trunk``, ``language model``, a part of a diffusion model, or `BASE`, which may be any of them.

    Raises:
        ModelError: there is none.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if name.count("/") == 1 and not path.parent.is_dir():
        ready = functools.partial(_ready, what=what)
        path = from_hub(name, SMALL_FILES, ready, what)  # they tell what kind of repository it is
        for ending in DIFFUSION:
            if what != "scheduler" and not ready(path):
                weights = DIFFUSION[ending] if _is_diffusion(path) else [f"*{ending}"]
                path = from_hub(name, [*SMALL_FILES, *weights], ready, what)
        return path
    raise ModelError(f'{what} "{name}" not found', remedy="name a folder or a hub id")


def _is_diffusion(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() or any((folder / part).is_dir() for part in ("unet", "vae"))


def _ready(folder: Path, what: str) -> bool:
    """Whether a folder of the hub's cache holds what is read of it."""
    if what == "scheduler":
        return (_inner(folder, "scheduler") / "scheduler_config.json").is_file()
    if not _is_diffusion(folder):
        return complete(folder)
    parts = {"U-Net": ("unet",), "VAE": ("vae",), BASE: ("unet", "vae")}.get(what, ())
    if what == "diffusion model" and "text_encoder" in read_json(folder / "model_index.json"):
        parts = ("text_encoder",)
    return all(complete(folder / part) for part in parts)


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Errors of the libraries as ours; their advice and progress bars are not for our reader."""
    from transformers.utils import logging as library_logging

    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    bars = library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the libraries raise OSError, ValueError, KeyError, safetensors' and their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: {what} cannot be read: {first}", remedy="fetch it again") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            library_logging.enable_progress_bar()


def _complete(path: Path, what: str, info: dict[str, Any]) -> None:
    """Refuse a part that the library filled up with random weights."""
    lacking = sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in info.get(key, ()))
    if lacking:
        raise ModelError(
            f"{path}: {what} lacks {len(lacking)} weights, first {lacking[0]}", remedy="fetch its missing files"
        )


def vision_part(name: str, image_size: int | None = None) -> tuple[Trunk, VisionConfig]:
    """Trunk and sizes of a vision transformer, or of the vision half of a CLIP or SigLIP model.

    Args:
        name: folder or hub id.
        image_size: px, when it is to read other sizes than it was trained with; its position table is resized.

    Raises:
        ModelError: not found, incomplete, or of a family that the adapter does not fit.
    """
    path = locate_part(name, "vision trunk")
    described = _described(path, "vision trunk")
    family = str(described.get("model_type"))
    family = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(family, family)
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{path}: {family!r} is no vision trunk that the adapter fits", remedy=f"use one of {known}")
    make = FAMILIES[family][0]
    with _reading(path, "the vision trunk"):
        model, info = make.from_pretrained(path, output_loading_info=True)  # type: ignore[attr-defined]
        ours = {k: [n for n in info.get(k, ()) if not _unused(str(n))] for k in ("missing_keys", "mismatched_keys")}
        _complete(path, "the vision trunk", ours)
    trunk, library = take_apart(model), model.config
    size = image_size or int(library.image_size)
    mean, std = _normalisation(path, family)
    config = VisionConfig(
        image_size=size,
        patch_size=int(library.patch_size),
        hidden_size=int(library.hidden_size),
        intermediate_size=int(getattr(library, "intermediate_size", 0) or library.mlp_ratio * library.hidden_size),
        num_layers=int(library.num_hidden_layers),
        num_heads=int(library.num_attention_heads),
        hidden_act=str(library.hidden_act),
        layer_norm_eps=float(library.layer_norm_eps),
        family=family,
        mean=mean,
        std=std,
    )
    if size != int(library.image_size):
        table = interpolate_position_embedding(
            trunk.position_embedding.detach(), (config.grid, config.grid), prefix=trunk.prefix
        )
        trunk.position_embedding = nn.Parameter(table)
    return trunk, config


def _unused(name: str) -> bool:
    """Weights of the library's model that the trunk leaves behind: final norm, pooling and head."""
    return any(part in name for part in ("post_layernorm", "pooler", "layernorm.", "head.", "mask_token", "classifier"))


def _normalisation(path: Path, family: str) -> tuple[Any, Any]:
    """Mean and standard deviation per colour channel: the part's own, else its family's."""
    try:
        described = json.loads((path / "preprocessor_config.json").read_text(encoding="utf-8"))
        return tuple(described["image_mean"]), tuple(described["image_std"])
    except (OSError, ValueError, KeyError, TypeError):
        plain = VisionConfig()
        return USUAL_NORMALISATION.get(family, (plain.mean, plain.std))


def language_family(name: str) -> tuple[Path, str]:
    """Folder and ``model_type`` of a language model.

    Raises:
        ModelError: not found, or of a family whose layers MMFS does not fit.
    """
    path = locate_part(name, "language model")
    family = str(_described(path, "language model").get("model_type"))
    if family not in LANGUAGE_FAMILIES:
        known = ", ".join(LANGUAGE_FAMILIES)
        raise ModelError(f"{path}: {family!r} is no language model that MMFS fits", remedy=f"use one of {known}")
    return path, family


def language_part(name: str) -> tuple[nn.Module, Tensor, dict[str, Any], PretrainedConfig]:
    """Body of a decoder-only language model, its output rows ``[V, d]``, its sizes, and its own configuration.

    Raises:
        ModelError: not found, incomplete, or of a family whose layers MMFS does not fit.
    """
    path, family = language_family(name)
    with _reading(path, "the language model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, attn_implementation="sdpa", dtype="auto"
        )
        _complete(path, "the language model", info)
    library = model.config
    sizes = {key: getattr(library, key) for key in LANGUAGE_KEYS if getattr(library, key, None) is not None}
    sizes = json.loads(json.dumps({"model_type": family, **sizes}))
    return model.model, model.lm_head.weight.detach(), sizes, library


def unet_part(name: str) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    """A diffusers U-Net and the settings that make it, from a diffusion folder or its ``unet`` folder.

    Raises:
        ModelError: not found, incomplete, or conditioned on more than one text.
    """
    path = _inner(locate_part(name, "U-Net"), "unet")
    with _reading(path, "the U-Net"):
        unet, info = UNet2DConditionModel.from_pretrained(path, output_loading_info=True, low_cpu_mem_usage=False)
        _complete(path, "the U-Net", info)
    for key in SEVERAL_TEXTS:
        if unet.config.get(key) is not None:
            raise ModelError(f"{path}: a U-Net with {key} is not supported", remedy="use one of the SD 1.x or 2.x kind")
    return unet, _settings(UNet2DConditionModel, unet.config)


def vae_part(name: str) -> tuple[AutoencoderKL, dict[str, Any]]:
    """A diffusers ``AutoencoderKL`` and the settings that make it, from a diffusion folder or its ``vae`` folder.

    Raises:
        ModelError: not found, incomplete, or one that shifts its latents.
    """
    path = _inner(locate_part(name, "VAE"), "vae")
    with _reading(path, "the VAE"):
        vae, info = AutoencoderKL.from_pretrained(path, output_loading_info=True, low_cpu_mem_usage=False)
        _complete(path, "the VAE", info)
    if vae.config.get("shift_factor"):
        raise ModelError(f"{path}: a VAE that shifts its latents", remedy="use one of the SD 1.x or 2.x kind")
    return vae, _settings(AutoencoderKL, vae.config)


def scheduler_part(name: str) -> dict[str, Any]:
    """Settings of the noise schedule, as `DDPMScheduler` takes them.

    Raises:
        ModelError: not found.
    """
    path = _inner(locate_part(name, "scheduler"), "scheduler")
    try:
        described = json.loads((path / "scheduler_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} holds no scheduler_config.json: {error}", remedy="fetch it again") from error
    known = inspect.signature(DDPMScheduler.__init__).parameters
    kept = {key: value for key, value in described.items() if key in known and value is not None}
    return {**kept, "variance_type": "fixed_small"}


@torch.no_grad()
def empty_prompt(name: str, length: int, width: int) -> Tensor | None:
    """What the diffusion folder's text encoder makes of an empty prompt, ``[1, length, width]``; ``None`` without one.

    Raises:
        ModelError: the text encoder is incomplete, or of another length or width than the U-Net's condition.
    """
    path = locate_part(name, "diffusion model")
    if not (path / "text_encoder").is_dir() or not (path / "tokenizer").is_dir():
        return None
    from transformers import CLIPTextModel, CLIPTokenizer

    with _reading(path, "the text encoder"):
        tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
        encoder, info = CLIPTextModel.from_pretrained(path / "text_encoder", output_loading_info=True)
        _complete(path, "the text encoder", info)
        ids = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        hidden = encoder(ids).last_hidden_state
    if tuple(hidden.shape) != (1, length, width):
        raise ModelError(
            f"{path}: the text encoder gives {list(hidden.shape)}, the U-Net is conditioned on {[1, length, width]}",
            remedy="take U-Net and text encoder from one model",
        )
    return hidden.float()


def _inner(path: Path, folder: str) -> Path:
    return path / folder if (path / folder).is_dir() else path


def _settings(library: type, config: Any) -> dict[str, Any]:
    """The settings of a diffusers model that differ from the library's defaults, as JSON has them."""
    settings = {}
    for key, parameter in inspect.signature(library.__init__).parameters.items():  # type: ignore[misc]
        if key in config and config[key] != parameter.default and not key.startswith("_"):
            settings[key] = config[key]
    return dict(json.loads(json.dumps(settings)))


def _described(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} holds no {what}: config.json cannot be read", remedy="name its folder") from error
    return dict(value)
