"""The oracle: attributes read back from a picture by geometry and palette, nothing learnt.

Place in the flow: pixels → Reading; `score` compares Readings with the truth. Order of reading: the place with the side
of its sun (thumbnails against the eight empty places), the white number field (the one light rectangle with a coloured
rim), the two digits (normalised correlation), the shirt's colour (median of the rim), character and pose (expected
colours at the points of each figure), the hat (thirteen hypotheses over the head), the props (what neither place nor
figure explains). Whatever does not fit well enough, or not clearly better than the second best, is "unreadable".
Input: RGB picture, resized to 128 × 128 px if need be. Frozen before model selection and never used in training.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from mmi_engine.toon import templates as t
from mmi_engine.toon.canvas import SIZE, Canvas
from mmi_engine.toon.characters import POSES, paint_character
from mmi_engine.toon.draw import render, semantic_map
from mmi_engine.toon.palette import SHIRT, THING
from mmi_engine.toon.sight import (
    CLIP,
    UNREADABLE,
    View,
    distance,
    find_plates,
    flatten,
    prepare,
    read_digits,
    read_place,
    read_shirt,
    rim_points,
)
from mmi_engine.toon.texts import BODY_CLASSES, Box, box_of
from mmi_engine.toon.world import ACTIONS, CHARACTERS, HATS, PROPS, Prop, Scene

GOOD, POOR = 19.0, 25.0  # figure fits: up to GOOD one is there, up to POOR if a number can be read on it as well
SMALLEST, LARGEST = 23.0, 34.5  # heights in px within which props are sought


@dataclass(frozen=True)
class Reading:
    """What a picture shows. Strings are a value of the world or "unreadable"; numbers are ints or "unreadable".

    props: "colour kind", sorted, or "unreadable". scene: the reconstruction, None if there is no figure. box: the main
    character, xyxy px, None likewise. fit: mean colour distance of the explanation, for diagnosis.
    """

    place: str = UNREADABLE
    sun: str = UNREADABLE
    character: str = UNREADABLE
    action: str = UNREADABLE
    shirt: str = UNREADABLE
    number: int | str = UNREADABLE
    hat: str = UNREADABLE
    props: tuple[str, ...] | str = UNREADABLE
    sign: int | str | None = None
    scene: Scene | None = None
    box: Box | None = None
    fit: dict[str, float] = field(default_factory=dict)

    def attributes(self) -> dict[str, Any]:
        """The discrete attributes by name."""
        names = ("place", "sun", "character", "action", "shirt", "number", "hat", "props")
        return {name: getattr(self, name) for name in names}


# ---------------------------------------------------------------- figure


def _figure_cost(view: View, pair: tuple[str, str], shirt: np.ndarray, x: float, y: float, scale: float) -> float:
    """Mean colour distance of a figure (character, action) around its number field at (x, y) px; head and limbs count
    alike, points outside the picture count as misses."""
    points, wears, head, _ = t.figure(*pair)
    cost = distance(view.at(points.xy, x, y, scale), np.where(wears[:, None], shirt, points.colors))
    split = int(np.count_nonzero(head))
    of_head = float(cost @ head)
    return 0.5 * of_head / split + 0.5 * (float(cost.sum()) - of_head) / (len(cost) - split)


def _read_figure(view: View, shirt: np.ndarray, x: float, y: float, scale: float) -> tuple[Scene, dict[str, float]]:
    """Character, action and exact place of the figure whose number field was found; fits with margins."""
    pairs = [(character, action) for character in CHARACTERS for action in ACTIONS]
    first = sorted((_figure_cost(view, pair, shirt, x, y, scale), pair) for pair in pairs)
    found: list[tuple[float, tuple[str, str], float, float, float]] = []
    for cost, pair in first[:3]:
        best = (cost, pair, x, y, scale)
        for step in (1.0, 1.0, 0.5):
            _, _, bx, by, bs = best
            moves = [(dx, dy, 0.0) for dx in (-step, 0, step) for dy in (-step, 0, step)]
            moves += [(0.0, 0.0, -0.02 * step), (0.0, 0.0, 0.02 * step)]
            for dx, dy, ds in moves:
                trial = _figure_cost(view, pair, shirt, bx + dx, by + dy, bs + ds)
                if trial < best[0]:
                    best = (trial, pair, bx + dx, by + dy, bs + ds)
        found.append(best)
    found.sort()
    cost, (character, action), px, py, ps = found[0]

    def rival(index: int, value: str) -> float:
        others = [c for c, pair, *_ in found if pair[index] != value] + [c for c, pair in first if pair[index] != value]
        return min(others) - cost

    pose = POSES[action]
    ox, oy = pose.torso[0], pose.torso[1] + 1.5 - pose.lift
    scene = Scene(character, "snow", action, "red", 10, "none", "left", (), px - ox * ps, py - oy * ps, ps)
    fits = {"figure": cost, "character_margin": rival(0, character), "action_margin": rival(1, action)}
    return scene, fits


def _find_figure(view: View) -> tuple[Scene | None, dict[str, float]]:
    """The figure at the most promising number field around which a figure really stands; None where no field is."""
    best: tuple[Scene | None, dict[str, float]] = (None, {"figure": CLIP})
    for score, x, y, scale in find_plates(view):
        if score < 0.35 or best[1]["figure"] < 13.0:
            break
        shirt, _ = read_shirt(view, rim_points(), x, y, scale)
        scene, fits = _read_figure(view, t.color_lab(SHIRT[shirt]), x, y, scale)
        if fits["figure"] < best[1]["figure"]:
            best = (scene, {**fits, "plate": score})
    return best


def _read_hat(view: View, scene: Scene, ground: np.ndarray) -> tuple[str, float]:
    """The hat on the head of a located figure, and its margin over the second best."""
    pose = POSES[scene.action]
    x = scene.x + pose.head[0] * scene.scale
    y = scene.y + (pose.head[1] - pose.lift) * scene.scale
    pair = replace(view, flat=flatten(view.lab, ground))
    costs = []
    for hat in HATS:
        points = t.headdress(scene.character, pose.asleep, hat)
        colors = pair.at(points.xy, x, y, scene.scale)
        costs.append(float(distance(colors[:, :3], points.over(colors[:, 3:])).mean()))
    order = np.argsort(costs)
    return HATS[order[0]], costs[order[1]] - costs[order[0]]


# ---------------------------------------------------------------- props


def _grow(mask: np.ndarray, times: int) -> np.ndarray:
    """Dilation by a 3 × 3 square, `times` times."""
    for _ in range(times):
        wide = mask.copy()
        wide[1:] |= mask[:-1]
        wide[:-1] |= mask[1:]
        mask = wide.copy()
        mask[:, 1:] |= wide[:, :-1]
        mask[:, :-1] |= wide[:, 1:]
    return mask


def _majority(mask: np.ndarray) -> np.ndarray:
    """Pixels with at least six of the nine around them set."""
    padded = np.pad(mask, 1).astype(np.int8)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) >= 6


def _blocks(picture: np.ndarray) -> np.ndarray:
    """Mean over the 3 × 3 pixels around each, [128, 128, 3]: noise goes down, a prop of 30 px does not."""
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9.0


def _unexplained(view: View, expected: np.ndarray, scene: Scene) -> np.ndarray:
    """Mask [128, 128] of what neither the place nor the figure accounts for."""
    cv = Canvas(semantic=True)
    paint_character(cv, scene)
    covered = _grow(cv.labels() > 0, 2)
    if scene.action == "sleeping":  # the letters Z
        x0, x1 = (int(scene.x + u * scene.scale) for u in (-6, 14))
        y0, y1 = (max(0, int(scene.y + v * scene.scale)) for v in (-69, -38))
        covered[y0:y1, max(0, x0) : x1] = True
    padded = np.pad(_blocks(expected), ((0, 0), (1, 1), (0, 0)), mode="edge")  # the scenery may be a pixel off
    seen = _blocks(view.lab)
    off = np.minimum.reduce([distance(seen, padded[:, k : k + SIZE]) for k in range(3)])
    limit = 11.0 + 1.5 * float(np.median(off[~covered]))
    mask = _majority((off > limit) & ~covered)
    top = scene.y - 34.0 * scene.scale - 36.0 if scene.action == "sleeping" else 73.0
    mask[: max(0, int(top))] = False
    return mask


def _runs(columns: np.ndarray, low: int, high: int, gap: int = 2) -> list[tuple[int, int]]:
    """Runs [start, stop) of filled columns between low and high, bridging gaps of up to `gap`; widest mass first."""
    runs: list[tuple[int, int]] = []
    for col in range(max(0, low), min(SIZE, high)):
        if columns[col] < 2:
            continue
        if runs and col - runs[-1][1] <= gap:
            runs[-1] = (runs[-1][0], col + 1)
        else:
            runs.append((col, col + 1))
    return sorted(runs, key=lambda run: -int(columns[run[0] : run[1]].sum()))


def _spans(mask: np.ndarray, scene: Scene) -> list[tuple[int, int]]:
    """Column spans that hold one prop each: one on either side of the figure, or one or two behind a sleeper."""
    columns = mask.sum(axis=0)
    if scene.action != "sleeping":
        middle = int(round(scene.x))
        spans = [runs[0] for runs in (_runs(columns, 0, middle), _runs(columns, middle, SIZE)) if runs]
    else:
        runs = _runs(columns, 60, SIZE, gap=0)
        spans = sorted(runs[:2])
        if len(spans) == 1 and spans[0][1] - spans[0][0] > 38:
            cut = 98 - 5 + int(np.argmin(columns[93:103]))
            spans = [(spans[0][0], cut), (cut, spans[0][1])]
    return [_densest(columns, span) for span in spans if columns[span[0] : span[1]].sum() >= 60]


def _densest(columns: np.ndarray, span: tuple[int, int], limit: int = 34) -> tuple[int, int]:
    """The part of a span, at most `limit` columns wide, that holds the most pixels: no prop is wider."""
    start, stop = span
    if stop - start <= limit:
        return span
    sums = np.convolve(columns[start:stop], np.ones(limit, int), mode="valid")
    best = start + int(np.argmax(sums))
    return best, best + limit


def _prop_cost(pair: View, prop: Prop) -> float:
    """Mean colour distance of a prop drawn over the reconstruction; `pair` holds picture and reconstruction."""
    points, _ = t.prop_points(prop.kind, prop.color)
    colors = pair.at(points.xy, prop.x, prop.y, prop.size)
    return float(distance(colors[:, :3], points.over(colors[:, 3:])).mean())


def _read_prop(pair: View, mask: np.ndarray, span: tuple[int, int], base: float) -> tuple[Prop, float, float]:
    """The prop within a column span, its fit and its margin over any other kind or colour.

    Args:
        base: height in px at which such a scene's props stand, on average.
    """
    part = np.zeros_like(mask)
    part[:, span[0] : span[1]] = mask[:, span[0] : span[1]]
    rows = np.flatnonzero(part.sum(axis=1) >= 2)
    top, middle = float(rows[0]), (span[0] + span[1]) / 2
    palette = np.stack([t.color_lab(c) for c in THING.values()])
    near = distance(pair.lab[part][:, None], palette[None])
    votes = np.bincount(near.argmin(axis=1)[near.min(axis=1) < 24.0], minlength=len(THING))
    names = [list(THING)[k] for k in np.argsort(-votes)[:3]]
    trials = []
    for color in names:
        for kind in PROPS:
            _, (x0, y0, x1, _) = t.prop_points(kind, color)
            for size in (27.0, 31.0):
                for y in (top - y0 * size, base):
                    prop = Prop(kind, color, middle - (x0 + x1) / 2 * size, y, size)
                    trials.append((_prop_cost(pair, prop), prop))
    trials.sort(key=lambda trial: trial[0])
    best: dict[tuple[str, str], tuple[float, Prop]] = {}
    for cost, prop in trials[:10]:
        key = (prop.kind, prop.color)
        if key in best:
            continue
        for step in (3.0, 1.5, 1.0, 0.5):
            old = prop
            for dx, dy, ds in (
                (-1, 0, 0),
                (1, 0, 0),
                (0, -1, 0),
                (0, 1, 0),
                (0, 0, -1),
                (0, 0, 1),
                (0, 1, 1),
                (0, -1, -1),
            ):
                size = min(max(old.size + ds * step, SMALLEST), LARGEST)
                moved = Prop(old.kind, old.color, old.x + dx * step, old.y + dy * step, size)
                trial = _prop_cost(pair, moved)
                if trial < cost:
                    cost, prop = trial, moved
        best[key] = (cost, prop)
    (cost, prop), *others = sorted(best.values(), key=lambda entry: entry[0])
    rivals = [c for c, _ in others] + [c for c, p in trials if (p.kind, p.color) not in best]
    return prop, cost, min(rivals, default=CLIP) - cost


def _read_props(view: View, scene: Scene) -> tuple[tuple[Prop, ...], bool, dict[str, float]]:
    """All props of a located figure's scene; whether every one of them is clear; fits."""
    expected = t.lab(t.soften(render(scene)))
    mask = _unexplained(view, expected, scene)
    pair = replace(view, flat=flatten(view.lab, expected))
    base = scene.y - 34.0 * scene.scale if scene.action == "sleeping" else scene.y
    props, clear, fits = [], True, {}
    for k, span in enumerate(_spans(mask, scene)):
        prop, cost, margin = _read_prop(pair, mask, span, base - 1.5)
        if prop.kind == "sign":
            (value,) = read_digits(view, prop.x, prop.y - 0.6 * prop.size, 0.029 * prop.size, (0.0,))
            prop = Prop(prop.kind, prop.color, prop.x, prop.y, prop.size, value or 0)
        clear &= cost < 15.0 and margin > 0.15
        fits |= {f"prop{k}": cost, f"prop{k}_margin": margin}
        props.append(prop)
    return tuple(props), clear and bool(props), fits


