"""Items of large JSON documents one by one: the array at the top, or the arrays under keys of the object at the top.

Place in the flow: the readers beside this file; a LLaVA or COCO file of a gigabyte is never in memory as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mmi_engine.errors import ManifestError

BLOCK = 2**20
_DECODER = json.JSONDecoder()


class _Text:
    """A growing window on a text file."""

    def __init__(self, stream: IO[str], name: str) -> None:
        self.stream, self.name, self.text, self.at, self.ended = stream, name, "", 0, False

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        block = self.stream.read(max(BLOCK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + block, 0
        self.ended = not block
        return bool(block)

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def expect(self, characters: str) -> str:
        """The next character, which must be one of these."""
        found = self.peek()
        if not found or found not in characters:
            raise self.broken()
        self.at += 1
        return found

    def value(self) -> Any:
        """The next whole value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except (json.JSONDecodeError, RecursionError):
                if self.ended or not self.more():
                    raise self.broken() from None
                continue
            following = self.text[end : end + 1] or "0"
            if following in "0123456789.eE+-" and not self.ended and self.more():
                continue  # a number that may go on in the next block
            self.at = end
            return value

    def broken(self) -> ManifestError:
        return ManifestError(f"{self.name} is no complete JSON", remedy="download it again, or name another file")


def items(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, item) for every item of the arrays of a document; the key is "" for an array at the top.

    Values of the top object that are no arrays come as one item. A file of JSON lines counts as an array.

    Raises:
        ManifestError: it cannot be read, or is no JSON.
    """
    try:
        with path.open(encoding="utf-8-sig") as stream:
            text = _Text(stream, path.name)
            opening = text.peek()
            if opening == "[":
                yield from (("", item) for item in _array(text))
            elif opening == "{":
                yield from _object_or_lines(text)
            else:
                raise text.broken()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ManifestError(f'"{path}" cannot be read: {reason}') from error


def _array(text: _Text) -> Iterator[Any]:
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
        return
    while True:
        yield text.value()
        if text.expect(",]") == "]":
            return


def _object_or_lines(text: _Text) -> Iterator[tuple[str, Any]]:
    """One object with arrays, or an object a line: told apart by what follows the first object's first line."""
    if _is_lines(text):
        while text.peek():
            yield "", text.value()
        return
    text.expect("{")
    if text.peek() == "}":
        return
    while True:
        key = str(text.value())
        text.expect(":")
        if text.peek() == "[":
            for item in _array(text):
                yield key, item
        else:
            yield key, text.value()
        if text.expect(",}") == "}":
            return


def _is_lines(text: _Text) -> bool:
    """Whether the first line is a complete object and another follows."""
    while "\n" not in text.text[text.at :] and len(text.text) - text.at < 64 * BLOCK and text.more():
        pass
    first, newline, rest = text.text[text.at :].partition("\n")
    try:
        complete = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False
    return complete and bool(newline) and rest.lstrip()[:1] == "{"
