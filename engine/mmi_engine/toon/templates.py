"""What the oracle expects to see: the world's parts drawn once, as colours at points of a local frame.

Place in the flow: made by the painters themselves (`places`, `characters`, `props`), used by `oracle` only. Colours are
CIE L*a*b* (D65), where equal distances look about equally different; 2.3 is just noticeable, palettes differ by > 20.
Everything is computed on first use and cached; nothing is learnt from data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from mmi_engine.toon.canvas import SIZE, Canvas, Color
from mmi_engine.toon.characters import HEADS, POSES, paint_character, paint_hat
from mmi_engine.toon.palette import BODY, ID, SHIRT, THING
from mmi_engine.toon.places import PAINTERS
from mmi_engine.toon.props import SHAPES, digit
from mmi_engine.toon.world import PLACES, SIDES, SPECIES, Scene

SOFT = 0.7  # Gaussian blur (px) of pictures and templates alike: takes the edge off noise and of subpixel shifts
PANS = tuple(range(-8, 9, 2))
COARSE = 32  # side of the thumbnails on which places are compared
_M = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
_M = (_M / np.array([[0.95047], [1.0], [1.08883]])).astype(np.float32)
_LINEAR = np.where(
    np.arange(256) / 255 <= 0.04045, np.arange(256) / 255 / 12.92, ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4
).astype(np.float32)


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB uint8 [..., 3] → CIE L*a*b* float32 [..., 3] (IEC 61966-2-1, CIE 15)."""
    xyz = _LINEAR[rgb] @ _M.T
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), xyz * (24389 / 27 / 116) + 16 / 116)
    out = np.empty_like(f)
    out[..., 0] = 116 * f[..., 1] - 16
    out[..., 1] = 500 * (f[..., 0] - f[..., 1])
    out[..., 2] = 200 * (f[..., 1] - f[..., 2])
    return out


def soften(image: Image.Image) -> np.ndarray:
    """RGB picture → softened uint8 array [h, w, 3]."""
    return np.asarray(image.filter(ImageFilter.GaussianBlur(SOFT)))


def color_lab(color: Color) -> np.ndarray:
    """One colour's L*a*b* [3]."""
    return lab(np.array(color, dtype=np.uint8))


@dataclass(frozen=True)
class Points:
    """Expected colours at points: xy [n, 2] in units around an origin, colors [n, 3] L*a*b*, opacity alpha [n]."""

    xy: np.ndarray
    colors: np.ndarray
    alpha: np.ndarray

    def over(self, behind: np.ndarray) -> np.ndarray:
        """Colours [n, 3] that the points show before the given colours."""
        return behind + (self.colors - behind) * self.alpha[:, None]


def _points(xy: np.ndarray, colors: np.ndarray, alpha: np.ndarray) -> Points:
    return Points(*(np.ascontiguousarray(a, dtype=np.float32) for a in (xy, colors, alpha)))


def _cutout(
    paint: Callable[[Canvas], None], size: int, x: float, y: float, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """RGB uint8 and opacity [size, size] of what `paint(canvas)` draws with its origin at (x, y)."""
    shots = []
    for base in ((0, 0, 0), (255, 255, 255)):
        cv = Canvas(base=base, size=size)
        cv.at(x, y, scale)
        paint(cv)
        shots.append(soften(cv.rgb()).astype(np.float32))
    alpha = 1.0 - (shots[1] - shots[0]).mean(axis=-1) / 255.0
    rgb = shots[0] / np.maximum(alpha, 0.05)[..., None]
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8), np.clip(alpha, 0.0, 1.0)


@lru_cache(maxsize=160)
def background(place: str, sun: str, pan: float) -> np.ndarray:
    """The softened empty place, L*a*b* [128, 128, 3]."""
    cv = Canvas()
    PAINTERS[place](cv, sun, pan)
    return lab(soften(cv.rgb()))


