"""The eight places: a background each, with its own palette and layout, and the sun, moon or window on one side.

Place in the flow: called first by `draw`; everything else is painted over it. `pan` shifts the scenery sideways (px).
Backgrounds carry no ink outlines, so that outlined things stand out. Horizon between y = 62 and y = 84 px.
"""

from __future__ import annotations

from collections.abc import Callable

from mmi_engine.toon.canvas import SIZE, Canvas, Color
from mmi_engine.toon.palette import ID, WHITE

SKY, SUN, GROUND, WATER, HILL = ID["sky"], ID["sun"], ID["ground"], ID["water"], ID["hill"]
PLANT, BUILDING, WALL, WINDOW = ID["plant"], ID["building"], ID["wall"], ID["window"]
SUN_X = {"left": 16.0, "right": 112.0}
SUN_Y = 17.0


def _band(cv: Canvas, y0: float, y1: float, fill: Color, label: int) -> None:
    cv.poly([(-1, y0), (SIZE + 1, y0), (SIZE + 1, y1), (-1, y1)], fill, label)


def _cloud(cv: Canvas, x: float, y: float, fill: Color) -> None:
    for dx, dy, r in ((-8, 1, 5), (0, -2, 7), (8, 1, 5)):
        cv.ellipse(x + dx, y + dy, r, r * 0.8, fill, SKY)


def _sun(cv: Canvas, side: str, core: Color, halo: Color) -> None:
    x = SUN_X[side]
    cv.ellipse(x, SUN_Y, 13, 13, halo, SUN)
    cv.ellipse(x, SUN_Y, 9.5, 9.5, core, SUN)


def beach(cv: Canvas, sun: str, pan: float) -> None:
    """Pale blue sky, teal sea with waves, sand."""
    _band(cv, 0, 66, (164, 222, 246), SKY)
    _cloud(cv, 64 - pan, 14, WHITE)
    _band(cv, 58, 84, (32, 160, 184), WATER)
    for k in range(6):
        cv.ellipse(k * 28 - 8 + pan, 66 + 6 * (k % 2), 7, 1.3, (150, 226, 228), WATER)
    _band(cv, 84, 129, (246, 222, 162), GROUND)
    for k in range(5):
        cv.ellipse(k * 32 + pan, 84, 18, 3, (246, 222, 162), GROUND)
        cv.ellipse(k * 29 + 6 + pan, 97 + 9 * (k % 3), 2, 1.2, (222, 190, 124), GROUND)
    _sun(cv, sun, (255, 224, 64), (255, 243, 170))


def forest(cv: Canvas, sun: str, pan: float) -> None:
    """Pale green light between dark trees, mossy floor."""
    _band(cv, 0, 80, (206, 232, 176), SKY)
    _sun(cv, sun, (255, 236, 110), (246, 246, 186))
    for k in range(8):
        x = k * 21 - 10 + pan
        top = 30 + 9 * (k % 2)
        cv.poly([(x - 2.5, 60), (x + 2.5, 60), (x + 2.5, 84), (x - 2.5, 84)], (92, 66, 48), PLANT)
        for j in range(3):
            w, y = 8 + 3 * j, top + 11 * j
            cv.poly([(x, y), (x + w, y + 17), (x - w, y + 17)], (30, 104, 76), PLANT)
    _band(cv, 78, 129, (66, 116, 58), GROUND)
    for k in range(7):
        cv.ellipse(k * 22 + pan, 79, 13, 4, (66, 116, 58), GROUND)
        cv.ellipse(k * 23 + 4 + pan, 94 + 10 * (k % 3), 5, 1.5, (98, 148, 76), GROUND)


