"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg as published, or JSON lines; one row per expression.

Place in the flow: reader of `mmi data import refcoco`. Published form: a folder with ``instances.json`` (COCO boxes,
xywh) and the references, ``refs*.json`` or the pickle ``refs(…).p``, which is opened only with --trust-pickle. JSON
lines hold picture, expression and box; their boxes are xyxy unless --boxes xywh. Boxes come out as xyxy pixels.
Dropped: ``no_expression``, ``no_box``, ``bad_box``, ``image_not_found``, ``bad_row``.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmi_engine.data.importers.base import Drop, Sink
from mmi_engine.data.importers.jsonstream import items
from mmi_engine.errors import ManifestError, UsageError

IMAGE = ("image", "img_path", "image_path", "file_name", "img_name")
EXPRESSION = ("expression", "sentence", "sent", "phrase", "caption")
BOX = ("box", "bbox")


def read_refcoco(sink: Sink) -> Iterator[dict[str, Any]]:
    """A folder is the published form, a file is JSON lines."""
    yield from _published(sink) if sink.source.is_dir() else _lines(sink)


def _published(sink: Sink) -> Iterator[dict[str, Any]]:
    boxes: dict[Any, Any] = {}
    names: dict[Any, Any] = {}
    for key, entry in items(sink.source / "instances.json"):
        if key == "annotations" and isinstance(entry, dict):
            boxes[entry.get("id")] = entry.get("bbox")
        elif key == "images" and isinstance(entry, dict):
            names[entry.get("id")] = entry.get("file_name")
    for reference in _references(sink):
        if not isinstance(reference, dict) or not sink.wanted(reference.get("split")):
            continue
        for sentence in reference.get("sentences") or [{}]:
            try:
                if reference.get("ann_id") not in boxes:
                    raise Drop("no_box")
                text = sentence.get("sent") or sentence.get("raw")
                row = {
                    "id": str(sentence.get("sent_id", reference.get("ref_id"))),
                    "image": sink.image(names.get(reference.get("image_id"))),
                    "expression": _expression(text),
                    "box": xyxy(boxes[reference["ann_id"]], sink.options.boxes or "xywh"),
                    "meta": {"split": reference.get("split")},
                }
            except Drop as drop:
                sink.drop(drop.reason)
                continue
            yield row


def _references(sink: Sink) -> Iterator[Any]:
    """The references file of a published folder."""
    plain = sorted(sink.source.glob("refs*.json"))
    pickled = sorted(sink.source.glob("refs*.p"))
    named = sink.options.annotations
    path: Path | None = named or next(iter(plain), next(iter(pickled), None))
    if path is None:
        raise ManifestError(f"{sink.source} holds no refs*.json and no refs*.p", remedy="name it with --annotations")
    if path.suffix == ".json":
        yield from (entry for _, entry in items(path))
        return
    if not sink.options.trust_pickle:
        raise UsageError(
            f"{path.name} is a pickle, and opening one may run any code in it",
            remedy="pass --trust-pickle if you trust where it comes from",
        )
    try:
        yield from pickle.loads(path.read_bytes(), encoding="latin-1")
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError) as error:
        raise ManifestError(f"{path.name} cannot be unpickled: {error}", remedy="download it again") from error


def _lines(sink: Sink) -> Iterator[dict[str, Any]]:
    for number, (_, entry) in enumerate(items(sink.source), 1):
        try:
            if not isinstance(entry, dict):
                raise Drop("bad_row")
            if not sink.wanted(entry.get("split")):
                continue
            row: dict[str, Any] = {
                "id": str(entry.get("id", f"{number:06d}")),
                "image": sink.image(_first(entry, IMAGE)),
                "expression": _expression(_first(entry, EXPRESSION)),
                "box": xyxy(_first(entry, BOX), sink.options.boxes or "xyxy"),
            }
        except Drop as drop:
            sink.drop(drop.reason)
            continue
        yield row


def _first(entry: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _expression(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise Drop("no_expression")
    return text.strip()


def xyxy(box: Any, form: str) -> list[float]:
    """Four numbers as left, top, right, bottom."""
    if isinstance(box, str):
        try:
            box = json.loads(box)
        except ValueError:
            raise Drop("bad_box") from None
    if box is None:
        raise Drop("no_box")
    numbers = isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)
    if not numbers:
        raise Drop("bad_box")
    x1, y1, x2, y2 = (box[0], box[1], box[0] + box[2], box[1] + box[3]) if form == "xywh" else box
    if x2 <= x1 or y2 <= y1:
        raise Drop("bad_box")
    return [x1, y1, x2, y2]
