"""What can be answered about the embedded world without looking: the best guesses from training scenes.

Place in the flow: baselines of `metrics.toonworld`. A question or expression is looked up by its words (names, colours
of shirts, numbers and things made equal); everything is computed from the first training scenes, in a second or two.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter, defaultdict

import numpy as np

from mmi_engine.toon import texts
from mmi_engine.toon.draw import semantic_map as draw_map
from mmi_engine.toon.score import normal_answer
from mmi_engine.toon.world import ACTIONS, CHARACTERS, PLACES, PROP_COLORS, PROPS, SHIRTS, SPECIES, sample_scene

SCENES = 600

_EQUAL = {
    "NAME": [*CHARACTERS, *SPECIES.values()], "THING": PROPS, "COLOUR": sorted({*PROP_COLORS, *SHIRTS}),
    "ACTION": ACTIONS, "PLACE": [*PLACES, *texts.WHERE.values()],
}  # fmt: skip
_WORDS = {
    kind: re.compile(
        "|".join(rf"\b{re.escape(word)}\b" for word in sorted(words, key=len, reverse=True)), re.IGNORECASE
    )
    for kind, words in _EQUAL.items()
}


def pattern(text: str) -> str:
    """A question or expression with names, things, colours, actions, places and numbers made equal."""
    for kind, words in _WORDS.items():
        text = words.sub(kind, text)
    return re.sub(r"\d+", "N", text)


@functools.cache
def answers() -> tuple[dict[str, str], dict[str, str], str]:
    """Most frequent training answer by question, by pattern of the question, and of all."""
    literal: dict[str, Counter[str]] = defaultdict(Counter)
    shaped: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(SCENES):
        scene = sample_scene(index, "train")
        for question, answer, _ in texts.questions(scene, random.Random(index)):
            literal[question][normal_answer(answer)] += 1
            shaped[pattern(question)][normal_answer(answer)] += 1
    whole: Counter[str] = sum(shaped.values(), Counter())

    def best(table: dict[str, Counter[str]], least: int) -> dict[str, str]:
        return {key: seen.most_common(1)[0][0] for key, seen in table.items() if seen.total() >= least}

    return best(literal, 20), best(shaped, 1), whole.most_common(1)[0][0]


def answer(question: str, guesses: tuple[dict[str, str], dict[str, str], str]) -> str:
    """The blind answer to a question; of two things that it names, the first."""
    literal, shaped, most = guesses
    named = re.search(r"larger, the (\w+) or the \w+", question)
    if named:
        return named.group(1)
    return literal.get(question) or shaped.get(pattern(question)) or most


@functools.cache
def choices() -> dict[str, int]:
    """How many different answers training questions of a pattern have."""
    seen: dict[str, set[str]] = defaultdict(set)
    for index in range(SCENES):
        scene = sample_scene(index, "train")
        for question, answer, _ in texts.questions(scene, random.Random(index)):
            seen[pattern(question)].add(normal_answer(answer))
    return {key: len(found) for key, found in seen.items()}


@functools.cache
def boxes() -> tuple[dict[str, tuple[float, ...]], tuple[float, ...]]:
    """Median training box xyxy px by pattern of the expression, and of all."""
    seen: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for index in range(SCENES):
        scene = sample_scene(index, "train")
        for expression, box in texts.referring(scene, random.Random(index)):
            seen[pattern(expression)].append(box)
    whole = [box for found in seen.values() for box in found]
    medians = {key: tuple(float(v) for v in np.median(found, axis=0)) for key, found in seen.items()}
    return medians, tuple(float(v) for v in np.median(whole, axis=0))


def box(expression: str, guesses: tuple[dict[str, tuple[float, ...]], tuple[float, ...]]) -> tuple[float, ...]:
    """The blind box of an expression."""
    by_pattern, whole = guesses
    return by_pattern.get(pattern(expression), whole)


@functools.cache
def semantic_map() -> np.ndarray:
    """The most frequent class of every pixel over training maps, int64 ``[128, 128]``."""
    maps = np.stack([draw_map(sample_scene(index, "train")) for index in range(SCENES)])
    classes = int(maps.max()) + 1
    votes = np.stack([(maps == k).sum(0) for k in range(classes)])
    return np.asarray(votes.argmax(0), dtype=np.int64)