def snow(cv: Canvas, sun: str, pan: float) -> None:
    """Lavender winter sky, white hills, snowflakes, blue-shadowed snow."""
    _band(cv, 0, 90, (186, 198, 232), SKY)
    _sun(cv, sun, (255, 248, 214), (222, 224, 238))
    for k in range(14):
        cv.ellipse((k * 37) % 132 + pan / 2, (k * 23) % 58 + 3, 1.3, 1.3, WHITE, SKY)
    cv.ellipse(24 + pan, 92, 48, 30, (222, 232, 248), HILL)
    cv.ellipse(106 + pan, 94, 44, 26, (222, 232, 248), HILL)
    _band(cv, 82, 129, (246, 249, 254), GROUND)
    for k in range(5):
        cv.ellipse(k * 31 + pan, 95 + 10 * (k % 3), 8, 1.5, (208, 222, 244), GROUND)


def town(cv: Canvas, sun: str, pan: float) -> None:
    """Night: navy sky with stars and moon, house fronts with lit windows, grey street."""
    _band(cv, 0, 90, (26, 30, 84), SKY)
    for k in range(12):
        cv.ellipse((k * 41) % 130, (k * 17) % 40 + 3, 0.9, 0.9, (240, 240, 210), SKY)
    x = SUN_X[sun]
    cv.ellipse(x, SUN_Y, 11, 11, (250, 244, 200), SUN)
    cv.ellipse(x + 3.5, SUN_Y - 2, 2.4, 2.4, (226, 216, 168), SUN)
    cv.ellipse(x - 4, SUN_Y + 3, 1.8, 1.8, (226, 216, 168), SUN)
    for k in range(6):
        x0, top = k * 26 - 14 + pan, 46 + 8 * ((k * 2) % 3)
        fill = ((70, 62, 124), (88, 70, 130))[k % 2]
        cv.poly([(x0, 90), (x0, top), (x0 + 12, top - 10), (x0 + 24, top), (x0 + 24, 90)], fill, BUILDING)
        for wx in (5, 14):
            for wy in (5, 16):
                cv.rrect(x0 + wx, top + wy, x0 + wx + 5, top + wy + 6, 0, (255, 214, 104), BUILDING)
    _band(cv, 82, 129, (92, 94, 118), GROUND)
    for k in range(5):
        cv.rrect(k * 32 - 6 + pan, 96, k * 32 + 8 + pan, 98, 1, (132, 134, 156), GROUND)
        cv.rrect(k * 32 + 10 + pan, 112, k * 32 + 24 + pan, 114, 1, (132, 134, 156), GROUND)


def room(cv: Canvas, sun: str, pan: float) -> None:
    """Peach wall with dots, skirting board, wooden floor, carpet; the sun looks in through the window."""
    _band(cv, 0, 84, (250, 212, 186), WALL)
    for row in range(4):
        for k in range(8):
            cv.ellipse(k * 19 + 9 * (row % 2) + pan, 10 + row * 20, 1.8, 1.8, (240, 184, 156), WALL)
    x = SUN_X[sun]
    cv.rrect(x - 14, 3, x + 14, 37, 2, (250, 250, 246), WINDOW)
    cv.rrect(x - 11.5, 5.5, x + 11.5, 34.5, 1, (140, 208, 248), WINDOW)
    cv.ellipse(x, SUN_Y, 8.5, 8.5, (255, 224, 64), SUN)
    cv.rrect(x - 11.5, 27, x + 11.5, 34.5, 1, (118, 196, 96), WINDOW)
    _band(cv, 80, 85, (250, 244, 232), WALL)
    _band(cv, 85, 129, (186, 124, 76), GROUND)
    for k in range(8):
        cv.rrect(k * 20 - 10 + pan, 85, k * 20 - 9 + pan, 129, 0, (160, 102, 60), GROUND)
    cv.ellipse(64, 117, 60, 11, (120, 176, 176), GROUND)
    cv.ellipse(64, 117, 53, 8.5, (150, 200, 196), GROUND)


