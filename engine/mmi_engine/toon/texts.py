"""Sentences about scenes, and attributes read back from sentences.

Place in the flow: the language side of the truth; `dataset` writes these, `score` parses generated captions with
parse_text. All functions are deterministic in (scene, rng state). Plain English, short, a small vocabulary, several
forms per fact. Boxes are xyxy in px (x2, y2 exclusive), taken from the semantic map: they enclose what is visible.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from mmi_engine.toon.canvas import SIZE
from mmi_engine.toon.palette import ID
from mmi_engine.toon.world import (
    ACTIONS,
    CHARACTERS,
    HAT_KINDS,
    PLACES,
    PROP_COLORS,
    PROPS,
    SHIRTS,
    SIDES,
    SPECIES,
)

if TYPE_CHECKING:
    from mmi_engine.toon.world import Prop, Scene

Box = tuple[int, int, int, int]
Question = tuple[str, str, str]

WHERE = {
    "beach": "on the beach", "forest": "in the forest", "snow": "in the snow", "town": "in the town",
    "room": "in the room", "desert": "in the desert", "meadow": "on the meadow", "lake": "at the lake",
}  # fmt: skip
HAT_WORDS = {"cap": "cap", "cone": "party hat", "tophat": "top hat"}
BODY_CLASSES = tuple(ID[name] for name in ("head", "shirt", "number", "limb", "hat", "book"))
KINDS = ("colour", "count", "position", "number", "larger", "yesno", "what")


def thing(prop: Prop) -> str:
    """A prop with its article: "a red ball"."""
    return f"a {prop.color} {prop.kind}"


def things(scene: Scene) -> str:
    """All props from left to right: "a red ball and a blue boat"."""
    return " and ".join(thing(p) for p in sorted(scene.props, key=lambda p: p.x))


def hat_words(hat: str) -> str:
    """A hat with its article: "a blue top hat", or "no hat"."""
    if hat == "none":
        return "no hat"
    color, kind = hat.split(" ")
    return f"a {color} {HAT_WORDS[kind]}"


def light(scene: Scene) -> str:
    """What shines: the moon in the town, the sun elsewhere."""
    return "moon" if scene.place == "town" else "sun"


def story_text(scene: Scene, rng: random.Random) -> str:
    """One frame's text: names the character, the action, the place and the props; at most 14 words."""
    who, doing, where, what = scene.character, scene.action, WHERE[scene.place], things(scene)
    last = f"There is {what}." if len(scene.props) == 1 else ""
    forms = (
        f"{who} is {doing} {where}. {last}" if last else f"With {what}, {who} is {doing} {where}.",
        f"{who} is {doing} {where} near {what}.",
        f"{where.capitalize()}, {who} is {doing} near {what}.",
        f"{who} is {where}, {doing} near {what}.",
    )
    return rng.choice(forms)


def caption(scene: Scene, rng: random.Random) -> str:
    """A one-sentence caption: character, action, place and props (the facts of a story text, the same forms)."""
    return story_text(scene, rng)


def long_caption(scene: Scene, rng: random.Random) -> str:
    """A caption in detail: besides the short facts, shirt colour, number, hat and the side of the sun or moon."""
    side = f"The {light(scene)} is on the {scene.sun}."
    wears = rng.choice(
        (
            f"{scene.character} wears a {scene.shirt} shirt with the number {scene.number} and {hat_words(scene.hat)}.",
            f"{scene.character} has {hat_words(scene.hat)} and a {scene.shirt} shirt with the number {scene.number}.",
        )
    )
    return f"{story_text(scene, rng)} {wears} {side}"


# ---------------------------------------------------------------- boxes


def box_of(labels: np.ndarray, *classes: int) -> Box | None:
    """Bounding box xyxy px (right and bottom exclusive) of the pixels of these classes; None where there are none."""
    mask = np.isin(labels, classes)
    if not mask.any():
        return None
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def box_text(box: tuple[float, float, float, float], size: int = SIZE) -> str:
    """A box in the model's writing, "(x1,y1)(x2,y2)": thousandths of width and height, three digits each, 000..999."""
    x1, y1, x2, y2 = (min(999, max(0, round(v * 1000 / size))) for v in box)
    return f"({x1:03d},{y1:03d})({x2:03d},{y2:03d})"


