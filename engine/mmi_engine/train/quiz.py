"""Documents of many short questions about one picture of the built-in world, for training.

In `train.tasks` the task ``quiz``. The world keeps seven questions of a picture, one of each kind; yes or no to a word
that may or may not fit needs far more examples than that, since wrong words must be tried with every picture. So these
are drawn anew for every document, in the forms of `mmi_engine.toon.texts`, from the facts in the detailed caption.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from mmi_engine.toon.texts import count_question, parse_text, yesno_question

QUESTIONS = 6


def facts_of(caption: str) -> SimpleNamespace:
    """What a detailed caption states, under the names of a scene's attributes."""
    found = parse_text(caption)
    props = [SimpleNamespace(color=color, kind=kind) for color, kind in (name.split(" ") for name in found["props"])]
    return SimpleNamespace(**{**found, "props": props})


def quiz(caption: str, rng: random.Random) -> list[tuple[str, str]]:
    """``QUESTIONS`` different questions with their answers: mostly yes or no, of numbers and counts besides.

    Args:
        caption: a detailed caption of the picture.
    """
    scene: Any = facts_of(caption)
    asked: dict[str, str] = {}
    while len(asked) < QUESTIONS:
        chance = rng.random()
        if chance < 0.7:
            question, answer, _ = yesno_question(scene, rng)
        elif chance < 0.85:
            bound = max(10, min(99, scene.number + rng.choice((-20, -8, 8, 20))))
            question, answer = (
                f"Is the number on the shirt larger than {bound}?",
                "yes" if scene.number > bound else "no",
            )
        else:
            question, answer, _ = count_question(scene, rng)
        asked.setdefault(question, answer)
    return list(asked.items())