def desert(cv: Canvas, sun: str, pan: float) -> None:
    """Apricot sky, red-brown dunes, cactus."""
    _band(cv, 0, 90, (255, 206, 128), SKY)
    _sun(cv, sun, (255, 246, 176), (255, 226, 140))
    cv.poly([(14 + pan, 84), (26 + pan, 52), (48 + pan, 52), (60 + pan, 84)], (204, 112, 72), HILL)
    cv.poly([(84 + pan, 84), (92 + pan, 60), (116 + pan, 60), (126 + pan, 84)], (204, 112, 72), HILL)
    for x, y in ((8, 80), (72, 78), (122, 82)):
        cv.stroke([(x + pan, y), (x + pan, y - 20)], 5, (70, 140, 84), PLANT)
        cv.stroke([(x + pan, y - 7), (x - 6 + pan, y - 7), (x - 6 + pan, y - 13)], 3.4, (70, 140, 84), PLANT)
        cv.stroke([(x + pan, y - 9), (x + 6 + pan, y - 9), (x + 6 + pan, y - 15)], 3.4, (70, 140, 84), PLANT)
    _band(cv, 79, 129, (226, 152, 84), GROUND)
    cv.ellipse(34 + pan, 84, 52, 8, (226, 152, 84), GROUND)
    for k in range(5):
        cv.ellipse(k * 31 + pan, 94 + 10 * (k % 3), 10, 1.4, (204, 126, 64), GROUND)


def meadow(cv: Canvas, sun: str, pan: float) -> None:
    """Bright blue sky with clouds, rolling light-green hills with flowers."""
    _band(cv, 0, 90, (112, 186, 252), SKY)
    _cloud(cv, 46 + pan, 12, WHITE)
    _cloud(cv, 84 + pan, 30, WHITE)
    cv.ellipse(28 + pan, 92, 60, 30, (120, 196, 84), HILL)
    cv.ellipse(112 + pan, 96, 52, 28, (120, 196, 84), HILL)
    _band(cv, 82, 129, (164, 222, 104), GROUND)
    for k in range(10):
        x, y = (k * 37) % 132 + pan, 88 + (k * 13) % 36
        cv.ellipse(x, y, 1.9, 1.9, (WHITE, (255, 170, 196))[k % 2], GROUND)
        cv.ellipse(x, y, 0.8, 0.8, (255, 214, 70), GROUND)
    _sun(cv, sun, (255, 224, 64), (214, 232, 190))


def lake(cv: Canvas, sun: str, pan: float) -> None:
    """Violet mountains with white tops, a deep blue lake, stony olive shore."""
    _band(cv, 0, 70, (250, 214, 222), SKY)
    _sun(cv, sun, (250, 148, 112), (252, 192, 182))
    for x, top, w in ((22, 34, 40), (70, 40, 34), (112, 32, 40)):
        x += pan
        cv.poly([(x - w, 70), (x, top), (x + w, 70)], (134, 124, 170), HILL)
        cv.poly([(x - w * 0.3, top + (70 - top) * 0.3), (x, top), (x + w * 0.3, top + (70 - top) * 0.3), (x, top + 7)],
                (246, 246, 252), HILL)  # fmt: skip
    _band(cv, 68, 96, (44, 96, 166), WATER)
    for k in range(6):
        cv.ellipse(k * 27 - 4 + pan, 75 + 8 * (k % 2), 8, 1.2, (96, 150, 208), WATER)
    _band(cv, 94, 129, (150, 150, 92), GROUND)
    for k in range(6):
        cv.ellipse(k * 26 + pan, 94, 15, 2.6, (150, 150, 92), GROUND)
        cv.ellipse(k * 25 + 8 + pan, 104 + 8 * (k % 3), 3.4, 1.8, (184, 182, 134), GROUND)


PAINTERS: dict[str, Callable[[Canvas, str, float], None]] = {
    "beach": beach, "forest": forest, "snow": snow, "town": town,
    "room": room, "desert": desert, "meadow": meadow, "lake": lake,
}  # fmt: skip
