"""Questions drawn anew: every answer agrees with the scene that the caption was written about."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np

from mmi_engine.toon.texts import WHERE, long_caption
from mmi_engine.toon.world import ACTIONS, Scene, sample_scene
from mmi_engine.train.quiz import QUESTIONS, quiz
from mmi_engine.train.tasks import BUILDERS


def truth(scene: Scene, question: str) -> str:
    """The answer, from the scene itself."""
    if found := re.fullmatch(r"Is the number on the shirt larger than (\d+)\?", question):
        right = scene.number > int(found[1])
    elif found := re.fullmatch(r"How many (\w+) things are there\?", question):
        return str([p.color for p in scene.props].count(found[1]))
    elif re.fullmatch(rf"How many things are near {scene.character}\?", question):
        return str(len(scene.props))
    elif question == f"Does {scene.character} wear a hat?":
        right = scene.hat != "none"
    elif found := re.fullmatch(r"Is there a (\w+)\?", question):
        right = found[1] in [p.kind for p in scene.props]
    elif found := re.fullmatch(r"Is this (\w+)\?", question):
        right = found[1] == scene.character
    else:
        told = question.removeprefix(f"Is {scene.character} ").removesuffix("?")
        assert told in ACTIONS or told in WHERE.values(), question
        right = told in (scene.action, WHERE[scene.place])
    return "yes" if right else "no"


def test_answers_are_true_and_of_both_kinds() -> None:
    answers: Counter[str] = Counter()
    for index in range(60):
        scene = sample_scene(index, "train")
        rng = random.Random(index)
        drawn = quiz(long_caption(scene, rng), rng)
        assert len(dict(drawn)) == QUESTIONS
        for question, answer in drawn:
            assert answer == truth(scene, question), (scene, question)
            answers[answer] += 1
    assert min(answers["yes"], answers["no"]) > 60 and answers["0"] and answers["2"]


def test_a_document_depends_on_its_draws_alone() -> None:
    scene = sample_scene(0, "train")
    texts = {"frames": [{"details": [long_caption(scene, random.Random(0))]}] * 5}
    first, same, other = (BUILDERS["quiz"](texts, 0, 1, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert [p.value for p in first.pieces] == [p.value for p in same.pieces] != [p.value for p in other.pieces]
    assert len(first.pieces) == 2 + 2 * QUESTIONS and first.asked == frozenset(range(2, 2 + 2 * QUESTIONS, 2))
