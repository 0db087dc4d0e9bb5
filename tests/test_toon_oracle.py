"""The oracle against the truth of drawn pictures, clean and degraded, and the figures made from its readings."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmi_engine.metrics.base import Options
from mmi_engine.metrics.rec import iou
from mmi_engine.metrics.toonworld import Toon, Truth
from mmi_engine.toon import score
from mmi_engine.toon.canvas import Canvas
from mmi_engine.toon.draw import render, semantic_map
from mmi_engine.toon.oracle import UNREADABLE, read, read_map
from mmi_engine.toon.places import PAINTERS
from mmi_engine.toon.texts import BODY_CLASSES, box_of, caption
from mmi_engine.toon.validate import validate
from mmi_engine.toon.world import PLACES, Scene, sample_scene, sample_story


def _share(count: int, damage: str, start: int) -> float:
    """Share of all attributes of all scenes read right."""
    figures = validate(count, start, damages=(damage,))[damage]
    assert set(figures) == {*score.CHOICES, "all"}
    assert all(figures[name].total == count for name in figures)
    return sum(figures[name].right for name in score.CHOICES) / (count * len(score.CHOICES))


def test_clean_pictures_are_read_right() -> None:
    assert _share(60, "clean", start=5000) >= 0.995


@pytest.mark.parametrize("damage", ["blur 0.7", "halved", "noise 15", "jpeg 75"])
def test_damaged_pictures_are_still_read(damage: str) -> None:
    assert _share(15, damage, start=0) >= 0.95


def test_what_is_not_there_is_not_read() -> None:
    for place in PLACES:
        cv = Canvas()
        PAINTERS[place](cv, "right", 2.0)
        reading = read(cv.rgb())
        assert reading.place == place
        assert reading.sun == "right"
        assert reading.character == reading.number == reading.shirt == reading.props == UNREADABLE
    rng = np.random.default_rng(0)
    reading = read(Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)))
    assert set(reading.attributes().values()) == {UNREADABLE}
    assert not read_map(Image.new("RGB", (128, 128), (128, 128, 128))).any()


def test_any_size_and_mode_is_accepted() -> None:
    scene = sample_scene(11, "test")
    large = render(scene).resize((256, 256), Image.Resampling.BICUBIC).convert("RGBA")
    assert read(large).attributes() == score.truth(scene)


def test_the_map_and_the_box_are_read_back() -> None:
    for i in range(8):
        scene = sample_scene(i, "val")
        image, labels = render(scene), semantic_map(scene)
        reading = read(image)
        assert (read_map(image, reading) == labels).mean() > 0.97
        true = box_of(labels, *BODY_CLASSES)
        assert reading.box is not None and true is not None
        assert iou(reading.box, true) > 0.9


@dataclass
class Drawn:
    """A result's picture that is in memory."""

    image: Image.Image

    def load(self) -> Image.Image:
        """See `Source.load`."""
        return self.image


def _figures(references: list[Truth], made: list[Any]) -> dict[str, Any]:
    """Measure → value of the metric ``toon``; ``notes``."""
    scores = Toon(Options()).score(references, made)
    return {**{measure.name: measure.value for measure in scores.measures}, "notes": scores.notes}


def test_a_wrong_picture_gets_a_poor_map() -> None:
    one, other = sample_scene(1, "val"), sample_scene(2, "val")
    reference = [Truth("segmentation", [one], {}, labels=semantic_map(one))]
    assert _figures(reference, [[Drawn(render(one))]])["mIoU"] > 0.9
    assert _figures(reference, [[Drawn(render(other))]])["mIoU"] < 0.5
    assert _figures(reference, [None])["mIoU"] == 0.0


def test_story_figures() -> None:
    story = sample_story(0, "test")
    reference = [Truth("frames", list(story.scenes[1:]), {}, given=story.scenes[0])]
    pictures = [Drawn(render(scene)) for scene in story.scenes[1:]]
    perfect = _figures(reference, [pictures])
    assert perfect["all of a frame"] == perfect["unstated attributes"] == 100.0
    changed = Scene.from_meta({**story.scenes[3].to_meta(), "number": 11 if story.scenes[3].number != 11 else 12})
    damaged = _figures(
        reference, [[*pictures[:2], Drawn(render(changed)), Drawn(Image.new("RGB", (128, 128), "grey"))]]
    )
    assert damaged["number"] == 50.0 and "number 25%" in damaged["notes"][0]
    assert damaged["place"] == damaged["character"] == 75.0
    assert damaged["unstated attributes"] == 100.0 * (16 - 4 - 1) / 16
    assert damaged["all of a frame"] == damaged["all unstated of a frame"] == 50.0
    lost = _figures([*reference, *reference], [pictures, None])
    assert lost["unstated attributes"] == lost["place"] == 50.0 and "number 50%" in lost["notes"][0]


def test_caption_figures() -> None:
    scenes = [sample_scene(i, "test") for i in range(10)]
    said = [caption(scene, random.Random(0)) for scene in scenes]
    assert _figures([Truth("captions", [scene], {}) for scene in scenes], said)["every stated attribute"] == 100.0
    wrong = _figures([Truth("captions", scenes[:1], {})], [said[0].replace(scenes[0].character, "Zork")])
    assert wrong["every stated attribute"] == wrong["character"] == 0.0 and wrong["place"] == 100.0


def test_answers_boxes_and_a_text_that_tells_nothing() -> None:
    asked = [("colour", "red"), ("yesno", "yes"), ("yesno", "yes")]
    rows = [{"question": "?", "answers": [answer], "meta": {"kind": kind}} for kind, answer in asked]
    answers = Toon(Options()).score([Truth("question", [], row) for row in rows], ["Red.", "no", "yes"])
    values = {measure.name: measure for measure in answers.measures}
    assert values["exact answer"].value == pytest.approx(200 / 3) and values["yesno"].value == 50.0
    assert values["yesno"].baselines["majority"] == 100.0
    truths = [(0, 0, 64, 64), (0, 0, 64, 64), (64, 64, 99, 99)]
    boxes = [Truth("expression", [], {"expression": "the sun", "box": list(box)}) for box in truths]
    assert _figures(boxes, [(0, 0, 64, 64), (), (0, 0, 9, 9)])["IoU > 0.5"] == pytest.approx(100 / 3)
    assert iou((0, 0, 300, 300), (100, 0, 400, 300)) == pytest.approx(0.5)
    scene = sample_scene(4, "test")
    nothing = _figures([Truth("prompt", [scene], {"prompt": "A picture."})], [[Drawn(render(scene))]])
    assert set(nothing) == {"notes"}


def test_the_interval_is_wilsons() -> None:
    """Known answer: 8 of 10 gives (0.490, 0.943) (Wilson 1927, as tabulated by Brown, Cai and DasGupta 2001)."""
    low, high = score.Figure(8, 10).interval()
    assert low == pytest.approx(0.4902, abs=1e-3) and high == pytest.approx(0.9433, abs=1e-3)
    assert all(math.isnan(v) for v in score.Figure(0, 0).interval())