def referring(scene: Scene, rng: random.Random, labels: np.ndarray | None = None) -> list[tuple[str, Box]]:
    """Expressions with the box (px, xyxy) of the one thing each describes; one per character, prop, hat and sun.

    Args:
        labels: semantic_map(scene), if already at hand.
    """
    if labels is None:
        from mmi_engine.toon.draw import semantic_map

        labels = semantic_map(scene)
    found: list[tuple[str, Box | None]] = []
    who = (scene.character, f"the {SPECIES[scene.character]}", f"the one with the number {scene.number}",
           f"the one in the {scene.shirt} shirt")  # fmt: skip
    found.append((rng.choice(who), box_of(labels, *BODY_CLASSES)))
    ordered = sorted(scene.props, key=lambda p: p.x)
    for k, prop in enumerate(ordered):
        names = [f"the {prop.color} {prop.kind}", f"the {prop.kind}", f"the {prop.color} thing"]
        if len(ordered) == 2:
            names.append(f"the thing on the {SIDES[k]}")
        found.append((rng.choice(names), box_of(labels, ID[prop.kind])))
    if scene.hat != "none":
        color, kind = scene.hat.split(" ")
        name = rng.choice((f"the {HAT_WORDS[kind]}", f"the {color} {HAT_WORDS[kind]}", f"{scene.character}'s hat"))
        found.append((name, box_of(labels, ID["hat"])))
    found.append((f"the {light(scene)}", box_of(labels, ID["sun"])))
    return [(expression, box) for expression, box in found if box is not None]


# ---------------------------------------------------------------- questions


def _colour(scene: Scene, rng: random.Random) -> Question:
    options = [(p.kind, p.color) for p in scene.props]
    options += [(f"shirt of {scene.character}", scene.shirt), ("shirt", scene.shirt)]
    if scene.hat != "none":
        options.append((rng.choice((f"hat of {scene.character}", "hat")), scene.hat.split(" ")[0]))
    name, color = rng.choice(options)
    return rng.choice((f"What colour is the {name}?", f"Which colour has the {name}?")), color, "colour"


def count_question(scene: Scene, rng: random.Random) -> Question:
    """How many things are near the character, or how many of a colour."""
    if rng.random() < 0.5:
        return f"How many things are near {scene.character}?", str(len(scene.props)), "count"
    color = rng.choice(PROP_COLORS)
    return f"How many {color} things are there?", str(sum(p.color == color for p in scene.props)), "count"


def _position(scene: Scene, rng: random.Random) -> Question:
    options = [(f"On which side is the {light(scene)}?", scene.sun)]
    ordered = sorted(scene.props, key=lambda p: p.x)
    if len(ordered) == 2:
        k = rng.randrange(2)
        options.append((f"Which thing is on the {SIDES[k]}?", ordered[k].kind))
    if scene.action != "sleeping":  # props stand behind a sleeper, on no side of it
        prop = rng.choice(ordered)
        options.append((f"On which side of {scene.character} is the {prop.kind}?", SIDES[int(prop.x > scene.x)]))
    question, answer = rng.choice(options)
    return question, answer, "position"


def _number(scene: Scene, rng: random.Random) -> Question:
    signs = [p for p in scene.props if p.kind == "sign"]
    if signs and rng.random() < 0.5:
        return "What number is on the sign?", str(signs[0].digit), "number"
    forms = ("What number is on the shirt?", f"Which number does {scene.character} wear?")
    return rng.choice(forms), str(scene.number), "number"


