"""What exists in the world and how a scene or a story is sampled from (index, split).

Place in the flow: the source of all truth. `draw` renders a Scene, `texts` describes it, `oracle` reads it back.
A Scene is a discrete description (who, where, doing what, wearing what, beside which props) plus continuous layout
(positions and sizes in picture pixels, 128 × 128). Sampling is deterministic in (index, split).

Splits: the *identity* (character, shirt, number, hat) is hashed to one split, so no scene description occurs in two
splits and a whole story stays inside one; 10 % of the character × place × action combinations are held out and occur
only in test.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

CHARACTERS = ("Pip", "Momo", "Fizz", "Lulu", "Boo", "Tiko", "Nemi", "Rolo")
SPECIES = {
    "Pip": "rabbit", "Momo": "bear", "Fizz": "fox", "Lulu": "frog",
    "Boo": "cat", "Tiko": "chick", "Nemi": "elephant", "Rolo": "robot",
}  # fmt: skip
PLACES = ("beach", "forest", "snow", "town", "room", "desert", "meadow", "lake")
ACTIONS = ("waving", "running", "jumping", "sitting", "sleeping", "reading")
PROPS = (
    "ball", "boat", "tree", "house", "sign", "balloon", "flower", "car", "star", "umbrella", "gift", "mushroom",
)  # fmt: skip
PROP_COLORS = ("red", "yellow", "blue", "green")
SHIRTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
HAT_KINDS = ("cap", "cone", "tophat")
HAT_COLORS = ("red", "yellow", "blue", "green")
HATS = ("none", *(f"{color} {kind}" for kind in HAT_KINDS for color in HAT_COLORS))
SIDES = ("left", "right")
SPLITS = ("train", "val", "test")
FRAMES = 5  # frames of a story

# How far a pose reaches left and right of its anchor near the ground (px at scale 1): props keep out of it.
REACH = {
    "waving": (27, 24), "running": (33, 33), "jumping": (28, 28),
    "sitting": (29, 29), "sleeping": (54, 56), "reading": (27, 45),
}  # fmt: skip


@dataclass(frozen=True)
class Prop:
    """A thing beside the character: kind, colour, centre x and base y in px, height in px, digit (signs: 1..9)."""

    kind: str
    color: str
    x: float
    y: float
    size: float
    digit: int = 0


@dataclass(frozen=True)
class Scene:
    """One picture's truth. x, y: the feet's anchor in px; scale: px per character unit; pan: shift of the scenery
    in px; sun: the side of the sun, of the moon (town) or of the window with the sun (room)."""

    character: str
    place: str
    action: str
    shirt: str
    number: int
    hat: str
    sun: str
    props: tuple[Prop, ...]
    x: float = 64.0
    y: float = 118.0
    scale: float = 0.95
    pan: float = 0.0

    def description(self) -> tuple[Any, ...]:
        """The discrete part: two scenes with equal descriptions show the same things."""
        props = tuple((p.kind, p.color, p.digit) for p in sorted(self.props, key=lambda p: p.x))
        return (self.character, self.place, self.action, self.shirt, self.number, self.hat, self.sun, props)

    def to_meta(self) -> dict[str, Any]:
        """Plain JSON values (the truth column of a manifest row)."""
        return asdict(self)

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> Scene:
        """Inverse of to_meta."""
        return cls(**{**meta, "props": tuple(Prop(**p) for p in meta["props"])})


@dataclass(frozen=True)
class Story:
    """FRAMES scenes of one character with their texts; shirt, number, hat and sun side never change nor are told."""

    scenes: tuple[Scene, ...]
    texts: tuple[str, ...]


def _unit(*key: object) -> float:
    """Hash of the key, uniform in [0, 1); stable over processes and platforms."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def identity_split(character: str, shirt: str, number: int, hat: str) -> str:
    """The split in which this identity lives: 88 % train, 6 % val, 6 % test."""
    u = _unit("identity", character, shirt, number, hat)
    return "train" if u < 0.88 else "val" if u < 0.94 else "test"


@lru_cache(maxsize=1)
def held_out() -> frozenset[tuple[str, str, str]]:
    """The character × place × action combinations that occur only in test (the 10 % of smallest hash)."""
    combos = [(c, p, a) for c in CHARACTERS for p in PLACES for a in ACTIONS]
    combos.sort(key=lambda combo: _unit("combo", *combo))
    return frozenset(combos[: round(0.1 * len(combos))])


def split_of(scene: Scene) -> str:
    """The one split in which this scene may occur."""
    if (scene.character, scene.place, scene.action) in held_out():
        return "test"
    return identity_split(scene.character, scene.shirt, scene.number, scene.hat)


def _rng(index: int, split: str, what: str) -> random.Random:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if index < 0:
        raise ValueError(f"index must not be negative: {index}")
    return random.Random(f"{what}/{split}/{index}")


