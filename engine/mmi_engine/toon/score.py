"""The attributes that figures are about, their truth, and how often the oracle reads them right.

Place in the flow: `validate` counts here how well the oracle reads; a model's results are scored by the metric ``toon``
(`mmi_engine.metrics.toonworld`) over the same attributes. "unreadable" counts as wrong. Every Figure carries its
counts, and beside it chance (a uniform guess) and majority (the most frequent true answer, always given).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmi_engine.toon import oracle
from mmi_engine.toon.sight import UNREADABLE
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


def normal_answer(text: str) -> str:
    """An answer in lower case without punctuation around it and without a leading article."""
    low = " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())
    return re.sub(r"^(a|an|the) ", "", low)
