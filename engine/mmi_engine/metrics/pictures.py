"""Which pictures of an item are compared, and with what.

Place in the flow: metrics of pictures (`frechet.py`, `kid.py`, `clip.py`, `pixels.py`) ask here. A row with an
``image`` (or ``meta.image``, as the built-in data has it) is one picture. A story is one per frame that was to be made:
of a manifest as `mmi story` reads it, the frames without an image, whose true ones are in ``meta.images``; of a
complete story, the frames listed in ``target``, else those that the result says were generated, else all but the first.

A missing picture counts as a plain grey one: nothing was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmi_engine.data.images import ImageLoader
from mmi_engine.errors import RowError
from mmi_engine.metrics.fields import meta
from mmi_engine.metrics.pairs import Pair

if TYPE_CHECKING:
    from PIL import Image

GREY = (128, 128, 128)


@dataclass(frozen=True)
class Source:
    """A picture by name: loader, reference and the place of its row."""

    loader: ImageLoader
    name: str
    place: str

    def load(self) -> Image.Image:
        """The RGB picture; raises ImageError."""
        return self.loader.load(self.name)


def true_pictures(pair: Pair) -> list[Source]:
    """The pictures that should have been made.

    Raises:
        RowError: the reference names none.
    """
    row = pair.reference
    if isinstance(row.get("frames"), list):
        found = [(k, _true_frame(row, k)) for k in targets(pair)]
        lost = [k for k, name in found if not isinstance(name, str)]
        if lost or not found:
            where = f"frame {lost[0]}" if lost else "the frames"
            remedy = 'give every frame its "image", or "meta": {"images": […]}'
            raise RowError(f"no true picture for {where}", remedy=remedy, code="bad_row")
        return [Source(pair.truth, str(name), pair.place) for _, name in found]
    name = meta(row, "image")
    if not isinstance(name, str):
        raise RowError('no true picture: "image" or "meta.image" must be a path', code="bad_row")
    return [Source(pair.truth, name, pair.place)]


def targets(pair: Pair) -> list[int]:
    """Indices of the frames that are compared."""
    frames = pair.reference["frames"]
    asked = [k for k, frame in enumerate(frames) if isinstance(frame, dict) and frame.get("image") is None]
    if asked:
        return asked
    wanted = meta(pair.reference, "target")
    if wanted is not None:
        good = isinstance(wanted, list) and all(isinstance(k, int) and 0 <= k < len(frames) for k in wanted)
        if not good or not wanted:
            raise RowError(f'"target" must list frames from 0 to {len(frames) - 1}', code="bad_row")
        return list(wanted)
    made = (pair.result or {}).get("frames")
    if isinstance(made, list) and len(made) >= len(frames) and all(isinstance(frame, dict) for frame in made):
        found = [k for k in range(len(frames)) if "image" in (made[k].get("generated") or [])]
        if found:
            return found
    return list(range(1, len(frames)))


def _true_frame(row: dict[str, Any], k: int) -> Any:
    name = row["frames"][k].get("image") if isinstance(row["frames"][k], dict) else None
    images = meta(row, "images")
    return images[k] if name is None and isinstance(images, list) and k < len(images) else name


def made_pictures(pair: Pair) -> list[Source]:
    """The pictures that were made in place of the true ones, as many of them.

    Raises:
        RowError: the result does not name them.
    """
    result = pair.result or {}
    if isinstance(pair.reference.get("frames"), list):
        frames = result.get("frames")
        wanted = targets(pair)
        if not isinstance(frames, list) or len(frames) <= max(wanted):
            raise RowError(f'"frames" must hold at least {max(wanted) + 1} frames', code="bad_row")
        names = [frames[k].get("image") if isinstance(frames[k], dict) else None for k in wanted]
    else:
        names = [result.get("image") or _first(result.get("images"))]
    if not all(isinstance(name, str) for name in names):
        raise RowError('a picture is not named: "image" must be a path', code="bad_row")
    return [Source(pair.made, str(name), pair.result_place) for name in names]


def _first(images: Any) -> Any:
    """The first of several candidates, which were drawn without a choice among them."""
    entry = images[0] if isinstance(images, list) and images else None
    return entry.get("image") if isinstance(entry, dict) else entry


def texts(pair: Pair) -> list[str]:
    """The text that belongs to each compared picture: prompt, caption, or the frames' texts.

    Raises:
        RowError: there is none.
    """
    row = pair.reference
    if isinstance(row.get("frames"), list):
        found = [row["frames"][k].get("text") for k in targets(pair)]
    else:
        captions = row.get("captions")
        found = [row.get("prompt") or row.get("caption") or (captions[0] if isinstance(captions, list) else None)]
    if not all(isinstance(text, str) and text.strip() for text in found):
        raise RowError("no text to compare with", remedy='give a "prompt", a "caption" or frames with "text"')
    return [str(text) for text in found]


def grey(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """What stands for a picture that was not made."""
    from PIL import Image

    return Image.new("RGB", size, GREY)
