"""A drawing surface that renders one geometry twice: as smooth colours or as class ids.

Place in the flow: `places`, `props` and `characters` draw on a Canvas; `draw` turns it into an RGB picture (SUPER-fold
supersampled, box-averaged) or into a uint8 class map (the same polygons, sampled at pixel centres, no smoothing).
Coordinates are picture pixels (x right, y down, 128 × 128) before the canvas's own origin and scale are applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128  # picture side in px
SUPER = 4  # supersampling factor
INK = (52, 38, 58)  # colour of all outlines

Color = tuple[int, int, int]
Point = tuple[float, float]


class Canvas:
    """A SIZE × SIZE px surface with a movable origin and scale.

    Args:
        semantic: draw class ids (one byte per pixel) instead of colours.
        base: fill value of the whole surface, a colour or a class id.
        size: side in px of the surface (whole pictures: 128; the oracle draws small templates).
    """

    def __init__(self, *, semantic: bool = False, base: Color | int | None = None, size: int = SIZE) -> None:
        self.semantic = semantic
        self.size = size
        fill = base if base is not None else (0 if semantic else (255, 255, 255))
        self.image = Image.new("L" if semantic else "RGB", (size * SUPER, size * SUPER), fill)
        self._draw = ImageDraw.Draw(self.image)
        self._x, self._y, self._scale = 0.0, 0.0, float(SUPER)

    def at(self, x: float, y: float, scale: float = 1.0) -> Canvas:
        """Move the origin to (x, y) px and set the scale (local units → px); returns self for chaining."""
        self._x, self._y, self._scale = x * SUPER, y * SUPER, scale * SUPER
        return self

    def _map(self, points: Sequence[Point]) -> list[Point]:
        ox, oy, s = self._x, self._y, self._scale
        return [(ox + s * x, oy + s * y) for x, y in points]

    def poly(self, points: Sequence[Point], fill: Color, label: int, ink: float = 0.0, ink_fill: Color = INK) -> None:
        """Filled polygon; `ink` is the outline width in local units, drawn half outside, half inside."""
        mapped = self._map(points)
        if self.semantic:
            self._draw.polygon(mapped, fill=label)
            if ink:
                self._draw.line([*mapped, mapped[0], mapped[1]], fill=label, width=self._width(ink), joint="curve")
            return
        self._draw.polygon(mapped, fill=fill)
        if ink:
            self._draw.line([*mapped, mapped[0], mapped[1]], fill=ink_fill, width=self._width(ink), joint="curve")

    def _width(self, width: float) -> int:
        return max(1, round(width * self._scale))

    def ellipse(
        self, cx: float, cy: float, rx: float, ry: float, fill: Color, label: int, ink: float = 0.0, turn: float = 0.0
    ) -> None:
        """Ellipse with half axes rx, ry in local units; `turn` rotates it clockwise by that many degrees."""
        if turn:
            cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
            ring = [(math.cos(k * math.pi / 16) * rx, math.sin(k * math.pi / 16) * ry) for k in range(32)]
            self.poly([(cx + cos * u - sin * v, cy + sin * u + cos * v) for u, v in ring], fill, label, ink)
            return
        (x0, y0), (x1, y1) = self._map([(cx - rx - ink / 2, cy - ry - ink / 2), (cx + rx + ink / 2, cy + ry + ink / 2)])
        if ink and not self.semantic:
            self._draw.ellipse((x0, y0, x1, y1), fill=INK)
            d = ink * self._scale
            self._draw.ellipse((x0 + d, y0 + d, x1 - d, y1 - d), fill=fill)
        else:
            self._draw.ellipse((x0, y0, x1, y1), fill=label if self.semantic else fill)

    def rrect(
        self, x0: float, y0: float, x1: float, y1: float, radius: float, fill: Color, label: int, ink: float = 0.0
    ) -> None:
        """Rounded rectangle, corners in local units."""
        h = ink / 2
        (a, b), (c, d) = self._map([(x0 - h, y0 - h), (x1 + h, y1 + h)])
        r = radius * self._scale
        if ink and not self.semantic:
            self._draw.rounded_rectangle((a, b, c, d), r + h * self._scale, fill=INK)
            w = ink * self._scale
            self._draw.rounded_rectangle((a + w, b + w, c - w, d - w), max(0.0, r - h * self._scale), fill=fill)
        else:
            self._draw.rounded_rectangle((a, b, c, d), r, fill=label if self.semantic else fill)

    def stroke(
        self, points: Sequence[Point], width: float, fill: Color, label: int, ink: float = 0.0, round_ends: bool = True
    ) -> None:
        """Thick polyline (a limb, a stalk, a digit's bar) with round ends; width in local units without the outline."""
        mapped = self._map(points)
        passes = [(width + ink, INK), (width - ink, fill)] if ink else [(width, fill)]
        for breadth, color in passes:
            value = label if self.semantic else color
            self._draw.line(mapped, fill=value, width=self._width(breadth), joint="curve")
            if round_ends:
                r = self._width(breadth) / 2
                for x, y in (mapped[0], mapped[-1]):
                    self._draw.ellipse((x - r, y - r, x + r, y + r), fill=value)

    def arc(
        self,
        cx: float,
        cy: float,
        rx: float,
        ry: float,
        start: float,
        end: float,
        width: float,
        fill: Color,
        label: int,
    ) -> None:
        """Arc of an ellipse from `start` to `end` degrees (clockwise from +x), e.g. a smile or a closed eye."""
        box = self._map([(cx - rx, cy - ry), (cx + rx, cy + ry)])
        self._draw.arc([*box[0], *box[1]], start, end, fill=label if self.semantic else fill, width=self._width(width))

    def rgb(self) -> Image.Image:
        """The finished picture, RGB, size × size px."""
        return self.image.reduce(SUPER)

    def labels(self) -> np.ndarray:
        """The finished class map, uint8 [size, size]: the class at (just right below) each pixel's centre."""
        return np.ascontiguousarray(np.asarray(self.image)[SUPER // 2 :: SUPER, SUPER // 2 :: SUPER])


def mix(a: Color, b: Color, t: float) -> Color:
    """Colour between a (t = 0) and b (t = 1)."""
    return tuple(round(p + (q - p) * t) for p, q in zip(a, b, strict=True))  # type: ignore[return-value]
