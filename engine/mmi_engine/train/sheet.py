"""A contact sheet of what the model makes of held-out documents while it trains.

Place in the flow: ``finetune.ManifestTask.preview``. Each document takes two lines of pictures (as they are; as the
model draws them) and its texts; what the model wrote or drew is framed or underlined in red. The same documents and
seeds every time, so that sheets of different steps can be laid beside one another.
"""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mmi_engine.data.images import ImageLoader, prepare
from mmi_engine.errors import ItemError
from mmi_engine.sequence import Piece
from mmi_engine.train.collate import Feed

DOCUMENTS, COLUMNS, TRIES = 4, 5, 40
SIDE, MARGIN, LINE = 128, 6, 13
TEXT_LINES, TEXT_WIDTH = 4, 110
MADE = (200, 30, 30)


def contact_sheet(model: Any, feed: Feed, steps: int) -> Image.Image:
    """The sheet as RGB.

    Args:
        model: in evaluation mode, with its tokenizer; feed: held-out rows; steps: of image sampling.
    """
    from mmi_engine.generate.interleave import fill
    from mmi_engine.generate.settings import Settings

    strips = []
    for number, pieces in enumerate(_documents(feed)):
        asked = _asked(pieces, draws=bool(feed.sizes.decoder))
        settings = Settings(steps=steps, max_new_tokens=48)
        try:
            made = fill(model, [asked], [number], settings, 1)[0]
        except (ItemError, FloatingPointError) as error:  # early in training: the sheet says so and training goes on
            made = [*pieces, Piece("text", f"[{error}]")]
            asked = [*pieces, Piece("text", None)]
        strips.append(_strip(pieces, asked, made))
    width = COLUMNS * (SIDE + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, max(1, sum(strip.height for strip in strips))), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _documents(feed: Feed) -> list[list[Piece]]:
    """The first held-out documents whose pictures can be read, texts marked as the user's by ``options``."""
    found: list[list[Piece]] = []
    for number in range(TRIES):
        stream, planned = feed.blend.row(number)
        try:
            _, document = stream.document(planned.slots[0].position)
            loader = ImageLoader(stream.index.root)
            pieces = []
            drawn = iter(document.drawn)
            for piece, silent in zip(document.pieces, document.silent, strict=True):
                if piece.kind == "image":
                    picture = prepare(feed.load(piece.value, loader), feed.sizes.encoder)
                    pieces.append(Piece("image", picture, options=() if next(drawn) else ("given",)))
                else:
                    pieces.append(Piece("text", piece.value, options=("given",) if silent else ()))
        except ItemError:
            continue
        found.append(pieces)
        if len(found) == DOCUMENTS:
            break
    return found


def _asked(pieces: list[Piece], *, draws: bool) -> list[Piece]:
    """The document with what is to be learnt taken out: answers behind a prompt, and pictures but the first piece's."""
    answers = any(piece.options for piece in pieces if piece.kind == "text")
    asked = []
    for place, piece in enumerate(pieces):
        context = place > 0 and (piece.kind == "text" or draws)
        story_start = piece.kind == "image" and sum(p.kind == "image" for p in pieces) > 2 and place <= 1
        wanted = piece.kind == "image" or (answers and place == len(pieces) - 1)
        missing = context and wanted and not piece.options and not story_start
        asked.append(Piece(piece.kind, None if missing else piece.value))
    return asked


def _strip(true: list[Piece], asked: list[Piece], made: list[Piece]) -> Image.Image:
    """One document: true pictures, drawn ones below where there are any, texts."""
    drew = any(piece.kind == "image" and piece.value is None for piece in asked)
    lines = 2 if drew else 1
    height = MARGIN + lines * (SIDE + MARGIN) + TEXT_LINES * LINE + MARGIN
    strip = Image.new("RGB", (COLUMNS * (SIDE + MARGIN) + MARGIN, height), "white")
    pen = ImageDraw.Draw(strip)
    column = 0
    for place, piece in enumerate(true):
        if piece.kind != "image" or column == COLUMNS:
            continue
        left = MARGIN + column * (SIDE + MARGIN)
        strip.paste(piece.value.resize((SIDE, SIDE)), (left, MARGIN))
        if drew:
            below = 2 * MARGIN + SIDE
            strip.paste(made[place].value.convert("RGB").resize((SIDE, SIDE)), (left, below))
            if asked[place].value is None:
                pen.rectangle((left - 2, below - 2, left + SIDE + 1, below + SIDE + 1), outline=MADE, width=2)
        column += 1
    _texts(pen, true, asked, made, MARGIN + lines * (SIDE + MARGIN))
    return strip


def _texts(pen: Any, true: list[Piece], asked: list[Piece], made: list[Piece], top: int) -> None:
    """The document's words, then what the model wrote and what it should have written."""
    font = ImageFont.load_default(11)
    given = " ".join(str(piece.value) for piece in asked if piece.kind == "text" and piece.value is not None)
    lines = [(line, (0, 0, 0)) for line in _wrapped(given)]
    for place, piece in enumerate(asked):
        if piece.kind == "text" and piece.value is None:
            right = f"   (true: {true[place].value})" if place < len(true) else ""
            lines.append((f"→ {made[place].value}{right}", MADE))
    for number, (line, colour) in enumerate([*lines[: TEXT_LINES - 1], *lines[TEXT_LINES - 1 :][-1:]]):
        pen.text((MARGIN, top + number * LINE), line[:TEXT_WIDTH], fill=colour, font=font)


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, TEXT_WIDTH)
