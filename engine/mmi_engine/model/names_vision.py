r"""Released names of the visual tokenizer's and the two Q-Formers' tensors, and ours.

Read when a released checkpoint is imported, exported or checked. A rule is a pair of templates ``(released, ours)``
with placeholders that stand for the same text on both sides: ``{i}`` and ``{j}`` for a number, ``{leaf}`` for
``weight`` or ``bias``, ``{rest}`` for anything. In either direction a name matches at most one rule: the table is its
own inverse. Source: state dictionary of the released model (BERT-like Q-Former names of transformers 4.31, CLIP names
with ``pre_layrnorm`` spelt so).
"""

from __future__ import annotations

import re
from functools import cache

Rule = tuple[str, str]

VISUAL_TOKENIZER = "visual_tokenizer."
CONTEXT_RESAMPLER = "image_decoder.context_resampler."
"""Where the assembled model keeps the two modules that this table speaks of."""

DROPPED = (
    r"visual_tokenizer\.encoder\.vision_model\.(embeddings\.position_ids|post_layernorm\.(weight|bias))"
    r"|mm_decoder\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
"""Released tensors without a counterpart: a counting index, CLIP's final norm, which the model never applies, and
the rotary frequencies that older libraries stored in every layer (checkpoints may carry or lack any)."""


def _qformer_rules(released: str, ours: str) -> list[Rule]:
    """Rules of one Q-Former behind the given prefixes."""
    layer = "encoder.layer.{i}."
    rules = [("queries", "queries"), ("blip2qformer.layernorm.{leaf}", "former.layernorm.{leaf}")]
    for block in ("attention", "crossattention"):
        inner = f"{layer}{block}."
        rules += [
            (f"blip2qformer.{inner}attention.q_norm.{{leaf}}", f"former.{inner}attention.query.norm.{{leaf}}"),
            (f"blip2qformer.{inner}attention.k_norm.{{leaf}}", f"former.{inner}attention.key.norm.{{leaf}}"),
            (f"blip2qformer.{inner}attention.value.{{leaf}}", f"former.{inner}attention.value.{{leaf}}"),
            (f"blip2qformer.{inner}output.{{rest}}", f"former.{inner}output.{{rest}}"),
        ]
    for block in ("intermediate_query", "output_query"):
        rules.append((f"blip2qformer.{layer}{block}.{{rest}}", f"former.{layer}{block}.{{rest}}"))
    return [(released + a, ours + b) for a, b in rules]


def _projection_rules(released: str, ours: str, *, normed: bool) -> list[Rule]:
    """Query and key projections, which sit one level deeper in ours where a per-head norm follows them."""
    deeper = ".linear" if normed else ""
    inner = "encoder.layer.{i}."
    return [
        (
            f"{released}blip2qformer.{inner}{block}.attention.{name}.{{leaf}}",
            f"{ours}former.{inner}{block}.attention.{name}{deeper}.{{leaf}}",
        )
        for block in ("attention", "crossattention")
        for name in ("query", "key")
    ]


def _extractor_rules(released: str, ours: str) -> list[Rule]:
    """Rules of one extractor."""
    return [
        *_attention_rules(released, ours),
        (f"{released}ffn_norm.{{leaf}}", f"{ours}ffn_norm.{{leaf}}"),
        (f"{released}ffn.fc1.{{leaf}}", f"{ours}ffn.expand.{{leaf}}"),
        (f"{released}ffn.dwconv.dwconv.{{leaf}}", f"{ours}ffn.depthwise.{{leaf}}"),
        (f"{released}ffn.fc2.{{leaf}}", f"{ours}ffn.project.{{leaf}}"),
    ]


def _attention_rules(released: str, ours: str) -> list[Rule]:
    """Deformable attention and its two norms, the same in injectors and extractors."""
    pairs = (
        ("query_norm", "query_norm"),
        ("feat_norm", "feature_norm"),
        ("attn.sampling_offsets", "attention.offsets"),
        ("attn.attention_weights", "attention.weights"),
        ("attn.value_proj", "attention.value"),
        ("attn.output_proj", "attention.output"),
    )
    return [(f"{released}{a}.{{leaf}}", f"{ours}{b}.{{leaf}}") for a, b in pairs]


def _vision_rules() -> list[Rule]:
    clip = "visual_tokenizer.encoder.vision_model."
    trunk, adapter = f"{VISUAL_TOKENIZER}trunk.", f"{VISUAL_TOKENIZER}adapter."
    block, ours_block = f"{clip}adapter_interactions.{{i}}.", f"{adapter}interactions.{{i}}."
    return [
        ("visual_tokenizer.clip_mean", f"{VISUAL_TOKENIZER}clip_mean"),
        ("visual_tokenizer.clip_std", f"{VISUAL_TOKENIZER}clip_std"),
        ("visual_tokenizer.pos_embed", f"{VISUAL_TOKENIZER}positions"),
        ("visual_tokenizer.pos_proj.{leaf}", f"{VISUAL_TOKENIZER}project_in.{{leaf}}"),
        ("visual_tokenizer.pos_ln.{leaf}", f"{VISUAL_TOKENIZER}norm_in.{{leaf}}"),
        ("visual_tokenizer.post_ln.{leaf}", f"{VISUAL_TOKENIZER}norm_out.{{leaf}}"),
        ("visual_tokenizer.proj.{leaf}", f"{VISUAL_TOKENIZER}project_out.{{leaf}}"),
        (f"{clip}embeddings.class_embedding", f"{trunk}class_embedding"),
        (f"{clip}embeddings.patch_embedding.weight", f"{trunk}patch_embedding.weight"),
        (f"{clip}embeddings.position_embedding.weight", f"{trunk}position_embedding"),
        (f"{clip}pre_layrnorm.{{leaf}}", f"{trunk}pre_norm.{{leaf}}"),
        (f"{clip}encoder.layers.{{i}}.{{rest}}", f"{trunk}layers.{{i}}.{{rest}}"),
        (f"{clip}adapter_level_embed", f"{adapter}level_embed"),
        (f"{clip}adapter_up.{{leaf}}", f"{adapter}up.{{leaf}}"),
        (f"{clip}adapter_spm.stem.{{i}}.{{leaf}}", f"{adapter}prior.stem.{{i}}.{{leaf}}"),
        *[(f"{clip}adapter_spm.conv{n + 2}.{{rest}}", f"{adapter}prior.stages.{n}.{{rest}}") for n in range(3)],
        *[(f"{clip}adapter_spm.fc{n + 1}.{{leaf}}", f"{adapter}prior.project.{n}.{{leaf}}") for n in range(4)],
        (f"{block}injector.gamma", f"{ours_block}injector.gamma"),
        *_attention_rules(f"{block}injector.", f"{ours_block}injector."),
        *_extractor_rules(f"{block}extractor.", f"{ours_block}extractor."),
        *_extractor_rules(f"{block}extra_extractors.{{j}}.", f"{ours_block}extra_extractors.{{j}}."),
    ]


_VISUAL_QFORMER = ("visual_tokenizer.perceiver_resampler.", f"{VISUAL_TOKENIZER}resampler.")
_CONTEXT_QFORMER = ("image_decoder.perceiver_resampler.", CONTEXT_RESAMPLER)

OFFICIAL_NAMES: list[Rule] = [
    *_vision_rules(),
    *_qformer_rules(*_VISUAL_QFORMER),
    *_projection_rules(*_VISUAL_QFORMER, normed=True),
    *_qformer_rules(*_CONTEXT_QFORMER),
    *_projection_rules(*_CONTEXT_QFORMER, normed=False),
]

_PLACEHOLDERS = {"i": r"(?P<i>\d+)", "j": r"(?P<j>\d+)", "leaf": r"(?P<leaf>weight|bias)", "rest": r"(?P<rest>.+)"}


def template_pattern(template: str) -> re.Pattern[str]:
    """Regular expression that matches the whole of a name written by ``template``."""
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(_PLACEHOLDERS[p] if n % 2 else re.escape(p) for n, p in enumerate(pieces)))


@cache
def _compiled(side: int) -> list[tuple[re.Pattern[str], str]]:
    return [(template_pattern(rule[side]), rule[1 - side]) for rule in OFFICIAL_NAMES]


def _translate(name: str, side: int) -> str | None:
    for pattern, template in _compiled(side):
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict())
    return None


def is_dropped(released: str) -> bool:
    """Whether a released tensor is left out on purpose."""
    return re.fullmatch(DROPPED, released) is not None


def to_ours(released: str) -> str | None:
    """Our name of a released tensor, ``None`` for one that this table does not know."""
    return _translate(released, 0)


def to_official(ours: str) -> str | None:
    """Released name of one of our tensors, ``None`` for one that this table does not know."""
    return _translate(ours, 1)
