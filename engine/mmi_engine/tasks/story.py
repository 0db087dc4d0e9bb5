"""`mmi story`: frames or a chat as an interleaved sequence, filled in order.

Place in the flow: `run.py` reads rows and writes results through `StoryTask`; `messages_to_drafts` serves the other
commands that accept chats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mmi_engine.data.images import ImageLoader, prepare
from mmi_engine.data.manifest import Row, json_type
from mmi_engine.errors import RowError
from mmi_engine.pieces import Piece
from mmi_engine.tasks.base import MAX_PIECES, Job, Output, Panel, check_filled

if TYPE_CHECKING:
    from PIL import Image


class StoryTask:
    """`mmi story`: every missing frame and every missing text, in order, each conditioned on all that came before.

    A row holds ``frames`` (a list of ``{"text": …, "image": …}``) or ``messages`` (a chat whose assistant turn is
    missing). Within a frame the text comes before the image. An image that is absent or null is generated, a text that
    is null is generated, an absent or empty text means that the frame has none.

    Args:
        free: continue by up to this many more images after the last frame.
    """

    name = "story"
    makes_images = True
    decoding = "story"
    keeps_inputs = False  # given frames are written beside the made ones
    column: str | None = None

    def __init__(self, free: int = 0) -> None:
        self.free = free
        self.settings = {"free": free}

    def read(self, row: Row, loader: ImageLoader) -> Job:
        """See `Task.read`. Structure is checked in full before the first image is loaded."""
        if "frames" in row.data:
            drafts = _frames_to_drafts(row.data["frames"])
            free = self.free
        elif "messages" in row.data:
            drafts = messages_to_drafts(row.data["messages"])
            free = max(self.free, 1)
        else:
            raise RowError('a story needs "frames" or "messages"', remedy="see mmi story --help", code="no_frames")
        if len(drafts) > MAX_PIECES:
            raise RowError(f"{len(drafts)} pieces are more than {MAX_PIECES}", remedy="split the story", code="bad_row")
        return Job(row, [load_piece(kind, value, loader) for kind, value in drafts], free)

    def output(self, job: Job, filled: Sequence[Piece], stem: str, image_size: int) -> Output:
        """See `Task.output`. All frames are written, given ones as the model's crop of them."""
        check_filled(job, filled)
        media = _Media(stem, image_size)
        if "frames" in job.row.data:
            return Output({"frames": _frames_out(job, filled, media)}, media.pictures)
        return Output({"messages": _messages_out(job, filled, media)}, media.pictures)

    def panels(self, result: dict[str, Any], data: dict[str, Any], inputs: Sequence[str]) -> list[Panel]:
        """One panel per frame; in a chat one per picture or run of texts."""
        if "frames" in result:
            return [_frame_panel(frame) for frame in result["frames"]]
        panels: list[Panel] = []
        for message in result.get("messages", []):
            made = bool(message.get("generated"))
            for part in message["content"]:
                if part["type"] == "image":
                    panels.append(Panel(part["image"], made))
                else:
                    panels.append(Panel(texts=((part["text"], made),)))
        return panels


Draft = tuple[Literal["text", "image"], Any]  # a piece whose image is still a reference


def _frames_to_drafts(frames: Any) -> list[Draft]:
    if not isinstance(frames, list):
        raise RowError(f'"frames" must be a list, found {json_type(frames)}', code="bad_frames")
    if not frames:
        raise RowError('"frames" is empty', remedy="give at least one frame, {} for a generated one", code="no_frames")
    drafts: list[Draft] = []
    for number, frame in enumerate(frames):
        if not isinstance(frame, dict):
            raise RowError(
                f"frame {number} must be an object, found {json_type(frame)}",
                remedy='write {"text": …, "image": …}',
                code="bad_frames",
            )
        if "text" in frame:
            text = frame["text"]
            if text is not None and not isinstance(text, str):
                raise RowError(f'"text" of frame {number} must be a string or null', code="bad_frames")
            if text is None or text.strip():
                drafts.append(("text", text))
        image = frame.get("image")
        if image is not None and not isinstance(image, str):
            raise RowError(f'"image" of frame {number} must be a path or null', code="bad_frames")
        drafts.append(("image", image))
    return drafts


