"""Raw story data as published: PororoSV (npy files) and FlintstonesSV (a pickle), one row per story of five frames.

Place in the flow: readers of `mmi data import pororo` and `flintstones`. Both need --trust-pickle: an object array of
numpy is a pickle too. PororoSV: a folder with ``descriptions.csv``/``descriptions.npy`` (picture → text),
``img_cache4.npy`` (first pictures), ``following_cache4.npy`` (the four behind each) and ``train_seen_unseen_ids.npy``
(train, validation and test numbers); pictures are strips of 128-px frames, of which the first is taken.
FlintstonesSV: a folder with ``flintstones_annotations_v1-0.json``, ``train-val-test_split.json``,
``following_cache4.pkl`` and ``video_frames_sampled/ID.npy``, whose middle frame is taken. Source: the readers of
StoryGAN, StoryDALL-E and AR-LDM.
Dropped: ``not_five``, ``texts_do_not_match``, ``image_not_found``, ``image_unreadable``, ``bad_row``.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmi_engine.data.importers.base import Drop, Sink
from mmi_engine.data.importers.stories import FRAMES, first_of_strip, story_row
from mmi_engine.errors import ManifestError, UsageError

BROKEN = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError, ValueError, OSError)
PORORO_SPLITS = ("train", "val", "test")  # the order of the arrays in train_seen_unseen_ids.npy


def read_pororo(sink: Sink) -> Iterator[dict[str, Any]]:
    """Stories of ``img_cache4.npy`` and ``following_cache4.npy``."""
    _trusted(sink, "PororoSV's npy files")
    first = _strings(_array(sink.source / "img_cache4.npy"))
    following = [_strings(row) for row in _array(sink.source / "following_cache4.npy")]
    texts = _array(sink.source / "descriptions.npy").item()
    numbers = _array(sink.source / "train_seen_unseen_ids.npy")
    for split, chosen in zip(PORORO_SPLITS, numbers, strict=False):
        if not sink.wanted(split):
            continue
        for number in chosen:
            name = f"{split}-{int(number):06d}"
            try:
                frames = [first[int(number)], *following[int(number)][: FRAMES - 1]]
                if len(frames) != FRAMES:
                    raise Drop("not_five")
                written = [_pororo_text(texts, frame) for frame in frames]
                pictures = [_strip(sink.folder / frame) for frame in frames]
                images = [sink.save_picture(name, picture, place) for place, picture in enumerate(pictures)]
            except IndexError:
                sink.drop("bad_row")
                continue
            except Drop as drop:
                sink.drop(drop.reason)
                continue
            yield story_row(sink, name, written, images, {"split": split})


def read_flintstones(sink: Sink) -> Iterator[dict[str, Any]]:
    """Stories of ``following_cache4.pkl``."""
    _trusted(sink, "FlintstonesSV's pickle")
    following = _unpickled(sink.source / "following_cache4.pkl")
    splits = json.loads(_bytes(sink.source / "train-val-test_split.json"))
    notes = json.loads(_bytes(sink.source / "flintstones_annotations_v1-0.json"))
    texts = {note.get("globalID"): note.get("description") for note in notes if isinstance(note, dict)}
    for split in PORORO_SPLITS:
        if not sink.wanted(split):
            continue
        for name in splits.get(split, []):
            try:
                if name not in following or len(following[name]) < FRAMES - 1:
                    raise Drop("not_five")
                frames = [name, *following[name][: FRAMES - 1]]
                written = [texts.get(frame) for frame in frames]
                if not all(isinstance(text, str) and text.strip() for text in written):
                    raise Drop("texts_do_not_match")
                pictures = [_middle(sink.folder / "video_frames_sampled" / f"{frame}.npy") for frame in frames]
                images = [sink.save_picture(name, picture, place) for place, picture in enumerate(pictures)]
            except Drop as drop:
                sink.drop(drop.reason)
                continue
            yield story_row(sink, name, [str(text).strip() for text in written], images, {"split": split})


def _trusted(sink: Sink, what: str) -> None:
    if not sink.options.trust_pickle:
        raise UsageError(
            f"{what} may run any code when opened", remedy="pass --trust-pickle if you trust where they come from"
        )


def _array(path: Path) -> Any:
    """An object array; raises ManifestError."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=True, encoding="latin1")
    except BROKEN as error:
        raise ManifestError(f'"{path}" cannot be read: {error}', remedy="download it again") from error


def _unpickled(path: Path) -> Any:
    try:
        return pickle.loads(_bytes(path), encoding="latin-1")
    except BROKEN as error:
        raise ManifestError(f'"{path}" cannot be unpickled: {error}', remedy="download it again") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ManifestError(
            f'"{path}" cannot be read: {error.strerror}', remedy="name the data set's folder"
        ) from error


def _strings(values: Any) -> list[str]:
    """Names of pictures, which old files hold as bytes, or as the text of bytes (``b'…'``)."""
    found = []
    for value in values:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
        found.append(text[2:-1] if text.startswith("b'") and text.endswith("'") else text)
    return found


def _pororo_text(texts: Any, frame: str) -> str:
    """The text of a picture; its name without suffix is the key, and the first of several texts serves."""
    value = texts.get(frame.rsplit(".", 1)[0]) if isinstance(texts, dict) else None
    value = value[0] if isinstance(value, list | tuple) and value else value
    if not isinstance(value, str) or not value.strip():
        raise Drop("texts_do_not_match")
    return value.strip()


def _strip(path: Path) -> Any:
    try:
        return first_of_strip(path.read_bytes())
    except OSError:
        raise Drop("image_not_found") from None


def _middle(path: Path) -> Any:
    """The middle frame of a video, ``[frames, h, w, 3]``."""
    import numpy as np
    from PIL import Image

    try:
        frames = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise Drop("image_not_found") from None
    except (ValueError, OSError, EOFError):
        raise Drop("image_unreadable") from None
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise Drop("image_unreadable")
    return Image.fromarray(frames[len(frames) // 2].astype(np.uint8))
