"""The twelve props and the digits.

Place in the flow: painted over a place, under the character. Local frame of a prop: x in [-0.5, 0.5] and y in [-1, 0]
(base on the ground), scaled to the prop's height in px. Each has one part in its stated colour and a fixed rest.
Digits are seven-bar glyphs in a box 12 wide and 17 high (local units), chunky enough to survive an 8-fold codec.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mmi_engine.toon.canvas import INK, Canvas, Color, mix
from mmi_engine.toon.palette import DIGIT, ID, PLATE, THING, WHITE, WOOD
from mmi_engine.toon.world import Prop

LINE = 0.055  # outline width in prop units (≈ 1.6 px)

# Bars of a digit: a top, b right upper, c right lower, d bottom, e left lower, f left upper, g middle.
BARS = {"0": "abcdef", "1": "", "2": "abged", "3": "abgcd", "4": "fgbc", "5": "afgcd",
        "6": "afgedc", "7": "", "8": "abcdefg", "9": "gfabcd"}  # fmt: skip
_ENDS = {"a": ((-4, -7), (4, -7)), "b": ((4, -7), (4, 0)), "c": ((4, 0), (4, 7)), "d": ((-4, 7), (4, 7)),
         "e": ((-4, 0), (-4, 7)), "f": ((-4, -7), (-4, 0)), "g": ((-4, 0), (4, 0))}  # fmt: skip


def digit(cv: Canvas, value: int, cx: float, cy: float, zoom: float, label: int, fill: Color = DIGIT) -> None:
    """One digit centred at (cx, cy); zoom 1 is 12 × 18 local units, bars 3.6 wide."""
    width = 3.6 * zoom
    if value == 1:
        paths = [[(-3.5, -4.0), (0.5, -7.0), (0.5, 7.0)], [(-3.5, 7.0), (4.0, 7.0)]]
    elif value == 7:
        paths = [[(-4.0, -7.0), (4.0, -7.0), (-0.5, 7.0)]]
    else:
        paths = [list(_ENDS[bar]) for bar in BARS[str(value)]]
    for path in paths:
        cv.stroke([(cx + x * zoom, cy + y * zoom) for x, y in path], width, fill, label)


def _ball(cv: Canvas, color: Color, label: int, _: int) -> None:
    cv.ellipse(0, -0.5, 0.47, 0.47, color, label, LINE)
    cv.ellipse(0, -0.5, 0.15, 0.47, WHITE, label)
    cv.ellipse(0, -0.5, 0.47, 0.13, WHITE, label)
    cv.ellipse(0, -0.5, 0.15, 0.13, color, label)


def _boat(cv: Canvas, color: Color, label: int, _: int) -> None:
    cv.stroke([(0, -0.3), (0, -0.96)], 0.07, WOOD, label)
    cv.poly([(0.06, -0.94), (0.44, -0.42), (0.06, -0.42)], WHITE, label, LINE)
    cv.poly([(-0.06, -0.8), (-0.06, -0.42), (-0.34, -0.42)], WHITE, label, LINE)
    cv.poly([(-0.49, -0.34), (0.49, -0.34), (0.32, -0.03), (-0.32, -0.03)], color, label, LINE)


def _tree(cv: Canvas, color: Color, label: int, _: int) -> None:
    cv.poly([(-0.08, -0.4), (0.08, -0.4), (0.11, -0.02), (-0.11, -0.02)], WOOD, label, LINE)
    for x, y, r in ((-0.22, -0.52, 0.22), (0.22, -0.52, 0.22), (0, -0.72, 0.26)):
        cv.ellipse(x, y, r, r, color, label, LINE)
    cv.ellipse(0, -0.58, 0.28, 0.2, color, label)


def _house(cv: Canvas, color: Color, label: int, _: int) -> None:
    cv.poly([(-0.38, -0.56), (0.38, -0.56), (0.38, -0.02), (-0.38, -0.02)], (250, 238, 212), label, LINE)
    cv.poly([(-0.49, -0.52), (0, -0.97), (0.49, -0.52)], color, label, LINE)
    cv.poly([(-0.28, -0.36), (-0.06, -0.36), (-0.06, -0.02), (-0.28, -0.02)], WOOD, label, LINE)
    cv.poly([(0.08, -0.4), (0.28, -0.4), (0.28, -0.2), (0.08, -0.2)], (130, 206, 244), label, LINE)


def _sign(cv: Canvas, color: Color, label: int, value: int) -> None:
    cv.poly([(-0.06, -0.3), (0.06, -0.3), (0.06, 0), (-0.06, 0)], WOOD, label, LINE)
    cv.rrect(-0.4, -0.98, 0.4, -0.22, 0.08, color, label, LINE)
    cv.rrect(-0.29, -0.9, 0.29, -0.3, 0.04, PLATE, label)
    digit(cv, value, 0, -0.6, 0.029, label)


def _balloon(cv: Canvas, color: Color, label: int, _: int) -> None:
    cv.stroke([(0, -0.4), (0.05, -0.25), (-0.03, -0.12), (0.02, 0)], 0.05, INK, label)
    cv.poly([(0, -0.42), (0.08, -0.32), (-0.08, -0.32)], color, label, LINE)
    cv.ellipse(0, -0.69, 0.26, 0.3, color, label, LINE)
    cv.ellipse(-0.1, -0.79, 0.06, 0.08, mix(color, WHITE, 0.75), label)


def _flower(cv: Canvas, color: Color, label: int, _: int) -> None:
    cv.stroke([(0, -0.5), (0, -0.02)], 0.08, (48, 130, 64), label)
    cv.ellipse(0.15, -0.16, 0.15, 0.06, (48, 130, 64), label, turn=-25)
    cv.ellipse(-0.15, -0.12, 0.15, 0.06, (48, 130, 64), label, turn=25)
    petals = [(0.22 * math.cos(k * math.pi / 3), -0.66 + 0.22 * math.sin(k * math.pi / 3)) for k in range(6)]
    for x, y in petals:
        cv.ellipse(x, y, 0.13, 0.13, color, label, LINE)
    cv.ellipse(0, -0.66, 0.13, 0.13, (255, 246, 214), label, LINE)


def _car(cv: Canvas, color: Color, label: int, _: int) -> None:
    cv.poly([(-0.28, -0.4), (-0.18, -0.68), (0.16, -0.68), (0.3, -0.4)], (190, 230, 248), label, LINE)
    cv.rrect(-0.5, -0.44, 0.5, -0.15, 0.1, color, label, LINE)
    for x in (-0.27, 0.27):
        cv.ellipse(x, -0.15, 0.14, 0.14, (60, 56, 66), label, LINE)
        cv.ellipse(x, -0.15, 0.06, 0.06, (220, 220, 224), label)


def _star(cv: Canvas, color: Color, label: int, _: int) -> None:
    ring = [(0.5 if k % 2 == 0 else 0.23, -math.pi / 2 + k * math.pi / 5) for k in range(10)]
    cv.poly([(r * math.cos(t), -0.46 + r * math.sin(t)) for r, t in ring], color, label, LINE)


def _umbrella(cv: Canvas, color: Color, label: int, _: int) -> None:
    cv.stroke([(0, -0.5), (0, -0.1), (0.06, -0.04), (0.14, -0.06)], 0.07, WOOD, label)
    dome = [(0.49 * math.cos(t), -0.46 + 0.48 * math.sin(t)) for t in (-math.pi + k * math.pi / 16 for k in range(17))]
    cv.poly([*dome, (0.33, -0.53), (0.16, -0.46), (0, -0.53), (-0.16, -0.46), (-0.33, -0.53)], color, label, LINE)
    cv.poly([(-0.16, -0.47), (0, -0.92), (0.16, -0.47), (0, -0.53)], WHITE, label)


def _gift(cv: Canvas, color: Color, label: int, _: int) -> None:
    cv.rrect(-0.4, -0.58, 0.4, -0.03, 0.04, color, label, LINE)
    cv.rrect(-0.46, -0.72, 0.46, -0.52, 0.04, color, label, LINE)
    cv.poly([(-0.08, -0.72), (0.08, -0.72), (0.08, -0.04), (-0.08, -0.04)], WHITE, label)
    cv.ellipse(-0.15, -0.83, 0.15, 0.1, WHITE, label, LINE, turn=25)
    cv.ellipse(0.15, -0.83, 0.15, 0.1, WHITE, label, LINE, turn=-25)


def _mushroom(cv: Canvas, color: Color, label: int, _: int) -> None:
    cv.rrect(-0.18, -0.5, 0.18, -0.02, 0.12, (250, 238, 212), label, LINE)
    cap = [(0.48 * math.cos(t), -0.42 + 0.52 * math.sin(t)) for t in (-math.pi + k * math.pi / 16 for k in range(17))]
    cv.poly(cap, color, label, LINE)
    for x, y, r in ((-0.24, -0.56, 0.08), (0.04, -0.72, 0.1), (0.26, -0.54, 0.08)):
        cv.ellipse(x, y, r, r, WHITE, label)


SHAPES: dict[str, Callable[[Canvas, Color, int, int], None]] = {
    "ball": _ball, "boat": _boat, "tree": _tree, "house": _house, "sign": _sign, "balloon": _balloon,
    "flower": _flower, "car": _car, "star": _star, "umbrella": _umbrella, "gift": _gift, "mushroom": _mushroom,
}  # fmt: skip


def paint_prop(cv: Canvas, prop: Prop) -> None:
    """Draw one prop at its place, base at (prop.x, prop.y), prop.size px high."""
    cv.at(prop.x, prop.y, prop.size)
    SHAPES[prop.kind](cv, THING[prop.color], ID[prop.kind], prop.digit)
    cv.at(0.0, 0.0)