def messages_to_drafts(messages: Any) -> list[Draft]:
    """A chat as pieces in order: strings and parts of type ``text``, ``image`` and ``image_url``.

    The last message must leave the assistant's turn open: a user message, or an assistant message without content.

    Raises:
        RowError: `bad_messages`.
    """
    if not isinstance(messages, list) or not messages:
        raise RowError('"messages" must be a non-empty list', code="bad_messages")
    drafts: list[Draft] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError(f'message {number} must be an object with a "role"', code="bad_messages")
        content = message.get("content")
        last = number == len(messages) - 1
        if last and message["role"] == "assistant" and content:
            raise RowError("the last message is already an answer", remedy="end with a user turn", code="bad_messages")
        if content is None and last and message["role"] == "assistant":
            continue
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise RowError(f'"content" of message {number} must be a string or a list', code="bad_messages")
        drafts.extend(_part_to_draft(part, number) for part in parts)
    return [draft for draft in drafts if draft[0] == "image" or draft[1].strip()]


def _part_to_draft(part: Any, number: int) -> Draft:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    if kind == "image" and isinstance(part.get("image"), str):
        return "image", part["image"]
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if isinstance(url, str):
            return "image", url
    raise RowError(
        f"message {number} holds a part that is no text and no image",
        remedy='use {"type": "text", "text": …}',
        code="bad_messages",
    )


def chat_pieces(messages: Any, loader: ImageLoader) -> list[Piece]:
    """A chat whose answer is missing as pieces with their pictures loaded.

    Raises:
        ItemError: `bad_messages`, `bad_row` for too many parts, or an unreadable picture.
    """
    drafts = messages_to_drafts(messages)
    if len(drafts) > MAX_PIECES:
        raise RowError(f"{len(drafts)} parts are more than {MAX_PIECES}", remedy="split the chat", code="bad_row")
    return [load_piece(kind, value, loader) for kind, value in drafts]


def load_piece(kind: Literal["text", "image"], value: Any, loader: ImageLoader) -> Piece:
    """A draft with its image loaded."""
    return Piece(kind, loader.load(value) if kind == "image" and value is not None else value)


class _Media:
    """Numbers an item's pictures: STEM/00.png, STEM/01.png, …"""

    def __init__(self, stem: str, image_size: int) -> None:
        self.stem = stem
        self.image_size = image_size
        self.pictures: dict[str, Image.Image] = {}

    def add(self, image: Image.Image, generated: bool) -> str:
        path = f"{self.stem}/{len(self.pictures):02d}.png"
        self.pictures[path] = image.convert("RGB") if generated else prepare(image, self.image_size)
        return path


def _frames_out(job: Job, filled: Sequence[Piece], media: _Media) -> list[dict[str, Any]]:
    """Frames of the result: text, image (path in the output directory), and which of the two the model made."""
    frames: list[dict[str, Any]] = []
    frame: dict[str, Any] = {}
    made: list[str] = []
    for number, piece in enumerate(filled):
        generated = number >= len(job.pieces) or job.pieces[number].value is None
        if piece.kind == "text" and "text" in frame:  # two texts in a row, only in a free continuation
            frame["text"] = f"{frame['text']} {piece.value}"
        elif piece.kind == "text":
            frame["text"] = piece.value
        if piece.kind == "image":
            frame["image"] = media.add(piece.value, generated)
        if generated and piece.kind not in made:
            made.append(piece.kind)
        if piece.kind == "image":
            frames.append({**frame, "generated": made})
            frame, made = {}, []
    if frame:  # a free continuation that ended in text
        frames.append({**frame, "image": None, "generated": made})
    return frames


def _messages_out(job: Job, filled: Sequence[Piece], media: _Media) -> list[dict[str, Any]]:
    """The chat with its last turn added; given pictures are copied beside the generated ones."""
    messages: list[dict[str, Any]] = []
    position = 0
    for number, message in enumerate(job.row.data["messages"]):
        if number == len(job.row.data["messages"]) - 1 and message["role"] == "assistant":
            break  # the turn left open
        count = len(messages_to_drafts([message, {"role": "assistant"}]))
        content = [_part_out(piece, media, False) for piece in filled[position : position + count]]
        messages.append({"role": message["role"], "content": content})
        position += count
    answer = [_part_out(piece, media, True) for piece in filled[len(job.pieces) :]]
    return [*messages, {"role": "assistant", "generated": True, "content": answer}]


def _part_out(piece: Piece, media: _Media, generated: bool) -> dict[str, Any]:
    if piece.kind == "text":
        return {"type": "text", "text": piece.value}
    return {"type": "image", "image": media.add(piece.value, generated)}


def _frame_panel(frame: dict[str, Any]) -> Panel:
    made = frame["generated"]
    texts = ((frame["text"], "text" in made),) if "text" in frame else ()
    return Panel(frame["image"], "image" in made, texts)