# ---------------------------------------------------------------- the whole picture


def read(image: Image.Image) -> Reading:
    """Read all attributes of a picture (any size or mode; brought to RGB 128 × 128)."""
    view = prepare(image)
    setting = read_place(view)
    fit = {"place": setting.cost, "place_margin": setting.margin, "sun_margin": setting.sun_margin}
    told: dict[str, Any] = {
        "place": setting.place if setting.clear else UNREADABLE,
        "sun": setting.sun if setting.sun_clear else UNREADABLE,
    }
    scene, fits = _find_figure(view)
    fit |= fits
    if scene is None or fit["figure"] > POOR:
        return Reading(**told, fit=fit)
    pose = POSES[scene.action]
    cx = scene.x + pose.torso[0] * scene.scale
    cy = scene.y + (pose.torso[1] + 1.5 - pose.lift) * scene.scale
    tens, ones = read_digits(view, cx, cy, scene.scale, (-7.2, 7.2))
    if fit["figure"] > GOOD and (tens is None or ones is None):
        return Reading(**told, fit=fit)
    core = t.figure(scene.character, scene.action)[3]
    shirt, fit["shirt_margin"] = read_shirt(view, core, cx, cy, scene.scale)
    hat, fit["hat_margin"] = _read_hat(view, scene, t.background(setting.place, setting.sun, setting.pan))
    number = UNREADABLE if tens is None or ones is None or tens == 0 else 10 * tens + ones
    told |= {
        "character": scene.character if fit["character_margin"] > 0.5 else UNREADABLE,
        "action": scene.action if fit["action_margin"] > 0.3 else UNREADABLE,
        "shirt": shirt if fit["shirt_margin"] > 2.0 else UNREADABLE,
        "number": number,
        "hat": hat if fit["hat_margin"] > 0.15 else UNREADABLE,
    }
    seen = replace(
        scene, place=setting.place, sun=setting.sun, pan=setting.pan, hat=hat,
        shirt=shirt, number=number if isinstance(number, int) else 88,
    )  # fmt: skip
    props, clear, fits = _read_props(view, seen)
    seen = replace(seen, props=props)
    signs = [p.digit or UNREADABLE for p in props if p.kind == "sign"]
    return Reading(
        **told,
        props=tuple(sorted(f"{p.color} {p.kind}" for p in props)) if clear else UNREADABLE,
        sign=signs[0] if signs else None,
        scene=seen,
        box=box_of(semantic_map(seen), *BODY_CLASSES),
        fit=fit | fits,
    )


