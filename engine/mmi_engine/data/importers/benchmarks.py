"""Benchmarks with forms of their own: VisDial, Image2Paragraph, Localized Narratives (LN-COCO), GQA, and the released
project's own lists.

Place in the flow: readers of `mmi data import visdial`, `paragraph`, `narratives`, `gqa`, `released`.
VisDial 1.0: every round that can be ranked is a row; relevance from the dense annotations (--annotations).
Image2Paragraph: the paragraphs' JSON, a split by ``--annotations`` (a JSON list of picture numbers).
LN-COCO: JSON lines of ``image_id`` and ``caption``. GQA: an object of questions by id.
Released: ``annt.json`` lists and pair lists, whose lines are JSON or the text of a Python literal.
Dropped: ``bad_row``, ``no_question``, ``no_answers``, ``no_caption``, ``bad_image``, ``image_not_found``.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

from mmi_engine.data.importers.base import Drop, Sink
from mmi_engine.data.importers.boxes import BOX, EXPRESSION, IMAGE
from mmi_engine.data.importers.jsonstream import items
from mmi_engine.errors import ManifestError

VISDIAL_PICTURES = ("VisualDialog_val2018_{:012d}", "COCO_train2014_{:012d}", "COCO_val2014_{:012d}")


def read_visdial(sink: Sink) -> Iterator[dict[str, Any]]:
    """``data`` with ``questions``, ``answers`` and ``dialogs`` of numbers into them."""
    try:
        content = json.loads(sink.source.read_bytes())
        data = content["data"]
        questions, answers, dialogs = data["questions"], data["answers"], data["dialogs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(
            f"{sink.source.name} is no VisDial file: {error}", remedy="name visdial_1.0_*.json"
        ) from error
    dense = _dense(sink)
    for dialog in dialogs:
        try:
            rows = list(_dialog(sink, dialog, questions, answers, dense))
        except Drop as drop:
            sink.drop(drop.reason)
            continue
        except (KeyError, IndexError, TypeError):
            sink.drop("bad_row")
            continue
        yield from rows


def _dense(sink: Sink) -> dict[tuple[int, int], list[float]]:
    """(picture, round from 1) → relevance of every option."""
    if sink.options.annotations is None:
        return {}
    found = {}
    for _, entry in items(sink.options.annotations):
        if isinstance(entry, dict) and "round_id" in entry:
            values = entry.get("gt_relevance", entry.get("relevance"))
            if isinstance(values, list):
                found[entry["image_id"], entry["round_id"]] = [float(value) for value in values]
    return found


def _dialog(
    sink: Sink,
    dialog: dict[str, Any],
    questions: list[str],
    answers: list[str],
    dense: dict[tuple[int, int], list[float]],
) -> Iterator[dict[str, Any]]:
    picture = int(dialog["image_id"])
    image = None
    for pattern in VISDIAL_PICTURES:
        try:
            image = sink.find_image(pattern.format(picture))
            break
        except Drop:
            continue
    if image is None:
        raise Drop("image_not_found")
    history: list[dict[str, str]] = []
    for number, turn in enumerate(dialog["dialog"], 1):
        question = questions[turn["question"]]
        wanted = not dense or (picture, number) in dense
        if "answer_options" in turn and wanted:
            row: dict[str, Any] = {"id": f"{picture}-{number}", "image": image, "caption": dialog["caption"]}
            row |= {"history": list(history), "question": question}
            row["options"] = [answers[option] for option in turn["answer_options"]]
            if (picture, number) in dense:
                row["relevance"] = dense[picture, number]
            if "gt_index" in turn:
                row["meta"] = {"gt_index": turn["gt_index"]}
            yield row
        if "answer" in turn:
            history.append({"question": question, "answer": answers[turn["answer"]]})


def read_paragraph(sink: Sink) -> Iterator[dict[str, Any]]:
    """``[{"image_id", "paragraph", …}]``; pictures of Visual Genome, ``NUMBER.jpg``."""
    chosen = None
    if sink.options.annotations is not None:
        chosen = {str(entry) for _, entry in items(sink.options.annotations)}
    for _, entry in items(sink.source):
        try:
            if not isinstance(entry, dict) or entry.get("image_id") is None:
                raise Drop("bad_row")
            name = str(entry["image_id"])
            if chosen is not None and name not in chosen:
                continue
            yield {
                "id": name,
                "image": sink.find_image(name),
                "captions": [_text(entry.get("paragraph"), "no_caption")],
            }
        except Drop as drop:
            sink.drop(drop.reason)


def read_narratives(sink: Sink) -> Iterator[dict[str, Any]]:
    """Localized Narratives as rows of `mmi t2i`: the narrative is the prompt, the COCO picture the reference."""
    for _, entry in items(sink.source):
        try:
            if not isinstance(entry, dict) or entry.get("image_id") is None:
                raise Drop("bad_row")
            number, annotator = str(entry["image_id"]), entry.get("annotator_id")
            stem = f"{int(number):012d}" if number.isdigit() else number
            name = f"{number}-{annotator}" if annotator is not None else number
            yield {"id": name, "prompt": _text(entry.get("caption"), "no_caption"), "image": sink.find_image(stem)}
        except Drop as drop:
            sink.drop(drop.reason)


def read_gqa(sink: Sink) -> Iterator[dict[str, Any]]:
    """An object: question id → ``question``, ``imageId``, ``answer`` (absent in the test splits)."""
    for name, entry in items(sink.source):
        try:
            if not isinstance(entry, dict) or entry.get("imageId") is None:
                raise Drop("bad_row")
            row = {"id": name, "image": sink.find_image(str(entry["imageId"]))}
            row["question"] = _text(entry.get("question"), "no_question")
            if entry.get("answer") is not None:
                row["answers"] = [_text(entry["answer"], "no_answers")]  # type: ignore[assignment]
            yield row
        except Drop as drop:
            sink.drop(drop.reason)


def read_released(sink: Sink) -> Iterator[dict[str, Any]]:
    """``annt.json`` or a list of pairs of the released project; what a row is goes by the fields it has."""
    good = 0
    for number, entry in enumerate(_entries(sink), 1):
        try:
            if not isinstance(entry, dict):
                raise Drop("bad_row")
            row = _released(sink, entry, number)
        except Drop as drop:
            sink.drop(drop.reason)
            continue
        good += 1
        yield row
    if not good:
        raise ManifestError(f'"{sink.source}" holds no usable row', remedy="name annt.json or a list of pairs")


def _entries(sink: Sink) -> Iterator[Any]:
    """Items of a JSON document, else of lines that are JSON or Python literals; None for what is neither."""
    try:
        text = sink.source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f'"{sink.source}" cannot be read: {error}') from error
    try:
        whole = json.loads(text)
        listed = whole if isinstance(whole, list) else whole.get("annotations", [whole])
        yield from listed
        return
    except ValueError:
        pass
    for line in text.splitlines():
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError:
            try:
                yield ast.literal_eval(line.strip())  # builds plain values only; it runs nothing
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                yield None


def _released(sink: Sink, entry: dict[str, Any], number: int) -> dict[str, Any]:
    name = next((entry[key] for key in ("id", "question_id", "image_id", "key") if entry.get(key) is not None), None)
    row: dict[str, Any] = {"id": str(name) if name is not None else f"{number:06d}"}
    image = next((entry[key] for key in (*IMAGE, "target", "jpg") if entry.get(key) is not None), None)
    mapped = next((entry[key] for key in ("source", "segmentation", "seg_path") if entry.get(key) is not None), None)
    if image is None:
        raise Drop("bad_image")
    row["image"] = sink.image(image)
    expression = next((entry[key] for key in EXPRESSION if entry.get(key) is not None), None)
    box = next((entry[key] for key in BOX if entry.get(key) is not None), None)
    text = next((entry[key] for key in ("prompt", "caption", "txt", "text") if entry.get(key) is not None), None)
    if mapped is not None:
        return {**row, "segmentation": sink.image(mapped), "prompt": _text(text, "no_caption")}
    if isinstance(entry.get("question"), str):
        given = entry.get("answers", entry.get("answer"))
        answers = [given] if isinstance(given, str) else [value for value in given or [] if isinstance(value, str)]
        if not answers:
            raise Drop("no_answers")
        return {**row, "question": entry["question"].strip(), "answers": answers}
    if box is not None and isinstance(expression, str):
        from mmi_engine.data.importers.boxes import xyxy

        return {**row, "expression": expression.strip(), "box": xyxy(box, sink.options.boxes or "xyxy")}
    captions = entry.get("captions")
    if isinstance(captions, list):
        return {**row, "captions": [_text(caption, "no_caption") for caption in captions]}
    return {**row, "captions": [_text(text, "no_caption")]}


def _text(value: Any, reason: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Drop(reason)
    return value.strip()