def _larger(scene: Scene, rng: random.Random, labels: np.ndarray) -> Question:
    if len(scene.props) == 2:
        areas = []
        for prop in scene.props:
            x1, y1, x2, y2 = box_of(labels, ID[prop.kind]) or (0, 0, 0, 0)
            areas.append((x2 - x1) * (y2 - y1))
        if max(areas) >= 1.3 * min(areas):  # a difference that one can see
            pair = [p.kind for p in scene.props]
            answer = pair[areas.index(max(areas))]
            rng.shuffle(pair)
            return f"Which is larger, the {pair[0]} or the {pair[1]}?", answer, "larger"
    bound = max(10, min(99, scene.number + rng.choice((-20, -8, 8, 20))))
    return f"Is the number on the shirt larger than {bound}?", _yes(scene.number > bound), "larger"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def yesno_question(scene: Scene, rng: random.Random) -> Question:
    """A question about action, place, things, character or hat whose answer is yes or no, equally often."""
    true = rng.random() < 0.5
    kinds = [p.kind for p in scene.props]
    topic = rng.choice(("action", "place", "prop", "who", "hat"))
    if topic == "hat":
        return f"Does {scene.character} wear a hat?", _yes(scene.hat != "none"), "yesno"
    if topic == "action":
        value = scene.action if true else rng.choice([a for a in ACTIONS if a != scene.action])
        question = f"Is {scene.character} {value}?"
    elif topic == "place":
        value = scene.place if true else rng.choice([p for p in PLACES if p != scene.place])
        question = f"Is {scene.character} {WHERE[value]}?"
    elif topic == "prop":
        value = rng.choice(kinds) if true else rng.choice([k for k in PROPS if k not in kinds])
        question = f"Is there a {value}?"
    else:
        value = scene.character if true else rng.choice([c for c in CHARACTERS if c != scene.character])
        question = f"Is this {value}?"
    return question, _yes(true), "yesno"


def _what(scene: Scene, rng: random.Random) -> Question:
    options = [
        ("Who is this?", scene.character),
        (f"What is {scene.character} doing?", scene.action),
        (f"Where is {scene.character}?", scene.place),
    ]
    if len(scene.props) == 1:
        options.append((f"What is near {scene.character}?", scene.props[0].kind))
    question, answer = rng.choice(options)
    return question, answer, "what"


def questions(scene: Scene, rng: random.Random, labels: np.ndarray | None = None) -> list[Question]:
    """One (question, one-word answer, kind) for each of KINDS.

    Args:
        labels: semantic_map(scene), if already at hand.
    """
    if labels is None:
        from mmi_engine.toon.draw import semantic_map

        labels = semantic_map(scene)
    plain = [ask(scene, rng) for ask in (_colour, count_question, _position, _number, yesno_question, _what)]
    return [*plain[:4], _larger(scene, rng, labels), *plain[4:]]


# ---------------------------------------------------------------- reading back


def parse_text(text: str) -> dict[str, Any]:
    """Attributes that a sentence states; keys only for what is stated.

    Returns:
        character, place, action, shirt, number (int), hat ("none" or "blue tophat"), sun, and props: sorted tuple of
        "colour kind" (always present, empty if none). A value stated twice and differently becomes "ambiguous".
    """
    low = " ".join(text.lower().split())
    found: dict[str, Any] = {}

    def note(key: str, values: list[Any]) -> None:
        if values:
            found[key] = values[0] if len(set(values)) == 1 else "ambiguous"

    note("character", [c for c in CHARACTERS if re.search(rf"\b{c.lower()}\b", low)])
    note("place", [p for p, where in WHERE.items() if re.search(rf"\b{where}\b", low)])
    note("action", [a for a in ACTIONS if re.search(rf"\b{a}\b", low)])
    note("shirt", [c for c in SHIRTS if re.search(rf"\b{c} shirt\b", low)])
    note("number", [int(n) for n in re.findall(r"\bnumber (\d+)\b", low)])
    hats = [f"{c} {k}" for k in HAT_KINDS for c in PROP_COLORS if re.search(rf"\b{c} {HAT_WORDS[k]}\b", low)]
    note("hat", hats + (["none"] if re.search(r"\bno hat\b", low) else []))
    note("sun", [s for s in SIDES if re.search(rf"\b(?:sun|moon) is on the {s}\b", low)])
    kinds, colors = "|".join(PROPS), "|".join(PROP_COLORS)
    found["props"] = tuple(sorted(re.findall(rf"\b(?:{colors}) (?:{kinds})\b", low)))
    return found