def read_map(image: Image.Image, reading: Reading | None = None) -> np.ndarray:
    """The picture's semantic map, uint8 [128, 128]: every pixel takes the class of the most similar pixel of the
    oracle's reconstruction within 3 px; 0 (unlabelled) where nothing there resembles it or there is no reconstruction.

    Args:
        reading: read(image), if already at hand.
    """
    reading = reading or read(image)
    if reading.scene is None:
        return np.zeros((SIZE, SIZE), np.uint8)
    view = prepare(image)
    model, classes = t.lab(t.soften(render(reading.scene))), semantic_map(reading.scene)
    labels = classes.copy()
    best = distance(view.lab, model) - 2.0  # the same place is preferred
    for dy in (-3, -2, -1, 0, 1, 2, 3):
        for dx in (-3, -2, -1, 0, 1, 2, 3):
            rows, cols = np.arange(SIZE) + dy, np.arange(SIZE) + dx
            grid = np.ix_(rows.clip(0, SIZE - 1), cols.clip(0, SIZE - 1))
            cost = distance(view.lab, model[grid]) + 0.7 * float(np.hypot(dx, dy))
            better = cost < best
            best = np.where(better, cost, best)
            labels = np.where(better, classes[grid], labels)
    labels[best > 28.0] = 0
    return labels.astype(np.uint8)
