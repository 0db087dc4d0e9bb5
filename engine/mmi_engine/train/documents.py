"""Manifest rows → training documents: texts and pictures in order, what carries loss, how a coin falls.

Place in the flow: ``packing.py`` reads a row, this module makes a :class:`Draft` of it, ``collate.py`` loads its
pictures. Prompts are those that the commands use (``mmi_engine.tasks.prompts``), so that what is trained is what is
asked later. A coin that mirrors a picture is thrown here, where boxes and the words left and right follow it.
Source: paper Table 17 and appendix B; data rules of docs/training.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mmi_engine.data.manifest import Row
from mmi_engine.errors import RowError
from mmi_engine.sequence import Piece
from mmi_engine.tasks import prompts
from mmi_engine.tasks.base import Piece as PromptPiece
from mmi_engine.tasks.fields import image_references, objects, optional_text, text_field, text_list
from mmi_engine.train.sections import SetConfig

_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left"}
BOX_ROOM = "(000,000)(000,000)"
"""As long as any box: what planning counts before the picture's size is known."""


@dataclass(frozen=True)
class View:
    """A picture of a document: its reference, whether it is a semantic map, and how it becomes a square."""

    reference: Any
    kind: Literal["picture", "map"] = "picture"
    fit: Literal["crop", "squeeze"] = "crop"


@dataclass
class Draft:
    """One document before its pictures are loaded.

    Attributes:
        pieces: texts, and pictures as :class:`View`.
        silent: per piece, whether its tokens carry no text loss (the user's words).
        drawn: per picture, whether the model has to draw it.
        flip: all pictures are mirrored.
        box: left, top, right, bottom in pixels of the only picture; its text stands in the last piece.
    """

    pieces: list[Piece] = field(default_factory=list)
    silent: list[bool] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)
    flip: bool = False
    box: tuple[float, float, float, float] | None = None

    def text(self, value: str, *, silent: bool = False) -> None:
        """Append a text."""
        self.pieces.append(Piece("text", mirrored_words(value) if self.flip else value))
        self.silent.append(silent)

    def picture(self, view: View, *, drawn: bool) -> None:
        """Append a picture; to open one that the model draws is its own word."""
        self.pieces.append(Piece("image", view))
        self.silent.append(not drawn)
        self.drawn.append(drawn)

    def prompt(self, template: str, values: dict[str, Any], **views: list[View]) -> None:
        """Append a prompt; nothing of it carries loss."""
        parsed = prompts.Template.parse(template, [*values, *views])
        pictures = {name: [PromptPiece("image", view) for view in listed] for name, listed in views.items()}
        for piece in parsed.build({**values, **pictures}):
            if piece.kind == "image":
                self.picture(piece.value, drawn=False)
            else:
                self.text(piece.value, silent=True)


@dataclass(frozen=True)
class Choices:
    """What documents depend on besides row and set: the model's family, how often pictures come first, flipping."""

    family: str = prompts.RELEASED
    image_first: float = 0.5
    flip: bool = False


Maker = Callable[[dict[str, Any], SetConfig, Choices, np.random.Generator, Draft], None]


def draft(row: Row, entry: SetConfig, choices: Choices, rng: np.random.Generator) -> Draft:
    """The row as a document.

    Args:
        row: of a manifest; entry: the set it belongs to, with its rules.
        choices: see :class:`Choices`; rng: of this row and epoch.

    Raises:
        RowError: the row is broken or a rule drops it; its ``code`` is what is counted.
    """
    if row.error is not None:
        raise row.error
    kind = entry.kind if entry.kind != "auto" else kind_of(row.data)
    document = Draft(flip=choices.flip and bool(rng.random() < 0.5))
    MAKERS[kind](row.data, entry, choices, rng, document)
    return document


def kind_of(data: dict[str, Any]) -> str:
    """What a row is, by its fields.

    Raises:
        RowError: by none of them (``bad_row``).
    """
    for fields, kind in (
        (("frames",), "story"),
        (("messages",), "chat"),
        (("segmentation",), "seg2img"),
        (("expression",), "ground"),
        (("question",), "vqa"),
        (("captions",), "caption"),
        (("caption",), "caption"),
        (("prompt",), "t2i"),
    ):
        if all(data.get(name) is not None for name in fields):
            return kind
    raise RowError("no field says what the row is for", remedy='write "captions", "question", … or name the kind')


