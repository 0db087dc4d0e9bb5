"""Colours and classes of the world: one table for the painter and the oracle.

Place in the flow: read by `places`, `props`, `characters` (to draw), `oracle` (to recognise) and `dataset` (to colour
semantic maps). Colours are sRGB 0..255. CLASSES are the ids of a semantic map, PALETTE the fixed colours of its PNG.
"""

from __future__ import annotations

import colorsys

from mmi_engine.toon.canvas import Color
from mmi_engine.toon.world import PROPS

BODY: dict[str, Color] = {
    "Pip": (245, 160, 190),
    "Momo": (150, 94, 54),
    "Fizz": (238, 122, 38),
    "Lulu": (140, 210, 60),
    "Boo": (150, 108, 214),
    "Tiko": (255, 218, 70),
    "Nemi": (92, 156, 230),
    "Rolo": (152, 160, 170),
}
SHIRT: dict[str, Color] = {
    "red": (214, 40, 48),
    "orange": (248, 140, 28),
    "yellow": (252, 218, 48),
    "green": (44, 150, 72),
    "blue": (40, 88, 205),
    "purple": (126, 58, 170),
    "pink": (250, 150, 196),
    "black": (58, 56, 66),
}
THING: dict[str, Color] = {
    "red": (222, 48, 52),
    "yellow": (253, 208, 40),
    "blue": (48, 104, 220),
    "green": (40, 164, 84),
}
PLATE: Color = (253, 251, 244)  # the number's white field on the shirt
DIGIT: Color = (34, 28, 44)
WHITE: Color = (252, 252, 250)
WOOD: Color = (150, 98, 58)

CLASSES: tuple[str, ...] = (
    "unlabelled", "sky", "sun", "ground", "water", "hill", "plant", "building", "wall", "window",
    "head", "shirt", "number", "limb", "hat", "book", *PROPS,
)  # fmt: skip
ID: dict[str, int] = {name: index for index, name in enumerate(CLASSES)}


def _map_color(index: int) -> Color:
    """Well separated colours: the hue walks by the golden angle, brightness alternates in three steps."""
    if index == 0:
        return (0, 0, 0)
    r, g, b = colorsys.hsv_to_rgb(
        (index * 0.618034) % 1.0, (0.85, 0.55, 0.95)[index % 3], (0.95, 0.75, 0.55)[index % 3]
    )
    return (round(r * 255), round(g * 255), round(b * 255))


PALETTE: tuple[Color, ...] = tuple(_map_color(i) for i in range(len(CLASSES)))
