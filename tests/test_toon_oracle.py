"""The oracle against the truth of drawn pictures, clean and degraded, and the figures made from its readings."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from PIL import Image

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
        assert score.iou(reading.box, true) > 0.9


def test_a_wrong_picture_gets_a_poor_map() -> None:
    one, other = sample_scene(1, "val"), sample_scene(2, "val")
    assert score.score_maps([(render(one), semantic_map(one))])["miou"] > 0.9
    assert score.score_maps([(render(other), semantic_map(one))])["miou"] < 0.5


def test_story_figures_count_generated_frames_only() -> None:
    story = sample_story(0, "test")
    pictures: list[Image.Image | None] = [render(scene) for scene in story.scenes]
    given = [True, False, False, False, False]
    perfect = score.score_stories([(pictures, story.scenes, given)])
    assert perfect["all"].right == perfect["all"].total == 4
    assert perfect["unstated"].total == 16
    pictures[4] = None
    changed = Scene.from_meta({**story.scenes[3].to_meta(), "number": 11 if story.scenes[3].number != 11 else 12})
    pictures[3] = render(changed)
    damaged = score.score_stories([(pictures, story.scenes, given)])
    assert damaged["number"].right == 2 and damaged["number"].unreadable == 1
    assert damaged["place"].right == 3 and damaged["character"].right == 3
    assert damaged["unstated"].right == 16 - 4 - 1


def test_caption_figures() -> None:
    scenes = [sample_scene(i, "test") for i in range(10)]
    said = [caption(scene, random.Random(0)) for scene in scenes]
    assert score.score_captions(zip(said, scenes, strict=True))["all"].share == 1.0
    wrong = score.score_captions([(said[0].replace(scenes[0].character, "Zork"), scenes[0])])
    assert wrong["all"].right == 0 and wrong["character"].unreadable == 1 and wrong["place"].right == 1


def test_answers_boxes_and_baselines() -> None:
    vqa = score.score_vqa([("Red.", "red", "colour"), ("no", "yes", "yesno"), ("yes", "yes", "yesno")])
    assert (vqa["all"].right, vqa["yesno"].right, vqa["yesno"].majority) == (2, 1, 1.0)
    ground = score.score_ground(
        [("(000,000)(500,500)", (0, 0, 64, 64)), ("here", (0, 0, 64, 64)), ([0, 0, 9, 9], (64, 64, 99, 99))]
    )
    assert (ground["all"].right, ground["all"].total, ground["all"].unreadable) == (1, 3, 1)
    assert score.iou((0, 0, 300, 300), (100, 0, 400, 300)) == pytest.approx(0.5)
    t2i = score.score_t2i([(render(sample_scene(4, "test")), "A picture.", sample_scene(4, "test"))])
    assert set(t2i) == {"all"}


def test_the_interval_is_wilsons() -> None:
    """Known answer: 8 of 10 gives (0.490, 0.943) (Wilson 1927, as tabulated by Brown, Cai and DasGupta 2001)."""
    low, high = score.Figure(8, 10).interval()
    assert low == pytest.approx(0.4902, abs=1e-3) and high == pytest.approx(0.9433, abs=1e-3)
    assert all(math.isnan(v) for v in score.Figure(0, 0).interval())
