"""Captions: COCO annotation files (COCO, NoCaps) and Karpathy splits (COCO, Flickr30k), one row per picture.

Place in the flow: reader of `mmi data import coco`. The form is told by what the file holds. Karpathy files are read
picture by picture; COCO files keep captions and pictures apart, so captions are collected first. Dropped:
``no_caption``, ``image_not_found``, ``bad_row``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmi_engine.data.importers.base import Drop, Sink
from mmi_engine.data.importers.jsonstream import items


def read_coco(sink: Sink) -> Iterator[dict[str, Any]]:
    """``images`` with ``sentences`` (Karpathy), or ``images`` and ``annotations`` (COCO)."""
    captions: dict[Any, list[str]] = {}
    pictures: list[tuple[Any, Any]] = []
    for key, entry in items(sink.source):
        if key == "annotations" and isinstance(entry, dict) and isinstance(entry.get("caption"), str):
            captions.setdefault(entry.get("image_id"), []).append(entry["caption"].strip())
        elif key == "images" and isinstance(entry, dict) and "sentences" in entry:
            if sink.wanted(entry.get("split")):
                yield from _row(sink, _karpathy, entry)
        elif key == "images":
            entry = entry if isinstance(entry, dict) else {}
            pictures.append((entry.get("id"), entry.get("file_name")))
    for identity, name in pictures:
        yield from _row(sink, _coco, (identity, name, captions.get(identity, [])))


def _row(sink: Sink, make: Any, entry: Any) -> Iterator[dict[str, Any]]:
    try:
        yield make(sink, entry)
    except Drop as drop:
        sink.drop(drop.reason)


def _coco(sink: Sink, entry: tuple[Any, Any, list[str]]) -> dict[str, Any]:
    identity, name, captions = entry
    if identity is None:
        raise Drop("bad_row")
    if not captions:
        raise Drop("no_caption")
    return {"id": str(identity), "image": sink.image(name), "captions": captions}


def _karpathy(sink: Sink, entry: dict[str, Any]) -> dict[str, Any]:
    captions = [one["raw"].strip() for one in entry["sentences"] if isinstance(one, dict) and one.get("raw")]
    if not captions:
        raise Drop("no_caption")
    name = entry.get("filename")
    identity = next((entry[key] for key in ("cocoid", "imgid") if entry.get(key) is not None), name)
    if identity is None:
        raise Drop("bad_row")
    folder = entry.get("filepath")
    try:
        image = sink.image(f"{folder}/{name}" if folder and name else name)
    except Drop:
        image = sink.image(name)  # pictures are often kept in one folder
    return {"id": str(identity), "image": image, "captions": captions, "meta": {"split": entry.get("split")}}