def mirrored_words(text: str) -> str:
    """Left and right exchanged, case kept: ``Leftmost`` → ``Rightmost``."""

    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = _OTHER[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDES.sub(other, text)


def box_text(box: tuple[float, float, float, float], width: int, height: int, *, flip: bool) -> str:
    """``(x1,y1)(x2,y2)`` in thousandths of width and height, three digits each, 000 to 999."""
    x1, y1, x2, y2 = box[0] / width, box[1] / height, box[2] / width, box[3] / height
    if flip:
        x1, x2 = 1 - x2, 1 - x1
    a, b, c, d = (min(999, max(0, round(value * 1000))) for value in (x1, y1, x2, y2))
    return f"({a:03d},{b:03d})({c:03d},{d:03d})"


# ---------------------------------------------------------------------------- kinds


def _views(data: dict[str, Any]) -> list[View]:
    return [View(reference) for reference in image_references(data)]


def _target(data: dict[str, Any]) -> View:
    """The picture to be drawn: ``image``, or ``meta.image`` where the row is a question to a command."""
    meta = data.get("meta")
    reference = data.get("image") or (meta.get("image") if isinstance(meta, dict) else None)
    if reference is None:
        raise RowError("the row has no picture to learn from", remedy='add "image"', code="no_image")
    return View(reference)


def _one_caption(data: dict[str, Any], rng: np.random.Generator) -> str:
    listed = text_list(data, "captions", "bad_row") or [text_field(data, "caption")]
    return listed[int(rng.integers(len(listed)))]


def _caption(data: dict[str, Any], entry: SetConfig, choices: Choices, rng: np.random.Generator, to: Draft) -> None:
    to.prompt(entry.prompt or prompts.CAPTION_PROMPTS["short", "tuned"], {}, image=_views(data))
    to.text(_one_caption(data, rng))


def _vqa(data: dict[str, Any], entry: SetConfig, choices: Choices, rng: np.random.Generator, to: Draft) -> None:
    """One of the answers, each as likely as people gave it; solved examples and histories are not learnt from."""
    answers = text_list(data, "answers", "bad_row") or [text_field(data, "answer")]
    template = entry.prompt or prompts.vqa_prompt("short", choices.family)
    to.prompt(template, {"question": text_field(data, "question")}, image=_views(data))
    to.text(answers[int(rng.integers(len(answers)))])


def _ground(data: dict[str, Any], entry: SetConfig, choices: Choices, rng: np.random.Generator, to: Draft) -> None:
    views = _views(data)
    if len(views) != 1:
        raise RowError(f"one image is looked at, found {len(views)}", code="bad_row")
    box = data.get("box")
    numbers = isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)
    if not numbers or not (box[0] < box[2] and box[1] < box[3]):
        raise RowError('"box" must hold left, top, right, bottom in pixels', code="bad_box")
    to.box = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    form = "question" if choices.family == prompts.TOON else "released"
    template = entry.prompt or prompts.GROUND_PROMPTS[form]
    expression = text_field(data, "expression")
    to.prompt(template, {"expression": expression}, image=[View(views[0].reference, fit="squeeze")])
    to.text(BOX_ROOM + ("</box>" if template.rstrip().endswith("<box>") else ""))


def _t2i(data: dict[str, Any], entry: SetConfig, choices: Choices, rng: np.random.Generator, to: Draft) -> None:
    to.text(optional_text(data, "prompt") or _one_caption(data, rng))
    to.picture(_target(data), drawn=True)


def _pair(data: dict[str, Any], entry: SetConfig, choices: Choices, rng: np.random.Generator, to: Draft) -> None:
    """Caption and picture in either order."""
    caption = optional_text(data, "prompt") or _one_caption(data, rng)
    if len(caption) < entry.min_caption:
        raise RowError(f"the caption has {len(caption)} characters", code="short_caption")
    caption = caption.lower() if entry.lower else caption
    first = rng.random() < choices.image_first
    if first:
        to.picture(_target(data), drawn=True)
    to.text(caption)
    if not first:
        to.picture(_target(data), drawn=True)


