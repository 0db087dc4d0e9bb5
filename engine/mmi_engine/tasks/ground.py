"""`mmi ground`: a picture and an expression → the box of the one thing it describes, in pixels of the original.

Place in the flow: the model writes ``(x1,y1)(x2,y2)`` in thousandths of width and height, three digits each; this
file turns them into pixels. By default the whole picture is squeezed into the model's square, so that a box may lie
anywhere in it and thousandths of the square are thousandths of the picture; ``pad`` keeps its proportions on a grey
square, ``crop`` takes the centre square alone, and boxes are mapped back accordingly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import Row, shorten
from mmi_engine.errors import GenerationError, RowError
from mmi_engine.pieces import Piece
from mmi_engine.tasks.base import Job, Output, Panel, last_text
from mmi_engine.tasks.fields import image_references, text_field
from mmi_engine.tasks.prompts import GROUND_PROMPTS, RELEASED, TOON, Template

if TYPE_CHECKING:
    from PIL import Image

FORMS, FITS = ("auto", "question", "released"), ("squeeze", "pad", "crop")
LARGEST_SIDE = 1024  # of the square that is handed to the engine
GREY = (128, 128, 128)
LINE = (230, 40, 40)
_BOX = re.compile(r"\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)\s*,?\s*\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)")

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Seen:
    """What a job remembers: size of the original, and the part of it that the model's square shows."""

    width: int
    height: int
    frame: Box


class GroundTask:
    """See module.

    Args:
        form: ``question`` (paper), ``released`` (``<box>``), ``auto``: what fits the family.
        template: one's own prompt with ``{image}`` and ``{expression}``.
        fit: ``squeeze``, ``pad`` or ``crop``.
        draw: also write the picture with its box.
        expression: looked for in rows that have none.
        family: of the model.
    """

    name = "ground"
    keeps_inputs = True
    decoding = "ground"

    def __init__(
        self,
        form: str = "auto",
        template: str | None = None,
        fit: str = "squeeze",
        draw: bool = False,
        expression: str | None = None,
        family: str = RELEASED,
    ) -> None:
        chosen = form if form != "auto" else "question" if family == TOON else "released"
        self.template = Template.parse(template or GROUND_PROMPTS[chosen], ("image", "expression"))
        self.fit, self.draw, self.expression = fit, draw, expression
        self.makes_images = draw
        self.column = "image" if expression else None
        self.settings = {"template": self.template.text, "fit": fit, "draw": draw, "expression": expression}

    def read(self, row: Row, loader: ImageLoader) -> Job:
        """See `Task.read`."""
        references = image_references(row.data)
        if len(references) != 1:
            raise RowError(f"one image is looked at, found {len(references)}", remedy='use "image"', code="bad_row")
        expression = text_field(row.data, "expression", default=self.expression)
        picture = loader.load(references[0])
        square, frame = to_square(picture, self.fit)
        pieces = self.template.build({"image": [Piece("image", square)], "expression": expression})
        seen = Seen(picture.width, picture.height, frame)
        kept = (picture,) if self.draw else ()
        return Job(row, [*pieces, Piece("text")], note=seen, kept=kept, shown=(picture,))

    def output(self, job: Job, filled: Sequence[Piece], stem: str, image_size: int) -> Output:
        """See `Task.output`: ``box`` (xyxy pixels of the original), ``size`` of the original, and the drawn picture."""
        text, seen = last_text(job, filled), job.note
        thousandths = parse_box(text)
        if thousandths is None:
            raise GenerationError(
                f'the model wrote "{shorten(text, 40)}" where a box was expected',
                remedy="try another wording of the expression, or --form",
                code="no_box",
            )
        box = to_pixels(thousandths, seen)
        fields: dict[str, Any] = {"box": list(box), "size": [seen.width, seen.height]}
        if not job.kept:
            return Output(fields)
        return Output({**fields, "image": f"{stem}.png"}, {f"{stem}.png": draw_box(job.kept[0], box)})

    def panels(self, result: dict[str, Any], data: dict[str, Any], inputs: Sequence[str]) -> list[Panel]:
        """The picture with its box over it, the expression under it."""
        width, height = result["size"]
        x1, y1, x2, y2 = result["box"]
        expression = str(data.get("expression") or self.expression or "")
        numbers = f"({x1:g}, {y1:g}) – ({x2:g}, {y2:g})"
        texts = (*(((expression, False),) if expression else ()), (numbers, True))
        if "image" in result:
            return [Panel(result["image"], texts=texts, tag="box drawn by mmi")]
        if not inputs:
            return [Panel(texts=texts)]
        return [Panel(inputs[0], box=(x1 / width, y1 / height, x2 / width, y2 / height), texts=texts)]


def to_square(picture: Image.Image, fit: str) -> tuple[Image.Image, Box]:
    """The picture as a square, and which part of the original it shows, as left, top, right, bottom in pixels."""
    from PIL import Image

    width, height = picture.size
    if width == height:
        return picture, (0, 0, width, height)
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        frame = (left, top, left + side, top + side)
        return picture.crop(frame), frame
    side = min(max(width, height), LARGEST_SIDE)
    if fit == "squeeze":
        return picture.resize((side, side), Image.Resampling.BICUBIC), (0, 0, width, height)
    scale = side / max(width, height)
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = Image.new("RGB", (side, side), GREY)
    corner = ((side - small[0]) // 2, (side - small[1]) // 2)
    square.paste(picture.resize(small, Image.Resampling.BICUBIC), corner)
    left, top = -corner[0] * width / small[0], -corner[1] * height / small[1]
    return square, (left, top, left + side * width / small[0], top + side * height / small[1])


def parse_box(text: str) -> Box | None:
    """The first ``(x1,y1)(x2,y2)`` of a text, in thousandths with ordered corners; None when there is none."""
    match = _BOX.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = (float(value) for value in match.groups())
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def to_pixels(thousandths: Box, seen: Seen) -> Box:
    """Thousandths of the model's square as pixels of the original, within it."""
    left, top, right, bottom = seen.frame

    def place(value: float, start: float, end: float, limit: int) -> float:
        return round(min(max(start + value / 1000 * (end - start), 0.0), limit), 2)

    x1, y1, x2, y2 = thousandths
    return (
        place(x1, left, right, seen.width),
        place(y1, top, bottom, seen.height),
        place(x2, left, right, seen.width),
        place(y2, top, bottom, seen.height),
    )


def draw_box(picture: Image.Image, box: Box) -> Image.Image:
    """A copy with the box as a red line on a white one; line width follows the picture's size."""
    from PIL import ImageDraw

    drawn = picture.copy()
    pen = ImageDraw.Draw(drawn)
    x1, y1 = min(round(box[0]), drawn.width - 1), min(round(box[1]), drawn.height - 1)
    x2, y2 = max(x1, min(round(box[2]), drawn.width - 1)), max(y1, min(round(box[3]), drawn.height - 1))
    line = max(1, round(min(picture.size) / 100))
    pen.rectangle((x1, y1, x2, y2), outline=(255, 255, 255), width=line + 2)
    pen.rectangle((x1, y1, x2, y2), outline=LINE, width=line)
    return drawn
