"""Sentences about scenes.

Place in the flow: the language side of the truth; `dataset` writes these, `score` parses captions back.
All functions are deterministic in (scene, rng state). Placeholder-free plain English, short, a small vocabulary.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmi_engine.toon.world import Prop, Scene

WHERE = {
    "beach": "on the beach", "forest": "in the forest", "snow": "in the snow", "town": "in the town",
    "room": "in the room", "desert": "in the desert", "meadow": "on the meadow", "lake": "at the lake",
}  # fmt: skip


def thing(prop: Prop) -> str:
    """A prop with its colour and article: "a red ball"."""
    return f"a {prop.color} {prop.kind}"


def things(scene: Scene) -> str:
    """All props from left to right: "a red ball and a blue boat"."""
    return " and ".join(thing(p) for p in sorted(scene.props, key=lambda p: p.x))


def story_text(scene: Scene, rng: random.Random) -> str:
    """One frame's text: names the character, the action, the place and the props; at most 14 words."""
    who, doing, where, what = scene.character, scene.action, WHERE[scene.place], things(scene)
    forms = (
        f"{who} is {doing} {where}. There is {what}.",
        f"{who} is {doing} {where} near {what}.",
        f"{where.capitalize()}, {who} is {doing} near {what}.",
        f"{who} is {where}, {doing} near {what}.",
    )
    return rng.choice(forms)
