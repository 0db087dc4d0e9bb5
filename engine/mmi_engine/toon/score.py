"""From readings to figures: how often a model's pictures and sentences agree with the truth.

Place in the flow: the last step of an evaluation on the embedded world. Pictures go through `oracle.read`, sentences
through `texts.parse_text`; truth is the Scene in a row's meta. "unreadable" counts as wrong. Every Figure carries its
counts, and beside it chance (a uniform guess) and majority (the most frequent true answer, always given).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmi_engine.toon import oracle
from mmi_engine.toon.palette import CLASSES
from mmi_engine.toon.sight import UNREADABLE
from mmi_engine.toon.texts import parse_box, parse_text
from mmi_engine.toon.world import ACTIONS, CHARACTERS, HATS, PLACES, PROP_COLORS, PROPS, SHIRTS, SIDES, Scene

UNSTATED = ("shirt", "number", "hat", "sun")
STATED = ("character", "place", "action", "props")
_KINDS = len(PROPS) * len(PROP_COLORS)
CHOICES = {
    "character": len(CHARACTERS), "place": len(PLACES), "action": len(ACTIONS), "shirt": len(SHIRTS), "number": 90,
    "hat": len(HATS), "sun": len(SIDES), "props": _KINDS + _KINDS * (len(PROPS) - 1) * (len(PROP_COLORS) - 1) // 2,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A share of right answers.

    right of total; unreadable: how many of the wrong ones could not be read at all; chance and majority: the shares
    (0..1) that a uniform guess and the constant most frequent truth would reach, None where they make no sense.
    """

    right: int
    total: int
    unreadable: int = 0
    chance: float | None = None
    majority: float | None = None

    @property
    def share(self) -> float:
        """right / total, NaN without items."""
        return self.right / self.total if self.total else math.nan

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's score interval of the share (95 % by default); items are taken as independent."""
        n = self.total
        if n == 0:
            return math.nan, math.nan
        p, w = self.share, z * z / n
        middle = (p + w / 2) / (1 + w)
        half = z / (1 + w) * math.sqrt(p * (1 - p) / n + w / (4 * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_json(self) -> dict[str, Any]:
        """Plain values for metrics.json."""
        low, high = self.interval()
        return {
            "share": self.share, "right": self.right, "total": self.total, "unreadable": self.unreadable,
            "low": low, "high": high, "chance": self.chance, "majority": self.majority,
        }  # fmt: skip


@dataclass
class _Tally:
    """Counts for one figure."""

    choices: int | None = None
    right: int = 0
    unreadable: int = 0

    def __post_init__(self) -> None:
        self.truths: Counter[Any] = Counter()

    def add(self, truth: Any, said: Any) -> bool:
        self.truths[truth] += 1
        self.right += said == truth
        self.unreadable += said == UNREADABLE
        return bool(said == truth)

    def figure(self) -> Figure:
        total = self.truths.total()
        majority = self.truths.most_common(1)[0][1] / total if total else None
        return Figure(self.right, total, self.unreadable, 1 / self.choices if self.choices else None, majority)


def truth(scene: Scene) -> dict[str, Any]:
    """A scene's attributes in the oracle's terms (props as sorted "colour kind")."""
    props = tuple(sorted(f"{p.color} {p.kind}" for p in scene.props))
    return {
        "place": scene.place, "sun": scene.sun, "character": scene.character, "action": scene.action,
        "shirt": scene.shirt, "number": scene.number, "hat": scene.hat, "props": props,
    }  # fmt: skip


def _tallies(names: Iterable[str]) -> dict[str, _Tally]:
    return {name: _Tally(CHOICES.get(name)) for name in names}


def score_pictures(items: Iterable[tuple[Image.Image | None, Scene, Sequence[str]]]) -> dict[str, Figure]:
    """Figures over (picture, true scene, names of the attributes asked for); a missing picture is unreadable.

    Returns:
        one Figure per attribute that was asked for at least once, and "all": every attribute asked for right.
    """
    tallies, whole = _tallies(CHOICES), _Tally()
    for image, scene, asked in items:
        said = oracle.read(image).attributes() if image is not None else {}
        true = truth(scene)
        right = [tallies[name].add(true[name], said.get(name, UNREADABLE)) for name in asked]
        whole.add(True, all(right))
    figures = {name: tally.figure() for name, tally in tallies.items() if tally.truths}
    figures["all"] = Figure(whole.right, whole.truths.total())
    return figures


def score_t2i(items: Iterable[tuple[Image.Image | None, str, Scene]]) -> dict[str, Figure]:
    """Figures over (picture, prompt, true scene): the attributes that the prompt states, read off the picture."""
    return score_pictures((image, scene, _stated(prompt)) for image, prompt, scene in items)


def _stated(text: str) -> tuple[str, ...]:
    said = parse_text(text)
    return tuple(name for name in CHOICES if name in said and (name != "props" or said["props"]))


def score_stories(
    items: Iterable[tuple[Sequence[Image.Image | None], Sequence[Scene], Sequence[bool]]],
) -> dict[str, Figure]:
    """Figures over the generated frames of stories: (pictures, true scenes, which frames were given).

    Returns:
        "place", "character", "action", "props" (told by the frame's text), "shirt", "number", "hat", "sun" (told by no
        text), "unstated": share of all (frame, unstated attribute) pairs kept, "unstated_all": frames with all four
        kept, and "all".
    """
    tallies = _tallies((*STATED, *UNSTATED))
    kept, frames = Counter[str](), 0
    for pictures, scenes, given in items:
        for image, scene, was_given in zip(pictures, scenes, given, strict=True):
            if was_given:
                continue
            frames += 1
            said = oracle.read(image).attributes() if image is not None else {}
            true = truth(scene)
            right = {name: tally.add(true[name], said.get(name, UNREADABLE)) for name, tally in tallies.items()}
            kept["unstated"] += sum(right[name] for name in UNSTATED)
            kept["unstated_all"] += all(right[name] for name in UNSTATED)
            kept["all"] += all(right.values())
    figures = {name: tally.figure() for name, tally in tallies.items()}
    lost = sum(figures[name].unreadable for name in UNSTATED)
    chance = sum(1 / CHOICES[name] for name in UNSTATED) / len(UNSTATED)
    majority = sum(figures[name].majority or 0.0 for name in UNSTATED) / len(UNSTATED) if frames else None
    figures["unstated"] = Figure(kept["unstated"], frames * len(UNSTATED), lost, chance, majority)
    figures["unstated_all"] = Figure(kept["unstated_all"], frames)
    figures["all"] = Figure(kept["all"], frames)
    return figures


def score_captions(items: Iterable[tuple[str, Scene]]) -> dict[str, Figure]:
    """Figures over (generated caption, true scene): character, place, action and props must be stated and right, and
    whatever else is stated must be right too; "all" is the share of captions of which every statement holds."""
    tallies, whole = _tallies(CHOICES), _Tally()
    for text, scene in items:
        said, true = parse_text(text), truth(scene)
        asked = [name for name in CHOICES if name in STATED or name in said]
        right = [tallies[name].add(true[name], said.get(name, UNREADABLE)) for name in asked]
        whole.add(True, all(right))
    figures = {name: tally.figure() for name, tally in tallies.items() if tally.truths}
    figures["all"] = Figure(whole.right, whole.truths.total())
    return figures


def normal_answer(text: str) -> str:
    """An answer in lower case without punctuation around it and without a leading article."""
    low = " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())
    return re.sub(r"^(a|an|the) ", "", low)


def score_vqa(items: Iterable[tuple[str, str, str]]) -> dict[str, Figure]:
    """Figures over (answer, true answer, kind): exact match after normalisation, per kind and "all"."""
    tallies: dict[str, _Tally] = {}
    for said, true, kind in items:
        for name in (kind, "all"):
            tallies.setdefault(name, _Tally()).add(normal_answer(true), normal_answer(said))
    return {name: tally.figure() for name, tally in tallies.items()}


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes xyxy (any unit); 0 for empty boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, c[2] - c[0]) * max(0.0, c[3] - c[1]) for c in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0.0


def score_ground(items: Iterable[tuple[str | Sequence[float] | None, Sequence[float]]]) -> dict[str, Figure]:
    """Figures over (generated text or box xyxy px, true box xyxy px): hit where IoU > 0.5; unreadable: no box."""
    right = total = lost = 0
    for said, true in items:
        box = parse_box(said) if isinstance(said, str) else said
        total += 1
        lost += box is None
        right += box is not None and iou(box, true) > 0.5
    return {"all": Figure(right, total, lost)}


def score_maps(items: Iterable[tuple[Image.Image | None, np.ndarray]]) -> dict[str, Any]:
    """Mean IoU of the maps that the oracle reads off pictures, against the true maps (uint8 [128, 128]).

    Counts are summed over all items; the mean is over the classes present in the truth, class 0 left out.

    Returns:
        "miou" (0..1), "classes": IoU by class name, "items": how many.
    """
    size = len(CLASSES)
    table = np.zeros((size, size), np.int64)  # [true, read]
    count = 0
    for image, labels in items:
        count += 1
        read = oracle.read_map(image) if image is not None else np.zeros_like(labels)
        table += np.bincount(labels.astype(np.int64).ravel() * size + read.ravel(), minlength=size * size).reshape(
            size, size
        )
    both = np.diag(table)
    union = table.sum(axis=0) + table.sum(axis=1) - both
    present = [k for k in range(1, size) if table[k].sum()]
    by_class = {CLASSES[k]: float(both[k] / union[k]) for k in present}
    return {
        "miou": float(np.mean(list(by_class.values()))) if by_class else math.nan,
        "classes": by_class,
        "items": count,
    }
