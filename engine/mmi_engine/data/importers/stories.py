"""Stories: VIST (story in sequence, nested or flattened) and the HDF5 files of the AR-LDM tools; one row per story.

Place in the flow: readers of `mmi data import vist` and `story-h5`. With ``--given N`` the first N pictures are given
and the others are null, to be generated; ``meta.images`` then names all of them. Dropped: ``not_five`` (a VIST story
without five pictures), ``texts_do_not_match``, ``image_not_found``, ``image_unreadable``, ``bad_row``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmi_engine.data.importers.base import Drop, Sink
from mmi_engine.data.importers.jsonstream import items
from mmi_engine.errors import ManifestError, UsageError

FRAMES = 5
STRIP = 128  # px; PororoSV keeps several frames of a scene below one another


def read_vist(sink: Sink) -> Iterator[dict[str, Any]]:
    """``annotations`` of SIS: lists of one object each, or the objects themselves."""
    stories: dict[str, list[dict[str, Any]]] = {}
    for key, entry in items(sink.source):
        if key not in ("annotations", ""):
            continue
        if isinstance(entry, list) and len(entry) == 1:
            entry = entry[0]
        if not isinstance(entry, dict) or "story_id" not in entry:
            sink.drop("bad_row")
            continue
        stories.setdefault(str(entry["story_id"]), []).append(entry)
    for name, parts in stories.items():
        parts.sort(key=_place)
        try:
            if len(parts) != FRAMES:
                raise Drop("not_five")
            texts = [part.get("original_text") or part.get("text") for part in parts]
            images = [sink.find_image(str(part.get("photo_flickr_id"))) for part in parts]
            if not all(isinstance(text, str) and text.strip() for text in texts):
                raise Drop("texts_do_not_match")
        except Drop as drop:
            sink.drop(drop.reason)
            continue
        yield story_row(sink, name, [str(text).strip() for text in texts], images, {})


def _place(part: dict[str, Any]) -> int:
    value = part.get("worker_arranged_photo_order", 0)
    return int(value) if str(value).isdigit() else 0


def read_story_h5(sink: Sink) -> Iterator[dict[str, Any]]:
    """Groups by split with ``image0`` … ``image4`` (encoded pictures) and ``text`` (joined by ``|``)."""
    try:
        import h5py
    except ImportError:
        raise UsageError("HDF5 needs h5py, which is not installed", remedy="pip install 'mmi[data]'") from None
    try:
        file = h5py.File(sink.source, "r")
    except OSError as error:
        raise ManifestError(f'"{sink.source}" is no HDF5 file: {error}') from error
    with file:
        groups = {name: group for name, group in file.items() if isinstance(group, h5py.Group)} or {"": file}
        for split, group in groups.items():
            if not sink.wanted(split or None):
                continue
            if "text" not in group or "image0" not in group:
                raise ManifestError(f'"{sink.source}" has no text and image0 in {split or "its root"}')
            for index in range(len(group["text"])):
                name = f"{split}-{index:06d}" if split else f"{index:06d}"
                try:
                    yield _h5_story(sink, name, group, index, split)
                except Drop as drop:
                    sink.drop(drop.reason)


def _h5_story(sink: Sink, name: str, group: Any, index: int, split: str) -> dict[str, Any]:
    raw = group["text"][index]
    texts = [
        text.strip() for text in (raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)).split("|")
    ]
    count = sum(f"image{number}" in group for number in range(FRAMES))
    if len(texts) != count:
        raise Drop("texts_do_not_match")
    pictures = [first_of_strip(bytes(group[f"image{number}"][index])) for number in range(count)]
    images = [sink.save_picture(name, picture, number) for number, picture in enumerate(pictures)]
    return story_row(sink, name, texts, images, {"split": split} if split else {})


def first_of_strip(content: bytes) -> Any:
    """The first frame of an encoded picture; raises Drop (`image_unreadable`)."""
    from mmi_engine.data.images import decode
    from mmi_engine.errors import ImageError

    try:
        picture = decode(content, "the picture")
    except ImageError:
        raise Drop("image_unreadable") from None
    if picture.width == STRIP and picture.height > STRIP and picture.height % STRIP == 0:
        return picture.crop((0, 0, STRIP, STRIP))
    return picture


def story_row(sink: Sink, name: str, texts: list[str], images: list[str], meta: dict[str, Any]) -> dict[str, Any]:
    given = sink.options.given
    frames: list[dict[str, Any]] = [
        {"text": text, "image": image if given is None or number < given else None}
        for number, (text, image) in enumerate(zip(texts, images, strict=True))
    ]
    if given is not None:
        meta = {**meta, "images": images}
    return {"id": name, "frames": frames, **({"meta": meta} if meta else {})}
