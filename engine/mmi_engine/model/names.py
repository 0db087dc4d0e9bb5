"""Released tensor names ↔ ours: the one table that parity checks and the import of released checkpoints use.

A rule is a pair of templates as explained in ``names_vision``; the first rule that matches a name wins, in either
direction. The decoder layers that carry MMFS are wrapped in ours, so some rules depend on the configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmi_engine.model.config import ModelConfig
from mmi_engine.model.names_vision import OFFICIAL_NAMES, Rule, is_dropped, template_pattern

_MMFS = (
    ("dynamic_offset_mask.{leaf}", "query_proj.{leaf}"),
    ("query_relpos.weight", "image_index.weight"),
    ("sampling_offsets.{leaf}", "offsets.{leaf}"),
    ("attention_weights.{leaf}", "logits.{leaf}"),
    ("value_proj.{leaf}", "value_proj.{leaf}"),
    ("output_proj.{leaf}", "output_proj.{leaf}"),
    ("ignore_token", "ignore_token"),
)


def mmfs_rules(released: str, ours: str) -> list[Rule]:
    """Rules of one MMFS module behind the given prefixes."""
    return [(released + a, ours + b) for a, b in _MMFS]


def _language_rules(config: ModelConfig) -> list[Rule]:
    layer, ours = "mm_decoder.layers.{i}.", "language.body.layers.{i}."
    cross = f"{layer}llama_cross_attn."
    rules = [
        *mmfs_rules(f"{cross}attn.", f"{ours}cross.mmfs."),
        (f"{cross}norm1.weight", f"{ours}cross.query_norm.weight"),
        (f"{cross}norm2.weight", f"{ours}cross.feature_norm.weight"),
        (f"{cross}gate", f"{ours}cross.gate"),
    ]
    layers = int(config.language.transformers["num_hidden_layers"])
    if config.language.mmfs is not None:
        for i in range(0, layers, config.language.mmfs_every):
            rules.append((f"mm_decoder.layers.{i}.{{rest}}", f"language.body.layers.{i}.layer.{{rest}}"))
    return [*rules, ("mm_decoder.{rest}", "language.body.{rest}")]


def _decoder_rules(config: ModelConfig) -> list[Rule]:
    unet = config.image_decoder.unet
    per_block = int(unet.get("layers_per_block", 2))
    stages = len(unet["block_out_channels"])
    middle = stages * (per_block + 1)  # conv_in, the resnets of every stage, a downsampler in all but the last
    rules: list[Rule] = []
    for released, ours in (("mmfs_mid_block.", f"{middle}."), ("mmfs_down_blocks.{i}.", "{i}.")):
        theirs, mine = f"image_decoder.decoder.mmfs_module.{released}", f"image_decoder.unet.mmfs_blocks.{ours}"
        rules += [
            *mmfs_rules(f"{theirs}mmfs.", f"{mine}mmfs."),
            (f"{theirs}query_norm.{{leaf}}", f"{mine}query_norm.{{leaf}}"),
            (f"{theirs}feat_norm.{{leaf}}", f"{mine}feature_norm.{{leaf}}"),
            (f"{theirs}conv.{{leaf}}", f"{mine}zero_conv.{{leaf}}"),
            (f"{theirs}pos_embed", f"{mine}positions"),
        ]
    return [
        *rules,
        ("image_decoder.decoder.unet.{rest}", "image_decoder.unet.unet.{rest}"),
        ("image_decoder.decoder.vae.{rest}", "image_decoder.codec.vae.{rest}"),
        ("image_decoder.neg_prompt_embeds", "image_decoder.unconditional"),
        ("context_feat_proj.{leaf}", "image_decoder.context_proj.{leaf}"),
    ]


class NameTable:
    """All rules for one configuration."""

    def __init__(self, config: ModelConfig) -> None:
        rules = [
            *OFFICIAL_NAMES,
            *_language_rules(config),
            *_decoder_rules(config),
            ("text_decoder.{rest}", "text_head.{rest}"),
            ("soi_token", "boi_embedding"),
        ]
        self._to_ours = [(template_pattern(released), ours) for released, ours in rules]
        self._to_released = [(template_pattern(ours), released) for released, ours in rules]

    def to_ours(self, released: str) -> str | None:
        """Our name of a released tensor, ``None`` when no rule knows it."""
        return _first(self._to_ours, released)

    def to_released(self, ours: str) -> str | None:
        """Released name of one of our tensors, ``None`` when no rule knows it."""
        return _first(self._to_released, ours)


def _first(rules: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict())
    return None


@dataclass
class NameReport:
    """What became of a released state dictionary; empty lists mean that everything found its place."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """True when nothing is missing, unexpected or of another shape or fixed value."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{len(v)} {k} (first: {v[0]})" for k, v in vars(self).items() if v]
        return ", ".join(parts) or "complete"


def load_released(model: nn.Module, config: ModelConfig, released: dict[str, Tensor]) -> NameReport:
    """Copy a released state dictionary into ``model`` where names and shapes agree, and report the rest.

    Fixed tables that ours computes (positions) are compared, not copied.
    """
    table, report = NameTable(config), NameReport()
    own = model.state_dict()
    fixed = {k: v for k, v in model.named_buffers() if k not in own}
    seen = set()
    for name, tensor in released.items():
        ours = table.to_ours(name)
        if ours is None or (ours not in own and ours not in fixed):
            if not is_dropped(name):
                report.unexpected.append(name)
            continue
        target = own.get(ours, fixed.get(ours))
        assert target is not None
        seen.add(ours)
        if ours in fixed:
            if target.shape != tensor.shape or not torch.allclose(target, tensor.to(target.dtype), atol=1e-5):
                report.mismatched.append(f"{name}: another fixed table")
        elif target.shape != tensor.shape:
            report.mismatched.append(f"{name}: {list(tensor.shape)} instead of {list(target.shape)}")
        else:
            target.copy_(tensor)
    report.missing = [table.to_released(k) or k for k in own if k not in seen]
    return report
