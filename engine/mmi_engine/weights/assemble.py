"""``mmi model new``: a trainable model from a vision trunk, a language model, and a diffusion U-Net with its VAE.

    spec.toml ─ parts opened (parts.py) ─ configuration derived from their sizes ─ MMInterleaved around them ─ directory

What is new between the parts starts as in the paper: MMFS gates and zero convolutions at zero, so the language model
and the U-Net compute what they computed before; the visual tokens' projection small; the new rows of the text head
silent. Source: paper section 3.2 and 3.3, appendix; docs/model.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmi_engine.errors import ConfigError, ModelError, OutputError
from mmi_engine.model.checkpoint import check_files, fitting_tokenizer, save_model, skeleton
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
from mmi_engine.model.interleaved import MMInterleaved, Parts
from mmi_engine.weights import parts, store
from mmi_engine.weights.find import tokenizer_file

CONDITION_TOKENS = 77
HEAD_WIDTH = 64
EXAMPLE = "see docs/model-new.md for an example"
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Spec:
    """What ``mmi model new`` is asked for.

    Attributes:
        name: of the model.
        vision: ``model``, and ``image_size`` when it is to read other sizes than its own.
        language: ``model``; ``tokenizer`` when it is elsewhere; ``bos``, ``eos``, ``pad`` ids when it names none.
        image: ``model``, a diffusion folder with ``unet``, ``vae``, ``scheduler``; each may be named by itself;
            ``image_size`` when it is to draw other sizes than its own.
        config: values of the configuration to replace, nested as in ``config.json``.
        seed: of the new weights.
    """

    name: str
    vision: dict[str, Any]
    language: dict[str, Any]
    image: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    KEYS = {
        "vision": {"model", "image_size"},
        "language": {"model", "tokenizer", "bos", "eos", "pad"},
        "image": {"model", "unet", "vae", "scheduler", "image_size"},
    }

    @classmethod
    def load(cls, path: Path) -> Spec:
        """Read a TOML file; folders in it are relative to it.

        Raises:
            ConfigError: it cannot be read, a value has the wrong type, or a key is unknown or missing.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}", remedy=EXAMPLE) from error
        _check_types(path, table)
        known = {entry.name for entry in dataclasses.fields(cls)}
        for where, keys, names in [("", table, known), *((k, table.get(k, {}), v) for k, v in cls.KEYS.items())]:
            if unknown := sorted(set(keys) - names):
                remedy = f"known keys: {', '.join(sorted(names))}"
                raise ConfigError(f"{path}: unknown key {where}{'.' if where else ''}{unknown[0]}", remedy=remedy)
        for section, key in (("vision", "model"), ("language", "model"), ("image", "model")):
            named = table.get(section, {})
            if key not in named and not (section == "image" and {"unet", "vae", "scheduler"} <= named.keys()):
                raise ConfigError(f"{path}: {section}.{key} is missing", remedy="name a folder or a hub id")
        for section in cls.KEYS:
            for key in ("model", "unet", "vae", "scheduler", "tokenizer"):
                value = table[section].get(key)
                if value is not None and (path.parent / str(value)).exists():
                    table[section][key] = str(path.parent / str(value))
        return cls(**{"name": path.stem, **table})


_TYPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("vision", "language", "image", "config"), (dict, "a table")),
    **dict.fromkeys(("name", "model", "unet", "vae", "scheduler", "tokenizer"), (str, "a string")),
    **dict.fromkeys(("seed", "image_size", "bos", "eos", "pad"), (int, "a number of at least 0")),
}


def _check_types(path: Path, table: dict[str, Any], prefix: str = "") -> None:
    """Refuse values of another type than their key's, before any part is loaded; unknown keys are not looked at."""
    for key, value in table.items():
        wanted, what = _TYPES.get(key, (object, ""))
        negative = wanted is int and isinstance(value, int) and value < 0
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)) or negative:
            raise ConfigError(f"{path}: {prefix}{key} must be {what}", remedy=EXAMPLE)
        if key in Spec.KEYS and not prefix and isinstance(value, dict):
            _check_types(path, value, f"{key}.")


