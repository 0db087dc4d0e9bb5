"""The oracle's eyesight: colour distances, the place, the number field, the digits, the shirt's colour.

Place in the flow: first half of `oracle.read`. A View is a softened picture in CIE L*a*b*, [128, 128, 3].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmi_engine.toon import templates as t
from mmi_engine.toon.canvas import SIZE
from mmi_engine.toon.characters import PLATE_HALF
from mmi_engine.toon.palette import DIGIT, PLATE, SHIRT
from mmi_engine.toon.world import SIDES

UNREADABLE = "unreadable"
CLIP = 40.0  # colour distances above this count alike: an occluder must not outvote the rest
MARGIN = 64  # px around the picture in which points may still lie
WIDE = SIZE + 2 * MARGIN
NOWHERE = 1000.0  # a "colour" far from all others
SCALES = (0.88, 0.91, 0.94, 0.97, 1.0)


@dataclass(frozen=True)
class View:
    """A picture prepared for reading: softened L*a*b* [128, 128, 3], its thumbnail [32, 32, 3], and the flat colours
    [(128 + 2 MARGIN)², C] of the picture within a margin of NOWHERE."""

    lab: np.ndarray
    small: np.ndarray
    flat: np.ndarray

    def at(self, xy: np.ndarray, x: float, y: float, scale: float) -> np.ndarray:
        """Colours [n, C] at points `xy` [n, 2] (units around (x, y) px); NOWHERE outside the picture."""
        where = (xy * np.float32(scale) + np.array([x + MARGIN, y + MARGIN], np.float32)).astype(np.int32)
        return self.flat.take(where[:, 1] * WIDE + where[:, 0], axis=0, mode="clip")


def flatten(*pictures: np.ndarray) -> np.ndarray:
    """L*a*b* pictures [128, 128, 3] side by side in the channels, framed by NOWHERE, flat [(128 + 2 MARGIN)², C]."""
    frame = ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))
    joined = np.pad(np.concatenate(pictures, axis=-1), frame, constant_values=NOWHERE)
    return joined.reshape(WIDE * WIDE, -1)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Clipped Euclidean colour distance along the last axis."""
    d = a - b
    d *= d
    return np.minimum(np.sqrt(d[..., 0] + d[..., 1] + d[..., 2]), CLIP)


