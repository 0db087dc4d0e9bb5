"""Training documents of the built-in world: one story or scene of the cache → the pieces of a task's document.

Between the cache's texts and :mod:`mmi_engine.train.data`, which packs documents into rows. A builder draws prompt,
question and wording from the generator it is given and reads no picture; a prompt's pieces are marked, since they carry
no loss. Source: paper Table 17 (prompts).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmi_engine.sequence import Piece
from mmi_engine.train.cache import FRAMES
from mmi_engine.train.quiz import quiz

SHORT_PROMPTS = ("a photo of", "Provide a one-sentence caption for the provided image.")
LONG_PROMPTS = (
    "Please describe the image in detail. The image depicts",
    "Please describe the image in detail.",
)
VQA_OPENING = "Based on the image, please answer the question."
VQA_CLOSINGS = (
    "Please provide an accurate answer within one word. The answer is:",
    "The answer is:",
)
GROUND_QUESTION = "Question: Provide the bounding box coordinate of the region this sentence describes: {}, Answer:"
GROUND_RELEASED = "Provide the bounding box coordinate of the region this sentence describes. {}<box>"
TURNS = 6
"""Most questions in a dialogue."""


@dataclass(frozen=True)
class Reference:
    """A picture of the cache: which array, story and frame; of kind ``blank`` a black one that fills a row."""

    kind: str
    story: int
    frame: int


@dataclass
class Document:
    """Pieces of one training document.

    Attributes:
        pieces: text and :class:`Reference` pieces in order.
        prompt: how many of them come from the user and carry no text loss.
        drawn: per image, whether the model has to draw it (image loss).
        asked: numbers of later pieces that come from the user, too.
    """

    name: str
    pieces: list[Piece]
    prompt: int
    drawn: list[bool]
    asked: frozenset[int] = frozenset()


Builder = Callable[[dict[str, Any], int, int, np.random.Generator], Document]


def _one(rng: np.random.Generator, options: list[Any] | tuple[Any, ...]) -> Any:
    return options[int(rng.integers(len(options)))]


def _picture(story: int, frame: int) -> Piece:
    return Piece("image", Reference("pictures", story, frame))


def story_document(texts: dict[str, Any], story: int, frame: int, rng: np.random.Generator) -> Document:
    """All texts and pictures of a story in order; every picture is drawn by the model."""
    pieces = []
    for number, text in enumerate(texts["texts"]):
        pieces += [Piece("text", text), _picture(story, number)]
    return Document(f"story:{story}", pieces, 0, [True] * FRAMES)


def caption_document(texts: dict[str, Any], story: int, frame: int, rng: np.random.Generator) -> Document:
    """``{image} a photo of {caption}``, the other short prompt, or one of the long ones with a detailed caption."""
    facts = texts["frames"][frame]
    short = rng.random() < 0.7
    prompt = _one(rng, SHORT_PROMPTS if short else LONG_PROMPTS)
    answer = _one(rng, facts["captions" if short else "details"])
    pieces = [_picture(story, frame), Piece("text", prompt), Piece("text", answer)]
    return Document(f"caption:{story}.{frame}", pieces, 2, [False])


def vqa_document(texts: dict[str, Any], story: int, frame: int, rng: np.random.Generator) -> Document:
    """``Based on the image, … {image}{question} … The answer is: {answer}``, the paper's long and short form."""
    question, answer = _one(rng, texts["frames"][frame]["questions"])
    asked = f"{question} {_one(rng, VQA_CLOSINGS)}"
    pieces = [Piece("text", VQA_OPENING), _picture(story, frame), Piece("text", asked), Piece("text", answer)]
    return Document(f"vqa:{story}.{frame}", pieces, 3, [False])


def _answered(name: str, picture: Piece, questions: list[Any], rng: np.random.Generator) -> Document:
    """One picture and several (question, answer) about it: the picture is encoded once for all of them."""
    pieces, asked = [Piece("text", VQA_OPENING), picture], []
    for question, answer in questions:
        asked.append(len(pieces))
        pieces += [Piece("text", f"{question} {_one(rng, VQA_CLOSINGS)}"), Piece("text", answer)]
    return Document(name, pieces, 2, [False], frozenset(asked))


def dialogue_document(texts: dict[str, Any], story: int, frame: int, rng: np.random.Generator) -> Document:
    """Three to ``TURNS`` of the world's questions about a picture."""
    questions = texts["frames"][frame]["questions"]
    chosen = rng.permutation(len(questions))[: int(rng.integers(3, TURNS + 1))]
    drawn = [questions[int(number)] for number in chosen]
    return _answered(f"dialogue:{story}.{frame}", _picture(story, frame), drawn, rng)


def quiz_document(texts: dict[str, Any], story: int, frame: int, rng: np.random.Generator) -> Document:
    """Short questions that the world does not keep, see :mod:`mmi_engine.train.quiz`."""
    drawn = quiz(texts["frames"][frame]["details"][0], random.Random(int(rng.integers(2**62))))
    return _answered(f"quiz:{story}.{frame}", _picture(story, frame), drawn, rng)


def ground_document(texts: dict[str, Any], story: int, frame: int, rng: np.random.Generator) -> Document:
    """``{image}Question: … {object}, Answer: (x1,y1)(x2,y2)``, or the form that the released checkpoints expect."""
    expression, box = _one(rng, texts["frames"][frame]["referring"])
    if rng.random() < 0.75:
        prompt, answer = GROUND_QUESTION.format(expression), box
    else:
        prompt, answer = GROUND_RELEASED.format(expression), f"{box}</box>"
    pieces = [_picture(story, frame), Piece("text", prompt), Piece("text", answer)]
    return Document(f"ground:{story}.{frame}", pieces, 2, [False])


def t2i_document(texts: dict[str, Any], story: int, frame: int, rng: np.random.Generator) -> Document:
    """A short or detailed caption, then the picture."""
    caption = _one(rng, texts["frames"][frame]["captions" if rng.random() < 0.5 else "details"])
    return Document(f"t2i:{story}.{frame}", [Piece("text", caption), _picture(story, frame)], 0, [True])


def seg2img_document(texts: dict[str, Any], story: int, frame: int, rng: np.random.Generator) -> Document:
    """``{segmentation}{caption}{image}``."""
    caption = _one(rng, texts["frames"][frame]["captions"])
    labels = Piece("image", Reference("maps", story, frame))
    return Document(
        f"seg2img:{story}.{frame}", [labels, Piece("text", caption), _picture(story, frame)], 0, [False, True]
    )


BUILDERS: dict[str, Builder] = {
    "story": story_document,
    "caption": caption_document,
    "vqa": vqa_document,
    "dialogue": dialogue_document,
    "quiz": quiz_document,
    "ground": ground_document,
    "t2i": t2i_document,
    "seg2img": seg2img_document,
}


def texts_before(pieces: list[Piece]) -> list[str]:
    """Per image of a document the text right before it; empty where there is none."""
    before = [Piece("image"), *pieces]
    return [str(a.value) if a.kind == "text" else "" for a, b in zip(before, pieces, strict=False) if b.kind == "image"]