def assemble_command(spec_path: Path, out: Path, notice: Notice) -> MMInterleaved:
    """``mmi model new``: assemble and write; ``out`` appears complete or not at all.

    Raises:
        ConfigError, ModelError: see `assemble`.
        OutputError: ``out`` is there already.
    """
    out = Path(os.path.abspath(out))  # "." has no name of its own
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise OutputError(f"{out} is there already", remedy="choose another --out, or remove it first")
    spec = Spec.load(spec_path)
    folder, _ = parts.language_family(spec.language["model"])
    token_file = tokenizer_file(str(spec.language.get("tokenizer", folder)), "language.tokenizer")
    model = assemble(spec, notice)
    staging = out.with_name(f"{out.name}.partial")
    store.start_anew(staging)
    try:
        save_model(model, staging)
        shutil.copyfile(token_file, staging / f"tokenizer{'.json' if token_file.suffix == '.json' else '.model'}")
        fitting_tokenizer(staging, model.config)
        check_files(staging, {name: value.shape for name, value in skeleton(model.config).state_dict().items()})
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return model


def assemble(spec: Spec, notice: Notice = lambda text: None) -> MMInterleaved:
    """The model, in memory.

    Args:
        spec: the parts.
        notice: told what could not be taken from the parts.

    Raises:
        ModelError: a part is missing, incomplete, or does not fit the others.
        ConfigError: a value to be replaced is unknown.
    """
    torch.manual_seed(spec.seed)
    trunk, vision = parts.vision_part(spec.vision["model"], spec.vision.get("image_size"))
    body, output_rows, sizes, library = parts.language_part(spec.language["model"])
    unet, unet_sizes = parts.unet_part(spec.image.get("unet") or spec.image["model"])
    vae, vae_sizes = parts.vae_part(spec.image.get("vae") or spec.image["model"])
    schedule = parts.scheduler_part(spec.image.get("scheduler") or spec.image["model"])
    tokens = special_tokens(spec, library, len(output_rows))
    decoder = _decoder_config(spec, unet_sizes, vae_sizes, schedule, vision, int(sizes["hidden_size"]))
    config = _merged(
        ModelConfig(
            name=spec.name,
            tokens=tokens,
            vision=vision,
            visual_resampler=QFormerConfig(encoder_hidden_size=vision.hidden_size),
            language=LanguageConfig(sizes, MMFSConfig(levels=vision.feature_sizes[1:]), mmfs_base=vision.grid),
            image_decoder=decoder,
            generation=GenerationDefaults(),
        ),
        spec.config,
    )
    unet.register_to_config(sample_size=config.image_decoder.vae.latent_size)
    widen_embedding(body, tokens)
    model = MMInterleaved(config, Parts(trunk, body, unet, vae))  # type: ignore[arg-type]
    _fill_head(model, output_rows)
    _fill_unconditional(model, spec, notice)
    return model


def special_tokens(spec: Spec, library: Any, vocabulary: int) -> SpecialTokens:
    """The language model's ids, with ``<BoI>`` and the image placeholder behind its vocabulary.

    Raises:
        ModelError: it names no beginning or end of text, or the same for both, and the specification names none.
    """
    ids = {}
    for key in ("bos", "eos", "pad"):
        value = spec.language.get(key, getattr(library, f"{key}_token_id", None))
        ids[key] = value[0] if isinstance(value, list) else value
    if ids["pad"] is None or ids["pad"] in (ids["bos"], ids["eos"]):
        ids["pad"] = vocabulary - 1
    if None in ids.values() or len(set(ids.values())) < 3 or not all(0 <= i < vocabulary for i in ids.values()):
        told = ", ".join(f"{key} {value}" for key, value in ids.items())
        raise ModelError(
            f"{spec.language['model']}: begin, end and padding need three different ids below {vocabulary}: {told}",
            remedy="name them under [language], e.g. bos = an id that texts never contain",
        )
    return SpecialTokens(ids["bos"], ids["eos"], ids["pad"], vocabulary, vocabulary + 1)