def _seg2img(data: dict[str, Any], entry: SetConfig, choices: Choices, rng: np.random.Generator, to: Draft) -> None:
    if data.get("segmentation") is None:
        raise RowError('the row has no "segmentation"', code="no_segmentation")
    template = entry.prompt or prompts.SEG2IMG_PROMPT
    to.prompt(template, {"prompt": text_field(data, "prompt")}, segmentation=[View(data["segmentation"], "map")])
    to.silent = [piece.kind == "image" for piece in to.pieces]  # the caption belongs to what is learnt, as in `t2i`
    to.picture(_target(data), drawn=True)


def _story(data: dict[str, Any], entry: SetConfig, choices: Choices, rng: np.random.Generator, to: Draft) -> None:
    """All texts and pictures in order; pictures that a command would draw are taken from ``meta.images``."""
    frames = objects(data, "frames", "bad_frames")
    if not frames:
        raise RowError("the story has no frames", code="no_frames")
    meta = data.get("meta")
    known = meta.get("images") if isinstance(meta, dict) else None
    for number, frame in enumerate(frames):
        reference = frame.get("image") or (known[number] if isinstance(known, list) and number < len(known) else None)
        if reference is None:
            raise RowError(f"frame {number} has no picture to learn from", code="no_image")
        if text := optional_text(frame, "text"):
            to.text(text)
        to.picture(View(reference), drawn=True)


def _parts(data: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(role, part) of all messages in order; empty texts are left out."""
    found: list[tuple[str, dict[str, Any]]] = []
    for message in objects(data, "messages", "bad_messages"):
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if not isinstance(message.get("role"), str) or not isinstance(parts, list):
            raise RowError("a message needs a role and a content", code="bad_messages")
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image_url":
                url = part.get("image_url")
                part = {**part, "type": "image", "image": url.get("url") if isinstance(url, dict) else url}
            elif kind not in ("text", "image"):
                raise RowError("a message holds a part that is no text and no image", code="bad_messages")
            if part["type"] == "image" or str(part.get("text") or "").strip():
                found.append((message["role"], part))
    return found


def _chat(data: dict[str, Any], entry: SetConfig, choices: Choices, rng: np.random.Generator, to: Draft) -> None:
    """The assistant's words carry loss and its pictures are drawn; a chat that nobody answers is dropped."""
    for role, part in _parts(data):
        own = role == "assistant"
        if part["type"] == "image":
            to.picture(View(part.get("image")), drawn=own)
        else:
            to.text(str(part["text"]).strip(), silent=not own)
    if all(to.silent) and not any(to.drawn):
        raise RowError("the chat holds no answer to learn", code="no_answers")


def _document(data: dict[str, Any], entry: SetConfig, choices: Choices, rng: np.random.Generator, to: Draft) -> None:
    """Interleaved text and pictures under the set's rules; a picture belongs to the text behind it in the row and
    comes before or after it by a coin."""
    waiting: list[View] = []
    kept = 0
    late = False

    def place() -> None:
        for view in waiting:
            to.picture(view, drawn=True)
        waiting.clear()

    for _, part in _parts(data):
        if part["type"] == "image":
            similarity = part.get("similarity")
            low = isinstance(similarity, int | float) and similarity < entry.min_similarity
            if low or (entry.max_images and kept >= entry.max_images):
                continue
            if not waiting:
                late = rng.random() >= choices.image_first
            waiting.append(View(part.get("image")))
            kept += 1
            continue
        if not late:
            place()
        to.text(str(part["text"]).strip())
        place()
    place()
    if entry.drop_imageless and not kept:
        raise RowError("no picture is left of the document", code="no_images_left")
    if kept == 1 and rng.random() < entry.drop_single:
        raise RowError("a document with a single picture", code="single_image")


MAKERS: dict[str, Maker] = {
    "caption": _caption,
    "vqa": _vqa,
    "ground": _ground,
    "t2i": _t2i,
    "pair": _pair,
    "seg2img": _seg2img,
    "story": _story,
    "chat": _chat,
    "document": _document,
}