def prepare(image: Image.Image) -> View:
    picture = image.convert("RGB")
    if picture.size != (SIZE, SIZE):
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    soft = t.lab(t.soften(picture))
    return View(soft, t.lab(np.asarray(picture.reduce(SIZE // t.COARSE))), flatten(soft))


# ---------------------------------------------------------------- place


@dataclass(frozen=True)
class Setting:
    """Best guess of place, sun side and pan (px); `clear` and `sun_clear` say whether the guess may be told."""

    place: str
    sun: str
    pan: float
    cost: float
    margin: float
    sun_margin: float

    @property
    def clear(self) -> bool:
        """The place fits, and clearly better than any other."""
        return self.cost < 27.0 and self.margin > 1.5

    @property
    def sun_clear(self) -> bool:
        """The sun's side is beyond doubt."""
        return self.clear and self.sun_margin > 1.5


def read_place(view: View) -> Setting:
    """Compare the picture with the eight empty places, then settle the sun's side and the pan to a pixel."""
    keys, shots = t.thumbnails()
    costs = distance(shots, view.small).mean(axis=(1, 2))
    best = int(np.argmin(costs))
    place, sun, pan = keys[best][0], keys[best][1], float(keys[best][2])
    rival = min(c for c, key in zip(costs, keys, strict=True) if key[0] != place)
    sides = {}
    for side in SIDES:
        ground = t.background(place, side, pan)
        boxes = (slice(3, 34), slice(2, 30)), (slice(3, 34), slice(98, 126))
        sides[side] = float(np.mean([distance(ground[b], view.lab[b]).mean() for b in boxes]))
    sun = min(sides, key=sides.__getitem__)
    for step in (1.0, 0.5):
        near = {p: float(distance(t.background(place, sun, p), view.lab).mean()) for p in (pan - step, pan, pan + step)}
        pan = min(near, key=near.__getitem__)
    margin = abs(sides["left"] - sides["right"])
    return Setting(place, sun, pan, float(costs[best]), float(rival - costs[best]), margin)


# ---------------------------------------------------------------- number field


def _windows(table: np.ndarray, inset: int, w: int, h: int) -> np.ndarray:
    """Sums over every h × w window shrunk by `inset` on all sides (grown where negative), from a summed-area table;
    windows start 3 px or more inside the picture."""
    rows, cols = SIZE - h - 5, SIZE - w - 5
    y0, x0, y1, x1 = 3 + inset, 3 + inset, 3 + h - inset, 3 + w - inset
    corner = [table[y : y + rows, x : x + cols] for y, x in ((y1, x1), (y0, x1), (y1, x0), (y0, x0))]
    return corner[0] - corner[1] - corner[2] + corner[3]


def find_plates(view: View, count: int = 5) -> list[tuple[float, float, float, float]]:
    """Score, centre x and y (px) and scale of the best candidates for the number field, best first: a white border,
    ink inside, another colour around. Candidates are at least 8 px apart."""
    white = np.clip(1.5 - np.linalg.norm(view.lab - t.color_lab(PLATE), axis=-1) / 20.0, 0.0, 1.0)
    dark = np.clip(1.5 - np.linalg.norm(view.lab - t.color_lab(DIGIT), axis=-1) / 24.0, 0.0, 1.0)
    tables = []
    for plane in (white, dark):
        table = np.zeros((SIZE + 1, SIZE + 1), np.float32)
        table[1:, 1:] = plane.cumsum(0).cumsum(1)
        tables.append(table)
    found: list[tuple[float, float, float, float]] = []
    half_w, half_h = PLATE_HALF
    for scale in SCALES:
        w, h = round(2 * half_w * scale), round(2 * half_h * scale)
        outer, field_, inner = (_windows(tables[0], inset, w, h) for inset in (-3, 0, 2))
        ring = (field_ - inner) / (w * h - (w - 4) * (h - 4))
        rim = (outer - field_) / ((w + 6) * (h + 6) - w * h)
        ink = _windows(tables[1], 2, w, h) / ((w - 4) * (h - 4))
        score = ring - 1.2 * rim + 1.5 * np.minimum(ink, 0.25) + 0.6 * field_ / (w * h)
        for _ in range(count):
            row, col = np.unravel_index(int(np.argmax(score)), score.shape)
            found.append((float(score[row, col]), col + 3 + w / 2, row + 3 + h / 2, scale))
            score[max(0, row - 8) : row + 9, max(0, col - 8) : col + 9] = -9.0
    found.sort(reverse=True)
    apart: list[tuple[float, float, float, float]] = []
    for one in found:
        if all(max(abs(one[1] - other[1]), abs(one[2] - other[2])) >= 8 for other in apart):
            apart.append(one)
    return apart[:count]


def read_digits(view: View, x: float, y: float, zoom: float, centres: tuple[float, ...]) -> list[int | None]:
    """Digits at the given centres (units right of (x, y) px; zoom px per unit); None where no digit is clear."""
    hw, hh = t.DIGIT_WINDOW
    rows, cols = round(hh * t.GRID), round(hw * t.GRID)
    reach = 3  # shifts tried, in samples either way
    us = (np.arange(-cols - reach, cols + reach) + 0.5) / t.GRID
    vs = (np.arange(-rows - reach, rows + reach) + 0.5) / t.GRID
    bank = t.digits().reshape(10, -1)
    out: list[int | None] = []
    for centre in centres:
        window = -_bilinear(view.lab[..., 0], x + (centre + us) * zoom - 0.5, y + vs * zoom - 0.5)
        patches = np.lib.stride_tricks.sliding_window_view(window, (2 * rows, 2 * cols)).reshape(-1, bank.shape[1])
        patches = patches - patches.mean(axis=1, keepdims=True)
        patches /= np.linalg.norm(patches, axis=1, keepdims=True) + 1e-6
        scores = (patches @ bank.T).max(axis=0)
        order = np.argsort(scores)
        clear = scores[order[-1]] > 0.6 and scores[order[-1]] - scores[order[-2]] > 0.015
        out.append(int(order[-1]) if clear else None)
    return out


def _bilinear(plane: np.ndarray, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Values of plane [h, w] at the grid of columns px and rows py (pixel centres at integers), edges repeated."""
    x, y = px.clip(0, SIZE - 1.001), py.clip(0, SIZE - 1.001)
    x0, y0 = x.astype(np.intp), y.astype(np.intp)
    fx, fy = (x - x0)[None, :], (y - y0)[:, None]
    top, low = plane[y0], plane[y0 + 1]
    rows = top + (low - top) * fy
    return rows[:, x0] * (1 - fx) + rows[:, x0 + 1] * fx


def rim_points() -> np.ndarray:
    """Points [n, 2] on the shirt beside and below the number field, in units around the field's centre."""
    half_w, half_h = PLATE_HALF
    side = [(sign * (half_w + d), v) for sign in (-1, 1) for d in (1.2, 1.9, 2.6) for v in np.arange(-9, 10, 1.0)]
    below = [(u, half_h + d) for d in (1.1, 1.7) for u in np.arange(-12, 13, 1.0)]
    return np.array(side + below, np.float32)


def read_shirt(view: View, points: np.ndarray, x: float, y: float, scale: float) -> tuple[str, float]:
    """The shirt colour that fits best at points [n, 2] (units around (x, y) px), and its margin over the second best:
    the difference of the median colour distances."""
    colors = view.at(points, x, y, scale)
    names = list(SHIRT)
    palette = np.stack([t.color_lab(SHIRT[name]) for name in names])
    votes = np.median(distance(colors[:, None], palette[None]), axis=0)
    order = np.argsort(votes)
    return names[order[0]], float(votes[order[1]] - votes[order[0]])