def _decoder_config(
    spec: Spec, unet: dict[str, Any], vae: dict[str, Any], schedule: dict[str, Any], vision: VisionConfig, d_llm: int
) -> ImageDecoderConfig:
    """The image decoder's numbers from its parts'."""
    described = VAEConfig(vae, patch=1, image_size=0)
    side = spec.image.get("image_size")
    cells = side // described.downsampling if side is not None else unet.get("sample_size", 64)
    image_size = cells * described.downsampling
    if side is not None and side != image_size:
        raise ModelError(f"image.image_size {side} is no multiple of {described.downsampling}", remedy="choose another")
    if int(unet.get("in_channels", 4)) != described.latent_channels:
        raise ModelError(
            f"the U-Net reads {unet.get('in_channels', 4)} channels, the VAE makes {described.latent_channels}",
            remedy="take U-Net and VAE from one model",
        )
    width = int(unet.get("cross_attention_dim", 1280))
    return ImageDecoderConfig(
        context_resampler=QFormerConfig(
            num_queries=CONDITION_TOKENS,
            hidden_size=width,
            encoder_hidden_size=d_llm,
            cross_attention_frequency=1,
            num_layers=1,
            num_heads=max(1, width // HEAD_WIDTH),
            intermediate_size=3 * width,
            qk_norm=False,
            dropout=0.0,
        ),
        unet={**unet, "sample_size": cells},
        vae=VAEConfig(vae, patch=1, image_size=image_size),
        scheduler=schedule,
        mmfs=MMFSConfig(levels=vision.feature_sizes, max_images=10, offset_init=1.0),
    )


def _merged(config: ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    """``config`` with nested values replaced; unknown keys are errors of `ModelConfig`."""
    table = json.loads(config.to_json())

    def merge(into: dict[str, Any], new: dict[str, Any]) -> None:
        for key, value in new.items():
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                merge(into[key], value)
            else:
                into[key] = value

    merge(table, overrides)
    return ModelConfig.from_json(json.dumps(table))


@torch.no_grad()
def widen_embedding(body: nn.Module, tokens: SpecialTokens) -> None:
    """Two further rows for ``<BoI>`` and the placeholder, both the mean of the others; the rest stays as it is."""
    old: Tensor = body.embed_tokens.weight  # type: ignore[union-attr, assignment]
    new = nn.Embedding(tokens.vocab_size, old.shape[1], device="meta")
    mean = old.float().mean(0, keepdim=True).to(old.dtype)
    new.weight = nn.Parameter(torch.cat([old, mean.expand(tokens.vocab_size - len(old), -1)]))
    body.embed_tokens = new
    body.config.vocab_size = tokens.vocab_size


@torch.no_grad()
def _fill_head(model: MMInterleaved, rows: Tensor) -> None:
    """The language model's output rows; the new ones stay zero, with their bias of −100."""
    head = model.text_head.head
    head.weight = nn.Parameter(
        torch.cat([rows, rows.new_zeros(head.out_features - len(rows), rows.shape[1])]),
        requires_grad=head.weight.requires_grad,
    )


@torch.no_grad()
def _fill_unconditional(model: MMInterleaved, spec: Spec, notice: Notice) -> None:
    """The learnt unconditional embedding starts as the text encoder's empty prompt."""
    target = model.image_decoder.unconditional
    folder = spec.image.get("model")
    start = None if folder is None else parts.empty_prompt(folder, target.shape[1], target.shape[2])
    if start is None:
        notice("no text encoder beside the U-Net: the unconditional embedding starts from small random numbers")
    else:
        target.copy_(start)
