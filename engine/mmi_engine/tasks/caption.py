"""`mmi caption`: a picture (or several) → a sentence, or a description in detail.

Place in the flow: `{image}` and a prompt of `prompts.py` go in, one text comes out. A row holds ``image`` or
``images``, perhaps ``shots`` (solved examples: ``image``, ``caption``), or ``messages`` (a chat, taken as it is).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import Row
from mmi_engine.pieces import Piece
from mmi_engine.tasks.base import Job, Output, Panel, last_text
from mmi_engine.tasks.fields import (
    image_references,
    in_part,
    load_images,
    objects,
    picture_panels,
    pictures_of,
    text_field,
)
from mmi_engine.tasks.prompts import CAPTION_PROMPTS, Template
from mmi_engine.tasks.story import chat_pieces

STYLES, FORMS = ("short", "long"), ("zero-shot", "tuned")


class CaptionTask:
    """See module.

    Args:
        style: ``short`` or ``long``.
        form: ``zero-shot`` or ``tuned``: the prompt before or after fine-tuning.
        template: one's own prompt with ``{image}``, in place of both.
    """

    name = "caption"
    makes_images = False
    keeps_inputs = True
    column: str | None = "image"

    def __init__(self, style: str = "short", form: str = "zero-shot", template: str | None = None) -> None:
        self.template = Template.parse(template or CAPTION_PROMPTS[style, form], ("image",))
        self.decoding = f"caption {style}"
        self.settings = {"style": style, "template": self.template.text}

    def read(self, row: Row, loader: ImageLoader) -> Job:
        """See `Task.read`."""
        if row.data.get("messages") is not None:
            return Job(row, [*chat_pieces(row.data["messages"], loader), Piece("text")])
        references = image_references(row.data)
        shots = [
            in_part(
                f"shot {number}", "bad_shots", lambda shot=shot: (image_references(shot), text_field(shot, "caption"))
            )
            for number, shot in enumerate(objects(row.data, "shots", "bad_shots"))
        ]
        pieces: list[Piece] = []
        for images, caption in shots:
            pieces += [*self.template.build({"image": load_images(images, loader)}), Piece("text", caption)]
        examples = pictures_of(pieces)
        pieces += self.template.build({"image": load_images(references, loader)})
        own = pictures_of(pieces)[len(examples) :]
        return Job(row, [*pieces, Piece("text")], shown=(*own, *examples))

    def output(self, job: Job, filled: Sequence[Piece], stem: str, image_size: int) -> Output:
        """See `Task.output`."""
        return Output({"caption": last_text(job, filled)})

    def panels(self, result: dict[str, Any], data: dict[str, Any], inputs: Sequence[str]) -> list[Panel]:
        """The pictures, the caption under the last of the row's own; solved examples behind."""
        return picture_panels(data, inputs, ((result["caption"], True),))