def _sample_identity(rng: random.Random, split: str) -> tuple[str, str, int, str]:
    character = rng.choice(CHARACTERS)
    while True:
        hat = "none" if rng.random() < 0.2 else rng.choice(HATS[1:])
        identity = (character, rng.choice(SHIRTS), rng.randrange(10, 100), hat)
        if identity_split(*identity) == split:
            return identity


def _sample_action(rng: random.Random, character: str, place: str, split: str, avoid: str = "") -> str:
    """An action allowed here; about a fifth of the test scenes are held-out combinations."""
    allowed = [a for a in ACTIONS if a != avoid and (character, place, a) not in held_out()]
    hidden = [a for a in ACTIONS if a != avoid and (character, place, a) in held_out()]
    if split == "test" and hidden and (not allowed or rng.random() < 0.4):
        return rng.choice(hidden)
    return rng.choice(allowed)


def _sample_props(rng: random.Random) -> list[tuple[str, str, int]]:
    kinds = rng.sample(PROPS, 2 if rng.random() < 0.4 else 1)
    colors = rng.sample(PROP_COLORS, len(kinds))  # two props never share a colour: "the red ball" stays unique
    return [(k, c, rng.randrange(1, 10) if k == "sign" else 0) for k, c in zip(kinds, colors, strict=True)]


def _lay_out(
    rng: random.Random, action: str, things: list[tuple[str, str, int]], scale: float, side: str
) -> tuple[float, float, tuple[Prop, ...]]:
    """Anchor (x, y) of the character and the placed props: nothing leaves the picture, props stay clear of the pose."""
    sizes = [rng.uniform(27.0, 33.0) for _ in things]
    y = rng.uniform(114.0, 120.0)
    left, right = (r * scale for r in REACH[action])
    if action == "sleeping":  # the lying body fills the width: props stand behind it, further up
        x = rng.uniform(left + 1.0, left + 6.0)
        slots = [(83.0, 85.0), (111.5, 113.0)] if len(things) == 2 else [(86.0, 110.0)]
        base = y - 34.0 * scale
        placed = [
            Prop(k, c, min(rng.uniform(*slot), 127.0 - size / 2), base + rng.uniform(-3.0, 0.0), size - 2.5, d)
            for (k, c, d), slot, size in zip(things, slots, sizes, strict=True)
        ]
        return x, y, tuple(placed)
    if len(things) == 2:
        x = rng.uniform(61.0, 67.0) + (left - right) / 2
        spots = [("left", sizes[0]), ("right", sizes[1])]
    else:
        x = rng.uniform(65.0, 80.0) if side == "left" else rng.uniform(47.0, 62.0)
        x += min(0.0, 124.0 - right - x)
        spots = [(side, sizes[0])]
    placed = []
    for (kind, color, digit), (where, size) in zip(things, spots, strict=True):
        half = size * 0.5
        low, high = (half + 1.0, x - left - half) if where == "left" else (x + right + half, 127.0 - half)
        px = rng.uniform(low, high) if high > low else (low if where == "left" else high)
        placed.append(Prop(kind, color, px, min(122.0, y + rng.uniform(-6.0, 3.0)), size, digit))
    return x, y, tuple(placed)


def sample_scene(index: int, split: str = "train") -> Scene:
    """The index-th scene of a split, the same on every machine.

    Raises:
        ValueError: unknown split or negative index.
    """
    rng = _rng(index, split, "scene")
    character, shirt, number, hat = _sample_identity(rng, split)
    place = rng.choice(PLACES)
    action = _sample_action(rng, character, place, split)
    scale = rng.uniform(0.9, 1.0)
    x, y, props = _lay_out(rng, action, _sample_props(rng), scale, rng.choice(SIDES))
    return Scene(
        character, place, action, shirt, number, hat, rng.choice(SIDES), props, x, y, scale, rng.uniform(-8.0, 8.0)
    )


def sample_story(index: int, split: str = "train") -> Story:
    """The index-th story of a split: one identity, two places (three frames in one of them), one frame per action.

    Raises:
        ValueError: unknown split or negative index.
    """
    from mmi_engine.toon.texts import story_text

    rng = _rng(index, split, "story")
    character, shirt, number, hat = _sample_identity(rng, split)
    first, second = rng.sample(PLACES, 2)
    turn = rng.choice((2, 3))
    sun, scale = rng.choice(SIDES), rng.uniform(0.9, 1.0)
    pans = {first: rng.uniform(-8.0, 8.0), second: rng.uniform(-8.0, 8.0)}
    scenes: list[Scene] = []
    things, side, action = _sample_props(rng), rng.choice(SIDES), ""
    for frame in range(FRAMES):
        place = first if frame < turn else second
        action = _sample_action(rng, character, place, split, avoid=action)
        if frame == turn or (frame and rng.random() < 0.5):
            things, side = _sample_props(rng), rng.choice(SIDES)
        x, y, props = _lay_out(rng, action, things, scale, side)
        scenes.append(Scene(character, place, action, shirt, number, hat, sun, props, x, y, scale, pans[place]))
    return Story(tuple(scenes), tuple(story_text(scene, rng) for scene in scenes))
