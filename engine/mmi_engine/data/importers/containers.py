"""Files that hold pictures inside: webdataset tars and parquet tables; and the plain sources, folders and tables.

Place in the flow: readers of `mmi data import webdataset`, `parquet`, `folder`, `csv` and `text`. Pictures are
unpacked into ``images/``. A tar's sample is a row: its picture, its ``.txt`` as captions, its ``.json`` as fields it
knows and ``meta``. A parquet row's columns are fields; columns ``texts`` and ``images`` of equal length with nulls
(OBELICS) become a chat in that order. Dropped: ``no_image``, ``image_unreadable``, ``bad_row``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mmi_engine.data.importers.base import Drop, Sink
from mmi_engine.data.manifest import Manifest
from mmi_engine.errors import ManifestError, UsageError

PICTURES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
FIELDS = ("question", "answers", "expression", "box", "prompt", "captions", "caption")


def read_plain(sink: Sink) -> Iterator[dict[str, Any]]:
    """A folder of pictures, a CSV or TSV, or a text file of prompts, as the commands read them directly."""
    column = "image" if sink.source.is_dir() else "prompt"
    for row in Manifest(sink.source, column=column).rows():
        if row.error is not None:
            sink.drop(row.error.code)
            continue
        try:
            named: dict[str, Any] = {
                key: sink.image(row.data[key]) for key in ("image", "segmentation") if key in row.data
            }
            if isinstance(row.data.get("images"), list):
                named["images"] = [sink.image(name) for name in row.data["images"]]
        except Drop as drop:
            sink.drop(drop.reason)
            continue
        yield {"id": row.id, **{key: value for key, value in row.data.items() if key != "id"}, **named}


def read_webdataset(sink: Sink) -> Iterator[dict[str, Any]]:
    """A tar, or a folder of tars in order of name."""
    try:
        import webdataset
    except ImportError:
        raise UsageError("tars need webdataset, which is not installed", remedy="pip install 'mmi[data]'") from None
    tars = sorted(sink.source.glob("*.tar")) if sink.source.is_dir() else [sink.source]
    if not tars:
        raise ManifestError(f"{sink.source} holds no .tar", remedy="name a tar or a folder of them")
    urls = [str(path) for path in tars]
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        try:
            yield _sample(sink, sample)
        except Drop as drop:
            sink.drop(drop.reason)


def _sample(sink: Sink, sample: dict[str, Any]) -> dict[str, Any]:
    name = str(sample["__key__"])
    content = next((sample[key] for key in PICTURES if key in sample), None)
    if content is None:
        raise Drop("no_image")
    row: dict[str, Any] = {"id": name, "image": sink.save(name, content)}
    if "txt" in sample:
        row["captions"] = [sample["txt"].decode("utf-8", "replace").strip()]
    if "json" in sample:
        try:
            data = json.loads(sample["json"])
        except ValueError:
            raise Drop("bad_row") from None
        if isinstance(data, dict):
            row |= {key: data[key] for key in FIELDS if key in data}
            rest = {key: value for key, value in data.items() if key not in FIELDS}
            row |= {"meta": rest} if rest else {}
    return row


def read_parquet(sink: Sink) -> Iterator[dict[str, Any]]:
    """A file, or a folder of them in order of name; read in batches."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("parquet needs pyarrow, which is not installed", remedy="pip install 'mmi[data]'") from None
    paths = sorted(sink.source.glob("*.parquet")) if sink.source.is_dir() else [sink.source]
    number = 0
    for path in paths:
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise ManifestError(f'"{path}" is no parquet file: {error}') from error
        for batch in file.iter_batches(batch_size=64):
            for data in batch.to_pylist():
                number += 1
                try:
                    yield _record(sink, data, number)
                except Drop as drop:
                    sink.drop(drop.reason)


def _record(sink: Sink, data: dict[str, Any], number: int) -> dict[str, Any]:
    name = str(data["id"]) if data.get("id") not in (None, "") else f"{number:06d}"
    texts, images = data.get("texts"), data.get("images")
    if isinstance(texts, list) and isinstance(images, list):
        return {"id": name, "messages": [{"role": "user", "content": _document(sink, name, texts, images)}]}
    row: dict[str, Any] = {"id": name}
    for key, value in data.items():
        if key == "image":
            row["image"] = _unpacked(sink, name, value)
        elif key in FIELDS and value is not None:
            row[key] = value
        elif key == "text" and isinstance(value, str):
            row["captions"] = [value]
    if len(row) == 1:
        raise Drop("bad_row")
    return row


def _document(sink: Sink, name: str, texts: list[Any], images: list[Any]) -> list[dict[str, Any]]:
    """Parallel lists in which each place holds a text or a picture."""
    if len(texts) != len(images):
        raise Drop("texts_do_not_match")
    content: list[dict[str, Any]] = []
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if image is not None:
            content.append({"type": "image", "image": _unpacked(sink, name, image, place)})
        if text:
            content.append({"type": "text", "text": str(text)})
    if not content:
        raise Drop("bad_row")
    return content


def _unpacked(sink: Sink, name: str, value: Any, number: int | None = None) -> str:
    """A picture's bytes, saved; or the path or address that stands in its place."""
    if isinstance(value, dict):  # as the Hugging Face hub stores pictures
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return sink.save(name, value, number)
    return sink.image(value)
