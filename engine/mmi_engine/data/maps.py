"""Semantic maps: class numbers or palette colours in a PNG → a picture in the colours that the model knows.

Place in the flow: `tasks/seg2img.py` loads a row's ``segmentation`` through `load_map`; what comes out is RGB of the
file's own size. Understood: grey pictures of 8 or 16 bits (the value is the class, 255 or 65535 means unlabelled),
palette PNGs (their own colours where these are the palette's, else the index is the class), and colour pictures, which
are taken as they are. Code of what is none of these: ``bad_map``.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_engine.data.images import ImageLoader, to_rgb
from mmi_engine.errors import ConfigError, ImageError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Color = tuple[int, int, int]
UNLABELLED = (255, 65535)  # besides class 0


@dataclass(frozen=True)
class Palette:
    """Colours of classes.

    Attributes:
        name: as the user names it.
        colors: (red, green, blue) of every class, 0 … 255; class 0 is unlabelled.
    """

    name: str
    colors: tuple[Color, ...]

    def fingerprint(self) -> str:
        """Short hash of the colours."""
        return hashlib.sha256(repr(self.colors).encode()).hexdigest()[:12]

    @classmethod
    def find(cls, name: str) -> Palette:
        """``toon``, ``voc`` (256 colours of the PASCAL VOC rule), a JSON list of [r, g, b], or a palette PNG.

        Raises:
            ConfigError: no such palette, or a broken file.
        """
        if name == "toon":
            from mmi_engine.toon.palette import PALETTE

            return cls(name, PALETTE)
        if name == "voc":
            return cls(name, tuple(_voc(index) for index in range(256)))
        try:
            content = Path(name).read_bytes()
            listed = _colors_of_png(content) or json.loads(content.decode("utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "neither JSON nor a palette PNG"
            raise ConfigError(
                f'palette "{name}" cannot be read: {reason}',
                remedy="use toon, voc, a JSON list of [r, g, b], or a palette PNG",
            ) from None
        if not isinstance(listed, list) or not listed or not all(map(_is_color, listed)):
            raise ConfigError(f'palette "{name}" is no list of [r, g, b]', remedy="numbers run from 0 to 255")
        return cls(name, tuple((r, g, b) for r, g, b in listed))


def _colors_of_png(content: bytes) -> list[list[int]] | None:
    """The colours of a palette PNG; None for anything else."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            flat = picture.getpalette() or []
    except (OSError, ValueError, SyntaxError):
        return None
    return [flat[start : start + 3] for start in range(0, len(flat), 3)] or None


def _is_color(entry: Any) -> bool:
    good = isinstance(entry, list) and len(entry) == 3
    return good and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= 255 for v in entry)


def _voc(index: int) -> Color:
    """Colour of a class by the rule of PASCAL VOC: the bits of the class number, dealt to the channels from the top."""
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return channels[0], channels[1], channels[2]


def load_map(loader: ImageLoader, reference: Any, palette: Palette) -> Image.Image:
    """The referenced map as an RGB picture in the palette's colours.

    Raises:
        ImageError: it cannot be loaded, or holds a value that is no class (`bad_map`).
    """
    import numpy as np

    raw = loader.load_raw(reference)
    if raw.mode == "1":
        raw = raw.convert("L").point(lambda value: 1 if value else 0)
    if raw.mode == "L" or raw.mode.startswith("I"):
        return _painted(np.asarray(raw).astype(np.int64), palette)
    colored = to_rgb(raw)
    packed = _pack(np.asarray(colored))
    known = {(r << 16) | (g << 8) | b for r, g, b in palette.colors}
    used = set(np.unique(packed).tolist())
    if used <= known:
        return colored
    if raw.mode == "P":
        return _painted(np.asarray(raw).astype(np.int64), palette)
    grey = all((value >> 16) == (value >> 8 & 255) == (value & 255) for value in used)
    if grey and all((value & 255) < len(palette.colors) or (value & 255) in UNLABELLED for value in used):
        return _painted((packed & 255).astype(np.int64), palette)
    return colored


def _pack(pixels: np.ndarray) -> np.ndarray:
    """RGB ``[h, w, 3]`` as one number per pixel."""
    wide = pixels.astype("int64")
    packed: np.ndarray = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
    return packed


def _painted(labels: np.ndarray, palette: Palette) -> Image.Image:
    """Class numbers ``[h, w]`` in the palette's colours."""
    import numpy as np
    from PIL import Image

    count = len(palette.colors)
    labels = np.where(np.isin(labels, [value for value in UNLABELLED if value >= count]), 0, labels)
    if labels.min() < 0 or labels.max() >= count:
        worst = int(labels.max() if labels.max() >= count else labels.min())
        raise ImageError(
            f"the map holds class {worst}, palette {palette.name} has 0 to {count - 1}",
            remedy="name the right --palette, or save the map in its colours",
            code="bad_map",
        )
    return Image.fromarray(np.asarray(palette.colors, dtype=np.uint8)[labels])
