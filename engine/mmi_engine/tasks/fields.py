"""Reading the fields of manifest rows, each with its stable error code.

Place in the flow: the tasks beside this file check a row's structure in full through these functions before the first
picture is loaded. Codes: ``no_image``, ``no_question``, ``no_expression``, ``no_prompt``, ``no_segmentation`` for what
is missing or empty, ``bad_row`` for a wrong type, ``bad_options``, ``bad_shots``, ``bad_history`` for broken lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import json_type
from mmi_engine.errors import RowError
from mmi_engine.pieces import Piece
from mmi_engine.tasks.base import MAX_PIECES, Panel


def text_field(data: dict[str, Any], name: str, *, default: str | None = None) -> str:
    """A text that the row must have.

    Args:
        data: the row, or a part of it.
        name: the field.
        default: taken where the row has none.

    Raises:
        RowError: missing or empty (`no_NAME`), no string (`bad_row`).
    """
    value = data.get(name)
    if value is None:
        value = default
    if value is None:
        raise RowError(f'the row has no "{name}"', remedy=f'add "{name}": "…"', code=f"no_{name}")
    if not isinstance(value, str):
        raise RowError(f'"{name}" must be a string, found {json_type(value)}', remedy="quote it", code="bad_row")
    if not value.strip():
        raise RowError(f'"{name}" is empty', remedy="give it a text, or leave the row out", code=f"no_{name}")
    return value.strip()


def optional_text(data: dict[str, Any], name: str) -> str | None:
    """A text that the row may have; None when it is missing, null or blank."""
    if data.get(name) is None:
        return None
    value = data[name]
    if not isinstance(value, str):
        raise RowError(f'"{name}" must be a string, found {json_type(value)}', remedy="quote it", code="bad_row")
    return value.strip() or None


def image_references(data: dict[str, Any]) -> list[Any]:
    """The row's pictures: ``image``, ``images``, or both in this order.

    Raises:
        RowError: none at all (`no_image`), no list (`bad_row`), or too many.
    """
    references = [] if data.get("image") is None else [data["image"]]
    more = data.get("images")
    if more is not None:
        if not isinstance(more, list):
            raise RowError(f'"images" must be a list, found {json_type(more)}', code="bad_row")
        references += more
    if not references:
        raise RowError('the row has no "image"', remedy='add "image": "path"', code="no_image")
    if len(references) > MAX_PIECES:
        raise RowError(f"{len(references)} images are more than {MAX_PIECES}", remedy="split the row", code="bad_row")
    return references


def load_images(references: Sequence[Any], loader: ImageLoader) -> list[Piece]:
    """The pictures as pieces; raises ImageError."""
    return [Piece("image", loader.load(reference)) for reference in references]


def text_list(data: dict[str, Any], name: str, code: str) -> list[str] | None:
    """A list of non-empty strings, or None when the row has none."""
    value = data.get(name)
    if value is None:
        return None
    good = isinstance(value, list) and value and all(isinstance(entry, str) and entry.strip() for entry in value)
    if not good:
        raise RowError(f'"{name}" must be a list of texts, none of them empty', code=code)
    return [entry.strip() for entry in value]


def objects(data: dict[str, Any], name: str, code: str) -> list[dict[str, Any]]:
    """A list of objects; [] when the row has none."""
    value = data.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise RowError(f'"{name}" must be a list of objects', code=code)
    if len(value) > MAX_PIECES:
        raise RowError(f"{len(value)} entries in {name!r} are more than {MAX_PIECES}", code=code)
    return value


def pictures_of(pieces: Sequence[Piece]) -> tuple[Any, ...]:
    """The given pictures among the pieces, in order."""
    return tuple(piece.value for piece in pieces if piece.kind == "image" and piece.value is not None)


def picture_panels(data: dict[str, Any], inputs: Sequence[str], texts: tuple[tuple[str, bool], ...]) -> list[Panel]:
    """The row's own pictures with the texts under the last of them, then those of solved examples.

    Args:
        data: the manifest row.
        inputs: small copies, the row's own first.
        texts: (text, whether the model made it).
    """
    chat = data.get("messages") is not None
    own = len(inputs) if chat else (data.get("image") is not None) + len(data.get("images") or ())
    shown, examples = inputs[:own], inputs[own:]
    panels = [Panel(name) for name in shown[:-1]]
    panels.append(Panel(shown[-1] if shown else None, texts=texts))
    return [*panels, *(Panel(name, tag="solved example") for name in examples)]


def in_part(part: str, code: str, read: Callable[[], Any]) -> Any:
    """Runs `read` and names the part of the row in its errors, under the part's own code."""
    try:
        return read()
    except RowError as error:
        raise RowError(f"{part}: {error.message}", remedy=error.remedy, code=code) from None
