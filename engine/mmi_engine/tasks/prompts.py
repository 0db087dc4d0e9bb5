"""Prompts and decoding defaults of every task, and templates that turn a row's fields into pieces.

Place in the flow: the tasks beside this file ask for a `Template` and fill it with a row's texts and pictures; the
engine asks for `decoding` below the command line. Two families of models are told apart: ``released`` (the prompts
and lengths of the paper and its evaluation scripts) and ``toon`` (the embedded model: the same prompts, lengths that
fit its short texts). Source: paper Table 17; docs/caption.md, docs/vqa.md, docs/ground.md.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmi_engine.errors import RowError, UsageError
from mmi_engine.pieces import Piece

TOON, RELEASED = "toon", "released"

_VQA = "Based on the image, please answer the question. {image}{question}"
_GROUND = "Provide the bounding box coordinate of the region this sentence describes"

CAPTION_PROMPTS = {
    ("short", "zero-shot"): "{image} a photo of",
    ("short", "tuned"): "{image} Provide a one-sentence caption for the provided image.",
    ("long", "zero-shot"): "{image} Please describe the image in detail. The image depicts",
    ("long", "tuned"): "{image} Please describe the image in detail.",
}
VQA_PROMPTS = {
    "long": _VQA + " Please provide an accurate answer within one word. The answer is:",
    "short": _VQA + ". The answer is:",
    "vizwiz": _VQA + " When the provided information is insufficient, respond with 'Unanswerable'."
    " Please provide an accurate answer within one word. The answer is:",
}
GROUND_PROMPTS = {
    "question": "{image}Question: " + _GROUND + ": {expression}, Answer:",
    "released": "{image}" + _GROUND + ". {expression}<box>",
}
T2I_PROMPT = "{prompt}"
SEG2IMG_PROMPT = "{segmentation}{prompt}"
DIALOGUE_HEAD, DIALOGUE_CAPTION, DIALOGUE_ROUND = "{image}", "caption: {caption}", "question: {question}? answer:"

# The embedded model was trained on the short form without a full stop after the question.
TOON_SHORT_VQA = _VQA + " The answer is:"

# min_new_tokens leaves out the opening <s> that the released min_length counts.
DECODING: dict[str, dict[str, Any]] = {
    "caption short": {"beams": 5, "max_new_tokens": 20, "min_new_tokens": 7},
    "caption long": {"beams": 5, "max_new_tokens": 90, "min_new_tokens": 89, "repetition_penalty": 1.2},
    "vqa": {"beams": 3, "max_new_tokens": 10, "length_penalty": 0.0},
    "ground": {"max_new_tokens": 32},
    "story": {
        "temperature": 1.0,
        "top_p": 0.9,
        "max_new_tokens": 90,
        "min_new_tokens": 8,
        "repetition_penalty": 1.3,
    },
    "t2i": {},
    "seg2img": {},
}
TOON_DECODING: dict[str, dict[str, Any]] = {
    **DECODING,
    "caption short": {"beams": 5, "max_new_tokens": 48},
    "caption long": {"beams": 5, "max_new_tokens": 96},
    "story": {
        "min_new_tokens": 4
    },  # a text that was asked for has words, though the model may think of a picture first
}


def decoding(key: str, family: str) -> dict[str, Any]:
    """Fields of `generate.settings.Settings` that a task sets below the command line.

    Args:
        key: of `DECODING`.
        family: ``toon`` or ``released``.
    """
    return dict((TOON_DECODING if family == TOON else DECODING)[key])


def vqa_prompt(form: str, family: str) -> str:
    """The question prompt of a form (``long``, ``short``, ``vizwiz``)."""
    return TOON_SHORT_VQA if (form, family) == ("short", TOON) else VQA_PROMPTS[form]


@dataclass(frozen=True)
class Template:
    """A prompt with fields in braces; ``{image}`` stands for all pictures of the row, in order.

    Attributes:
        text: as the user wrote it.
        parts: (literal text before, field name or None) in order.
    """

    text: str
    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str, fields: Sequence[str]) -> Template:
        """A template that may use `fields`; ``{{`` and ``}}`` are plain braces.

        Raises:
            UsageError: unbalanced braces, an unknown field, or none at all.
        """
        try:
            parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(text)]
        except ValueError as error:
            raise UsageError(
                f"template {text!r}: {error}", remedy="write {image} for a field, {{ for a brace"
            ) from None
        used = [name for _, name in parts if name is not None]
        unknown = [name for name in used if name not in fields]
        if unknown or not used:
            what = f"no field {{{unknown[0]}}}" if unknown else "it names no field"
            known = ", ".join(f"{{{name}}}" for name in fields)
            raise UsageError(f"template {text!r}: {what}", remedy=f"fields here: {known}")
        return cls(text, tuple(parts))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields it uses."""
        return tuple(name for _, name in self.parts if name is not None)

    def build(self, values: Mapping[str, str | Sequence[Piece]]) -> list[Piece]:
        """The prompt as pieces: neighbouring texts in one piece, pictures where their field stands.

        Args:
            values: field → text, or pieces.

        Raises:
            RowError: the row lacks a field (`bad_row`).
        """
        pieces: list[Piece] = []
        text = ""
        for literal, name in self.parts:
            text += literal
            if name is None:
                continue
            if name not in values:
                raise RowError(f'the template needs "{name}"', remedy=f"the template is {self.text!r}", code="bad_row")
            value = values[name]
            if isinstance(value, str):
                text += value
                continue
            if text.strip():
                pieces.append(Piece("text", text.strip()))
            text = ""
            pieces += value
        if text.strip():
            pieces.append(Piece("text", text.strip()))
        return pieces
