"""Chats: rows of ``messages`` (OpenAI, Hugging Face) and LLaVA conversations, both as ``messages`` rows.

Place in the flow: readers of `mmi data import messages` and `llava`. Placement of pictures is kept: a part of a
message, or the ``<image>`` marks in LLaVA's texts, filled from the row's pictures in order. Text-only rows stay.
Dropped: ``bad_messages``, ``placeholder_mismatch`` (more marks than pictures), ``image_not_found``, ``no_turns``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmi_engine.data.importers.base import Drop, Sink
from mmi_engine.data.importers.jsonstream import items

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
MARK = "<image>"


def read_messages(sink: Sink) -> Iterator[dict[str, Any]]:
    """Rows that hold ``messages``; pictures named in them or in a list ``images`` beside them."""
    for number, (_, data) in enumerate(items(sink.source), 1):
        try:
            if not isinstance(data, dict) or not isinstance(data.get("messages"), list) or not data["messages"]:
                raise Drop("bad_messages")
            pictures = _listed(data)
            messages = [_message(message, pictures, sink) for message in data["messages"]]
            if pictures:
                raise Drop("placeholder_mismatch")
        except Drop as drop:
            sink.drop(drop.reason)
            continue
        yield {"id": _id(data, number), "messages": messages, **_meta(data)}


def read_llava(sink: Sink) -> Iterator[dict[str, Any]]:
    """LLaVA conversations: ``conversations`` of ``from`` and ``value``, ``image`` a name or a list."""
    for number, (_, data) in enumerate(items(sink.source), 1):
        try:
            if not isinstance(data, dict) or not isinstance(data.get("conversations"), list):
                raise Drop("bad_messages")
            if not data["conversations"]:
                raise Drop("no_turns")
            pictures = _listed(data)
            marks = sum(_text(turn, "value").count(MARK) for turn in data["conversations"])
            if marks > len(pictures):
                raise Drop("placeholder_mismatch")
            unmarked = [_image(pictures.pop(0), sink) for _ in range(len(pictures) - marks)]
            messages = [_turn(turn, pictures, sink) for turn in data["conversations"]]
            messages[0]["content"] = [*unmarked, *messages[0]["content"]]
        except Drop as drop:
            sink.drop(drop.reason)
            continue
        yield {"id": _id(data, number), "messages": messages, **_meta(data)}


def _id(data: dict[str, Any], number: int) -> str:
    value = data.get("id", data.get("custom_id"))
    return str(value) if isinstance(value, str | int) and str(value) else f"{number:06d}"


def _meta(data: dict[str, Any]) -> dict[str, Any]:
    return {"meta": data["meta"]} if data.get("meta") is not None else {}


def _listed(data: dict[str, Any]) -> list[Any]:
    """The pictures that stand beside the text."""
    found = []
    for key in ("image", "images"):
        value = data.get(key)
        found += value if isinstance(value, list) else [value] if value is not None else []
    return found


def _text(turn: Any, key: str) -> str:
    value = turn.get(key) if isinstance(turn, dict) else None
    if not isinstance(value, str):
        raise Drop("bad_messages")
    return value


def _image(name: Any, sink: Sink) -> dict[str, Any]:
    path = name.get("path") if isinstance(name, dict) else name
    return {"type": "image", "image": sink.image(path)}


def _turn(turn: Any, pictures: list[Any], sink: Sink) -> dict[str, Any]:
    """A LLaVA turn as a message: its text cut at the marks, pictures in between."""
    role = ROLES.get(_text(turn, "from"))
    if role is None:
        raise Drop("bad_messages")
    return {"role": role, "content": _cut(_text(turn, "value"), pictures, sink)}


def _cut(text: str, pictures: list[Any], sink: Sink) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for index, words in enumerate(text.split(MARK)):
        if index:
            parts.append(_image(pictures.pop(0), sink))
        if words.strip():
            parts.append({"type": "text", "text": words.strip()})
    return parts


def _message(message: Any, pictures: list[Any], sink: Sink) -> dict[str, Any]:
    """A chat message with its pictures named as the manifest names them."""
    role = ROLES.get(_text(message, "role"))
    content = message.get("content")
    if role is None:
        raise Drop("bad_messages")
    if content is None:
        return {"role": role, "content": None}
    if isinstance(content, str):
        return {"role": role, "content": _cut(content, pictures, sink) if MARK in content and pictures else content}
    if not isinstance(content, list):
        raise Drop("bad_messages")
    return {"role": role, "content": [_part(part, pictures, sink) for part in content]}


def _part(part: Any, pictures: list[Any], sink: Sink) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text"):
        return {"type": "text", "text": _text(part, "text")}
    if kind in ("image_url", "input_image"):
        url = part.get("image_url")
        return _image(url.get("url") if isinstance(url, dict) else url, sink)
    if kind == "image":
        named = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        if named is None and not pictures:
            raise Drop("placeholder_mismatch")
        return _image(named if named is not None else pictures.pop(0), sink)
    raise Drop("bad_messages")
