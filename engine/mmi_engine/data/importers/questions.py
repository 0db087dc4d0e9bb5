"""Questions: VQAv2 and OK-VQA (questions and annotations apart), TextVQA, VizWiz; one row per question.

Place in the flow: reader of `mmi data import vqa`. VizWiz has no question ids: its pictures' names serve. Dropped:
``no_question``, ``no_answers`` (only where answers are there for others), ``image_not_found``, ``bad_row``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from mmi_engine.data.importers.base import Drop, Sink
from mmi_engine.data.importers.jsonstream import items


def read_vqa(sink: Sink) -> Iterator[dict[str, Any]]:
    """All three forms; ``--annotations`` names the answers of VQAv2 and OK-VQA."""
    answers = _answers(sink) if sink.options.annotations is not None else None
    waiting: list[dict[str, Any]] = []
    subtype: str | None = None
    for key, entry in items(sink.source):
        if key == "data_subtype" and isinstance(entry, str):
            subtype = entry
        elif key in ("questions", "data", "") and isinstance(entry, dict):
            if key == "questions" and subtype is None:
                waiting.append(entry)  # the name of the pictures may stand behind the questions
            else:
                yield from _row(sink, entry, subtype, answers)
    for entry in waiting:
        yield from _row(sink, entry, subtype, answers)


def _answers(sink: Sink) -> dict[Any, dict[str, Any]]:
    """question id → answers and kinds."""
    found: dict[Any, dict[str, Any]] = {}
    assert sink.options.annotations is not None
    for key, entry in items(sink.options.annotations):
        if key in ("annotations", "") and isinstance(entry, dict) and "question_id" in entry:
            kinds = {name: entry[name] for name in ("question_type", "answer_type") if name in entry}
            found[entry["question_id"]] = {"answers": _texts(entry.get("answers")), "meta": kinds}
    return found


def _texts(answers: Any) -> list[str]:
    """Answers as texts, whichever way a data set wraps them."""
    listed = answers if isinstance(answers, list) else []
    texts = [one.get("answer") if isinstance(one, dict) else one for one in listed]
    return [text for text in texts if isinstance(text, str)]


def _row(
    sink: Sink, entry: dict[str, Any], subtype: str | None, answers: dict[Any, dict[str, Any]] | None
) -> Iterator[dict[str, Any]]:
    try:
        yield _question(sink, entry, subtype, answers)
    except Drop as drop:
        sink.drop(drop.reason)


def _question(
    sink: Sink, entry: dict[str, Any], subtype: str | None, answers: dict[Any, dict[str, Any]] | None
) -> dict[str, Any]:
    question, identity = entry.get("question"), entry.get("question_id")
    if not isinstance(question, str) or not question.strip():
        raise Drop("no_question")
    if isinstance(entry.get("image"), str):  # VizWiz
        image = sink.image(entry["image"])
        identity = PurePosixPath(entry["image"]).stem if identity is None else identity
    elif entry.get("image_id") is None:
        raise Drop("bad_image")
    elif subtype is not None:
        image = sink.image(f"COCO_{subtype}_{int(entry['image_id']):012d}.jpg")
    else:
        image = sink.find_image(str(entry["image_id"]))
    if identity is None:
        raise Drop("bad_row")
    row: dict[str, Any] = {"id": str(identity), "image": image, "question": question.strip()}
    if answers is not None:
        if identity not in answers or not answers[identity]["answers"]:
            raise Drop("no_answers")
        return {**row, **{name: value for name, value in answers[identity].items() if value}}
    own = _texts(entry.get("answers"))
    if own:
        row["answers"] = own
    meta = {name: entry[name] for name in ("answerable", "answer_type") if name in entry}
    return {**row, "meta": meta} if meta else row
