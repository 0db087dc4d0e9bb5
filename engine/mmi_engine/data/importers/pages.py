"""Documents of the web and maps: MMC4 (JSON lines, also inside zips) and ADE20K (PNG of class numbers).

Place in the flow: readers of `mmi data import mmc4` and `ade20k`. An MMC4 document becomes one message: every picture
stands before the sentence it was matched with and carries its ``similarity``; how many are kept and on which side they
come is decided when training reads the row. Its pictures are files named in ``image_name`` below --images.
ADE20K: ``annotations/SPLIT/NAME.png`` beside ``images/SPLIT/NAME.jpg``, 0 is unlabelled; captions from --annotations
(JSON lines of ``image`` and ``caption``), else the name of the scene from ``sceneCategories.txt``.
Dropped: ``bad_row``, ``no_caption``, ``image_not_found``. Of MMC4 a picture that is missing is left out of its document
(``picture_left_out``), and the document stays.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmi_engine.data.importers.base import Drop, Sink
from mmi_engine.data.importers.jsonstream import items
from mmi_engine.errors import ManifestError

SCENES = "sceneCategories.txt"


def read_mmc4(sink: Sink) -> Iterator[dict[str, Any]]:
    """A ``.jsonl``, a ``.jsonl.zip``, or a folder of them in order of name."""
    found = (
        sorted([*sink.source.glob("*.jsonl"), *sink.source.glob("*.zip")]) if sink.source.is_dir() else [sink.source]
    )
    if not found:
        raise ManifestError(f"{sink.source} holds no .jsonl and no .zip", remedy="name a file of MMC4 or a folder")
    number = good = 0
    for path in found:
        for line in _lines(path):
            number += 1
            if not line.strip():
                continue
            try:
                row = _page(sink, line, f"{path.name.split('.')[0]}-{number:08d}")
            except Drop as drop:
                sink.drop(drop.reason)
                continue
            good += 1
            yield row
    if not good:
        raise ManifestError(f'"{sink.source}" holds no document of MMC4', remedy="name a file of documents")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as stream:
                yield from stream
            return
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith((".jsonl", ".json")):
                    with archive.open(name) as stream:
                        yield from io.BufferedReader(stream)  # type: ignore[type-var]
    except (OSError, zipfile.BadZipFile) as error:
        raise ManifestError(f'"{path}" cannot be read: {error}', remedy="download it again") from error


def _page(sink: Sink, line: bytes, name: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError:
        raise Drop("bad_row") from None
    texts = data.get("text_list") if isinstance(data, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Drop("bad_row")
    placed: dict[int, list[dict[str, Any]]] = {}
    for picture in data.get("image_info") or []:
        try:
            index, part = _matched(sink, picture, len(texts))
        except Drop:
            sink.drop("picture_left_out")
            continue
        placed.setdefault(index, []).append(part)
    content: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        content += placed.get(number, [])
        if text.strip():
            content.append({"type": "text", "text": text.strip()})
    if not content:
        raise Drop("bad_row")
    meta = {"url": data["url"]} if isinstance(data.get("url"), str) else {}
    row = {"id": name, "messages": [{"role": "user", "content": content}]}
    return {**row, "meta": meta} if meta else row


def _matched(sink: Sink, picture: Any, sentences: int) -> tuple[int, dict[str, Any]]:
    """Sentence that a picture belongs to, and the picture as a part of the message."""
    if not isinstance(picture, dict):
        raise Drop("bad_row")
    index, similarity = picture.get("matched_text_index"), picture.get("matched_sim")
    if type(index) is not int or not 0 <= index < sentences:
        raise Drop("bad_row")
    part: dict[str, Any] = {"type": "image", "image": sink.image(picture.get("image_name"))}
    if isinstance(similarity, int | float) and not isinstance(similarity, bool):
        part["similarity"] = float(similarity)
    return index, part


def read_ade20k(sink: Sink) -> Iterator[dict[str, Any]]:
    """The folder ``ADEChallengeData2016``; ``--split`` is ``training`` or ``validation``."""
    root = sink.source
    captions = _captions(sink)
    scenes = _scenes(root / SCENES)
    places = sorted(path for path in (root / "annotations").glob("*") if path.is_dir())
    if not places:
        raise ManifestError(f"{root} holds no annotations/SPLIT", remedy="name the folder ADEChallengeData2016")
    sink.folder = sink.options.images or root
    for place in places:
        if not sink.wanted(place.name):
            continue
        for path in sorted(place.glob("*.png")):
            try:
                prompt = captions.get(path.stem) or scenes.get(path.stem)
                if prompt is None:
                    raise Drop("no_caption")
                row = {
                    "id": path.stem,
                    "segmentation": sink.image(str(path.absolute())),
                    "prompt": prompt,
                    "image": sink.find_image(f"images/{place.name}/{path.stem}"),
                    "meta": {"split": place.name},
                }
            except Drop as drop:
                sink.drop(drop.reason)
                continue
            yield row


def _captions(sink: Sink) -> dict[str, str]:
    """Picture's name without suffix → its generated caption."""
    if sink.options.annotations is None:
        return {}
    found = {}
    for _, entry in items(sink.options.annotations):
        if isinstance(entry, dict) and isinstance(entry.get("image"), str):
            text = entry.get("caption") or next(iter(entry.get("captions") or []), None)
            if isinstance(text, str) and text.strip():
                found[Path(entry["image"]).stem] = text.strip()
    return found


def _scenes(path: Path) -> dict[str, str]:
    """Picture's name → ``a bedroom``; lines of ``NAME scene_name``."""
    if not path.is_file():
        return {}
    pairs = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return {pair[0]: pair[1].strip().replace("_", " ") for pair in pairs if len(pair) == 2}