@lru_cache(maxsize=1)
def thumbnails() -> tuple[list[tuple[str, str, int]], np.ndarray]:
    """Keys (place, sun side, pan) and L*a*b* thumbnails [K, 32, 32, 3] of all places."""
    keys = [(place, sun, pan) for place in PLACES for sun in SIDES for pan in PANS]
    shots = []
    for place, sun, pan in keys:
        cv = Canvas()
        PAINTERS[place](cv, sun, pan)
        shots.append(np.asarray(cv.rgb().reduce(SIZE // COARSE)))
    return keys, lab(np.stack(shots))


@lru_cache(maxsize=64)
def figure(character: str, action: str) -> tuple[Points, np.ndarray, np.ndarray, np.ndarray]:
    """A hatless figure around the centre of its number field: points on head and limbs, which of them wear the
    shirt's colour (bool [n]), and which belong to the head (bool [n]); and points [m, 2] well inside the shirt.
    The number field and the hat's seat are left out."""
    pose = POSES[action]
    ox, oy = pose.torso[0], pose.torso[1] + 1.5
    scene = Scene(character, "snow", action, "red", 88, "none", "left", (), x=80.0 - ox, y=90.0 - oy, scale=1.0)
    scene = replace(scene, y=scene.y + pose.lift)
    rgb, alpha = _cutout(lambda cv: paint_character(cv, scene), 176, 0, 0, 1.0)
    cv = Canvas(semantic=True, size=176)
    paint_character(cv, scene)
    labels = cv.labels()
    ys, xs = np.nonzero((alpha > 0.97) & (labels != 0) & (labels != ID["number"]))
    xy = np.stack([xs + 0.5 - 80.0, ys + 0.5 - 90.0], axis=1)
    hx, hy = pose.head[0] - ox, pose.head[1] - oy
    hat = (np.abs(xy[:, 0] - hx) < 28) & (xy[:, 1] < hy - 7.5) & (labels[ys, xs] == ID["head"])
    keep = ~hat & (xs % 2 == 0) & (ys % 2 == 0)
    wears = labels[ys, xs] == ID["shirt"]
    ink = lab(rgb[ys, xs])[:, 0] < 35
    colors = lab(rgb[ys, xs])
    red = np.linalg.norm(colors - color_lab(SHIRT["red"]), axis=1) < 12
    keep &= ~wears | red | ink
    head = labels[ys, xs] == ID["head"]
    core = (labels == ID["shirt"]) & (np.linalg.norm(lab(rgb) - color_lab(SHIRT["red"]), axis=-1) < 12)
    for axis in (0, 1):
        core &= np.roll(core, 1, axis) & np.roll(core, -1, axis)
    return _points(xy[keep], colors[keep], alpha[ys, xs][keep]), (wears & red)[keep], head[keep], _grid_points(core)


def _grid_points(mask: np.ndarray) -> np.ndarray:
    ys, xs = np.nonzero(mask)
    return np.stack([xs + 0.5 - 80.0, ys + 0.5 - 90.0], axis=1).astype(np.float32)


@lru_cache(maxsize=256)
def headdress(character: str, asleep: bool, hat: str) -> Points:
    """Head top with a hat (or none) around the head's centre, on a 56 × 34 unit window, with opacity."""
    cv_size, ox, oy = 80, 40.0, 50.0

    def paint(cv: Canvas) -> None:
        HEADS[SPECIES[character]](cv, BODY[character], asleep)
        paint_hat(cv, hat)

    rgb, alpha = _cutout(paint, cv_size, ox, oy, 1.0)
    ys, xs = np.mgrid[10:44:2, 12:68:2]
    xy = np.stack([xs.ravel() + 0.5 - ox, ys.ravel() + 0.5 - oy], axis=1)
    return _points(xy, lab(rgb[ys, xs]).reshape(-1, 3), alpha[ys, xs].ravel())


@lru_cache(maxsize=64)
def prop_points(kind: str, color: str) -> tuple[Points, tuple[float, float, float, float]]:
    """A prop in its unit frame (22 × 22 samples around it) and its extent (x0, y0, x1, y1) in units. Signs show no
    digit."""
    side, unit = 44, 32.0

    def paint(cv: Canvas) -> None:
        if kind == "sign":
            SHAPES[kind](cv, THING[color], ID[kind], 8)
        else:
            SHAPES[kind](cv, THING[color], ID[kind], 0)

    rgb, alpha = _cutout(paint, side, side / 2, side - 6.0, unit)
    solid = alpha > 0.5
    ys, xs = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    extent = ((xs[0] - side / 2) / unit, (ys[0] - side + 6.0) / unit,
              (xs[-1] + 1 - side / 2) / unit, (ys[-1] + 1 - side + 6.0) / unit)  # fmt: skip
    gy, gx = np.mgrid[0:side, 0:side]
    keep = ((gx % 2) == 0) & ((gy % 2) == 0)
    if kind == "sign":  # what is written on it is read separately
        keep &= ~((np.abs(gx + 0.5 - side / 2) / unit < 0.2) & (np.abs((gy + 0.5 - side + 6.0) / unit + 0.6) < 0.28))
    xy = np.stack([(gx[keep] + 0.5 - side / 2) / unit, (gy[keep] + 0.5 - side + 6.0) / unit], axis=1)
    return _points(xy, lab(rgb[keep]), alpha[keep]), extent


GRID = 2  # samples per unit on which digits are compared
DIGIT_WINDOW = (6.6, 10.0)  # half width and height of a digit's window in units


@lru_cache(maxsize=1)
def digits() -> np.ndarray:
    """Darkness of the ten digits, each [h, w] sampled GRID times per unit on its window, zero mean and unit norm."""
    hw, hh = DIGIT_WINDOW
    out = []
    for value in range(10):
        cv = Canvas(base=(255, 255, 255), size=64)
        cv.at(32, 32, float(GRID))
        digit(cv, value, 0, 0, 1.0, 0)
        dark = 255.0 - np.asarray(cv.rgb().filter(ImageFilter.GaussianBlur(SOFT * GRID)).convert("L"), dtype=np.float32)
        rows, cols = round(hh * GRID), round(hw * GRID)
        window = dark[32 - rows : 32 + rows, 32 - cols : 32 + cols]
        window = window - window.mean()
        out.append(window / np.linalg.norm(window))
    return np.stack(out)
