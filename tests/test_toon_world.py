"""The embedded world: sampling, splits, drawing. Properties, each against something the painter does not know."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mmi_engine.toon import palette
from mmi_engine.toon.canvas import SIZE, Canvas
from mmi_engine.toon.draw import CLASSES, PALETTE, map_image, render, semantic_map
from mmi_engine.toon.places import PAINTERS
from mmi_engine.toon.templates import lab
from mmi_engine.toon.world import (
    ACTIONS,
    CHARACTERS,
    HATS,
    PLACES,
    PROP_COLORS,
    PROPS,
    SHIRTS,
    SPLITS,
    Scene,
    held_out,
    identity_split,
    sample_scene,
    sample_story,
    split_of,
)


def test_the_world_is_as_large_as_promised() -> None:
    assert len(CHARACTERS) >= 8
    assert len(PLACES) >= 8
    assert len(PROPS) >= 12
    assert len(ACTIONS) >= 6
    assert len(SHIRTS) >= 8
    single = (
        len(CHARACTERS) * len(PLACES) * len(ACTIONS) * len(SHIRTS) * 90 * len(HATS) * 2 * len(PROPS) * len(PROP_COLORS)
    )
    assert single >= 10**6


def test_sampling_is_deterministic_and_varied() -> None:
    first = [sample_scene(i, "train") for i in range(50)]
    assert first == [sample_scene(i, "train") for i in range(50)]
    assert len({scene.description() for scene in first}) == 50
    assert sample_story(3, "val") == sample_story(3, "val")
    assert sample_scene(3, "val") != sample_scene(3, "train")


def test_no_description_occurs_in_two_splits() -> None:
    seen = {split: {sample_scene(i, split).description() for i in range(1500)} for split in SPLITS}
    for split in SPLITS:
        for i in range(100):
            seen[split] |= {scene.description() for scene in sample_story(i, split).scenes}
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


def test_a_tenth_of_the_combinations_occurs_only_in_test() -> None:
    assert len(held_out()) == round(0.1 * len(CHARACTERS) * len(PLACES) * len(ACTIONS))
    hidden = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for i in range(800):
            scene = sample_scene(i, split)
            assert split_of(scene) == split
            hidden[split] += (scene.character, scene.place, scene.action) in held_out()
        for i in range(80):
            for scene in sample_story(i, split).scenes:
                hidden[split] += (scene.character, scene.place, scene.action) in held_out()
    assert hidden["train"] == hidden["val"] == 0
    assert hidden["test"] > 100


def test_every_identity_has_one_split_and_train_holds_most() -> None:
    splits = [identity_split("Pip", shirt, n, hat) for shirt in SHIRTS for n in range(10, 100) for hat in HATS]
    assert 0.86 < splits.count("train") / len(splits) < 0.90


def test_unstated_attributes_stay_through_a_story_and_places_change_once() -> None:
    for i in range(60):
        scenes = sample_story(i, "train").scenes
        assert len(scenes) == 5
        assert len({(s.character, s.shirt, s.number, s.hat, s.sun) for s in scenes}) == 1
        places = [s.place for s in scenes]
        assert sum(a != b for a, b in zip(places, places[1:], strict=False)) == 1
        assert all(a.action != b.action for a, b in zip(scenes, scenes[1:], strict=False))


def test_meta_survives_json() -> None:
    scene = sample_scene(7, "test")
    assert Scene.from_meta(json.loads(json.dumps(scene.to_meta()))) == scene


@pytest.mark.parametrize(("index", "split"), [(0, "nowhere"), (-1, "train")])
def test_bad_requests_are_refused(index: int, split: str) -> None:
    with pytest.raises(ValueError, match="split|index"):
        sample_scene(index, split)


def test_pictures_and_maps_have_the_promised_form_and_repeat() -> None:
    for i in range(12):
        scene = sample_scene(i, "train")
        image, labels = render(scene), semantic_map(scene)
        assert image.mode == "RGB"
        assert image.size == (SIZE, SIZE)
        assert labels.shape == (SIZE, SIZE)
        assert labels.dtype == np.uint8
        assert labels.min() > 0 and labels.max() < len(CLASSES)
        assert image.tobytes() == render(scene).tobytes()
        assert np.array_equal(labels, semantic_map(scene))


def test_the_figure_is_big_and_props_are_where_the_truth_says() -> None:
    body = [palette.ID[name] for name in ("head", "shirt", "number", "limb", "hat", "book")]
    for i in range(40):
        scene = sample_scene(i, "test")
        labels = semantic_map(scene)
        rows = np.flatnonzero(np.isin(labels, body).any(axis=1))
        if scene.action not in ("sleeping", "sitting"):
            assert 0.55 * SIZE < rows[-1] - rows[0] + 1 < 0.92 * SIZE
        for prop in scene.props:
            ys, xs = np.nonzero(labels == palette.ID[prop.kind])
            assert len(xs) > 80, f"{prop} can hardly be seen"
            assert abs(xs.mean() - prop.x) < 0.3 * prop.size
            assert prop.y - 1.15 * prop.size <= ys.min() and ys.max() <= prop.y + 3


def test_map_and_picture_agree_on_the_shirt() -> None:
    """The map's shirt pixels have, by majority, the shirt's palette colour in the picture: same geometry in both."""
    for i in range(20):
        scene = sample_scene(i, "val")
        pixels = np.asarray(render(scene))[semantic_map(scene) == palette.ID["shirt"]].astype(int)
        near = np.abs(pixels - np.array(palette.SHIRT[scene.shirt])).max(axis=1) < 12
        assert near.mean() > 0.4


def test_palettes_keep_wide_margins() -> None:
    for table in (palette.BODY, palette.SHIRT, palette.THING):
        colors = lab(np.array(list(table.values()), dtype=np.uint8)).astype(float)
        distance = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1000 * np.eye(len(colors))
        assert distance.min() > 20
    assert len(set(PALETTE)) == len(CLASSES) >= 12


def test_backgrounds_differ_far_more_between_places_than_by_pan() -> None:
    def shot(place: str, pan: float) -> np.ndarray:
        cv = Canvas()
        PAINTERS[place](cv, "left", pan)
        return lab(np.asarray(cv.rgb()))

    shots = {place: shot(place, 0.0) for place in PLACES}
    for place in PLACES:
        moved = np.linalg.norm(shot(place, 4.0) - shots[place], axis=-1).mean()
        other = min(np.linalg.norm(shots[place] - shots[rival], axis=-1).mean() for rival in PLACES if rival != place)
        assert other > 1.5 * moved


def test_map_image_uses_the_fixed_palette() -> None:
    labels = np.arange(len(CLASSES), dtype=np.uint8)[None]
    assert [tuple(p) for p in np.asarray(map_image(labels))[0].tolist()] == list(PALETTE)
