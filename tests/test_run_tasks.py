"""What each command makes of its rows: prompts piece by piece, boxes in pixels, ranks, candidates, maps; no model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeEngine
from PIL import Image

from mmi_engine.copies import SMALL_COPY, small_copy
from mmi_engine.data.images import ImageLoader, prepare, shrink
from mmi_engine.data.manifest import Manifest, Row
from mmi_engine.data.maps import Palette, load_map
from mmi_engine.errors import ConfigError, GenerationError, ImageError, ItemError, UsageError
from mmi_engine.run import RunOptions, run
from mmi_engine.tasks import Candidates, CaptionTask, GroundTask, Piece, Seg2ImgTask, T2iTask, VqaTask
from mmi_engine.tasks.ground import Seen, parse_box, to_pixels, to_square
from mmi_engine.tasks.prompts import DECODING, TOON_DECODING, Template
from mmi_engine.toon.draw import PALETTE, map_image
from mmi_engine.train.tasks import (
    GROUND_QUESTION,
    GROUND_RELEASED,
    LONG_PROMPTS,
    SHORT_PROMPTS,
    VQA_CLOSINGS,
    VQA_OPENING,
)


@pytest.fixture
def loader(tmp_path) -> ImageLoader:
    for number, name in enumerate(("a", "b", "s")):
        Image.new("RGB", (40, 20), (number * 50, 0, 0)).save(tmp_path / f"{name}.png")
    return ImageLoader(tmp_path)


def read(task, data: dict, loader: ImageLoader) -> list:
    """The job's pieces; pictures by their red value, missing texts as None."""
    job = task.read(Row(1, "x", data), loader)
    return [
        piece.value.getpixel((0, 0))[0] if piece.kind == "image" and piece.value else piece.value
        for piece in job.pieces
    ]


def code(task, data: dict, loader: ImageLoader) -> str:
    with pytest.raises(ItemError) as caught:
        task.read(Row(1, "x", data), loader)
    return caught.value.code


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_are_those_the_embedded_model_was_trained_on(loader):
    """Against the training documents, which are written independently in train/data.py."""
    row = {"image": "a.png", "question": "What colour is the ball?", "expression": "the ball"}
    for form, prompt in zip(("zero-shot", "tuned"), SHORT_PROMPTS, strict=True):
        assert read(CaptionTask("short", form), row, loader) == [0, prompt, None]
    for form, prompt in zip(("zero-shot", "tuned"), LONG_PROMPTS, strict=True):
        assert read(CaptionTask("long", form), row, loader) == [0, prompt, None]
    for form, closing in zip(("long", "short"), VQA_CLOSINGS, strict=True):
        asked = f"{row['question']} {closing}"
        assert read(VqaTask(form, family="toon"), row, loader) == [VQA_OPENING, 0, asked, None]
    assert read(GroundTask(family="toon"), row, loader) == [0, GROUND_QUESTION.format("the ball"), None]
    assert read(GroundTask(family="released"), row, loader) == [0, GROUND_RELEASED.format("the ball"), None]
    assert read(GroundTask("released", family="toon"), row, loader) == [0, GROUND_RELEASED.format("the ball"), None]


def test_vizwiz_allows_unanswerable_before_the_closing(loader):
    (_, _, asked, _) = read(VqaTask("vizwiz"), {"image": "a.png", "question": "what?"}, loader)
    assert asked == (
        "what? When the provided information is insufficient, respond with 'Unanswerable'."
        " Please provide an accurate answer within one word. The answer is:"
    )


def test_shots_stand_before_the_question_with_their_pictures(loader):
    shots = [{"image": "s.png", "question": "one?", "answer": "yes"}]
    row = {"images": ["a.png", "b.png"], "question": "which?", "shots": shots}
    template = "{image} Q: {question} A:"
    pieces = read(VqaTask(template=template), row, loader)
    assert pieces == [100, "Q: one? A:", "yes", 0, 50, "Q: which? A:", None]
    captioned = {"image": "a.png", "shots": [{"image": "s.png", "caption": "a thing"}]}
    assert read(CaptionTask(), captioned, loader) == [100, "a photo of", "a thing", 0, "a photo of", None]


def test_a_dialogue_is_one_text_with_its_history(loader):
    history = [{"question": "Is it red?", "answer": "no."}, {"question": "big", "answer": "yes"}]
    row = {
        "image": "a.png",
        "caption": "a ball",
        "history": history,
        "question": "where?",
        "options": ["here", "there"],
    }
    job = VqaTask().read(Row(1, "d", row), loader)
    assert [piece.kind for piece in job.pieces] == ["image", "text", "text"]
    assert job.pieces[1].value == (
        "caption: a ball question: Is it red? answer: no. question: big? answer: yes. question: where? answer:"
    )
    assert job.pieces[2].options == ("here", "there")


def test_the_embedded_model_is_asked_question_after_question_as_it_was_trained(loader):
    rounds = [{"question": "Where is Pip?", "answer": "beach"}, {"question": "Is there a ball?", "answer": "yes"}]
    row = {"image": "a.png", "caption": "Pip is waving.", "history": rounds, "question": "What colour is the ball?"}
    closing = " Please provide an accurate answer within one word. The answer is:"
    assert read(VqaTask(family="toon"), row, loader) == [
        VQA_OPENING,
        0,
        f"Pip is waving. Where is Pip?{closing}",
        "beach",
        f"Is there a ball?{closing}",
        "yes",
        f"What colour is the ball?{closing}",
        None,
    ]
    row["caption"] = "Pip!"
    assert read(VqaTask(family="toon"), row, loader)[2].startswith("Pip! Where is Pip?")
    assert VqaTask(family="toon").settings != VqaTask().settings  # a folder made in the other form is not gone on with
    own = VqaTask(template="{image} Q: {question}", family="toon")
    assert read(own, row, loader) == [0, "Q: What colour is the ball?", None]


def test_a_chat_is_taken_as_it_is(loader):
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
    row = {"messages": [{"role": "user", "content": content}]}
    for task in (CaptionTask(), VqaTask()):
        assert read(task, row, loader) == [0, "What is it?", None]


def test_templates_know_their_fields():
    assert Template.parse("{{x}} {image}", ("image",)).build({"image": [Piece("image", 1)]})[0].value == "{x}"
    for bad in ("{nobody}", "no field", "{image", "{}", "{0}", "{image.size}"):
        with pytest.raises(UsageError):
            Template.parse(bad, ("image",))


def test_decoding_defaults_are_the_published_ones():
    """recipes.md: minimum lengths count the opening <s>, ours do not."""
    assert DECODING["caption short"] == {"beams": 5, "max_new_tokens": 20, "min_new_tokens": 7}
    long = {"beams": 5, "max_new_tokens": 90, "min_new_tokens": 89, "repetition_penalty": 1.2}
    assert DECODING["caption long"] == long
    assert DECODING["vqa"] == {"beams": 3, "max_new_tokens": 10, "length_penalty": 0.0}
    assert DECODING["story"]["repetition_penalty"] == 1.3 and DECODING["story"]["min_new_tokens"] == 8
    assert DECODING.keys() == TOON_DECODING.keys()


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        (CaptionTask(), {}, "no_image"),
        (CaptionTask(), {"images": "a.png"}, "bad_row"),
        (CaptionTask(), {"images": []}, "no_image"),
        (CaptionTask(), {"image": "a.png", "shots": [{"image": "a.png"}]}, "bad_shots"),
        (CaptionTask(), {"image": "a.png", "shots": "x"}, "bad_shots"),
        (VqaTask(), {"image": "a.png"}, "no_question"),
        (VqaTask(), {"image": "a.png", "question": " "}, "no_question"),
        (VqaTask(), {"image": "a.png", "question": 3}, "bad_row"),
        (VqaTask(), {"image": "a.png", "question": "x", "options": []}, "bad_options"),
        (VqaTask(), {"image": "a.png", "question": "x", "options": ["a", ""]}, "bad_options"),
        (VqaTask(), {"image": "a.png", "question": "x", "history": [{}]}, "bad_history"),
        (VqaTask(), {"messages": [{"role": "user", "content": "x"}], "history": [1]}, "bad_history"),
        (VqaTask(template="{image} {question}"), {"image": "a.png", "question": "x", "history": [1]}, "bad_history"),
        (VqaTask(template="{image}{question} {caption}"), {"image": "a.png", "question": "x"}, "bad_row"),
        (GroundTask(), {"image": "a.png"}, "no_expression"),
        (GroundTask(), {"images": ["a.png", "b.png"], "expression": "x"}, "bad_row"),
        (T2iTask(), {}, "no_prompt"),
        (T2iTask(), {"prompt": ""}, "no_prompt"),
        (T2iTask(), {"prompt": ["x"]}, "bad_row"),
        (Seg2ImgTask(Palette.find("toon")), {"prompt": "x"}, "no_segmentation"),
        (Seg2ImgTask(Palette.find("toon")), {"segmentation": "a.png"}, "no_prompt"),
    ],
)
def test_incomplete_rows_have_stable_codes(task, row, expected, loader):
    assert code(task, row, loader) == expected


# -- boxes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["squeeze", "pad", "crop"])
@pytest.mark.parametrize("size", [(200, 100), (100, 200), (64, 64), (333, 101), (1, 50)])
def test_a_box_comes_back_to_the_pixels_it_was_drawn_on(fit, size):
    """Draw a rectangle, look where it lies in the model's square, write that as thousandths, map it back."""
    width, height = size
    true = (round(0.42 * width), round(0.4 * height), round(0.6 * width), round(0.61 * height))
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), true)
    square, frame = to_square(picture, fit)
    assert square.width == square.height
    if min(size) == 1:
        assert 0 <= to_pixels((0, 0, 999, 999), Seen(width, height, frame))[2] <= width
        return
    bright = np.asarray(square.convert("L")) > 160
    ys, xs = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    thousandths = [round(v * 1000 / square.width) for v in (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)]
    found = to_pixels(tuple(thousandths), Seen(width, height, frame))
    assert np.abs(np.array(found) - true).max() <= max(1.0, 0.012 * max(size))


def test_squeezed_boxes_are_thousandths_of_width_and_height():
    assert to_pixels((250, 250, 750, 999), Seen(200, 100, (0, 0, 200, 100))) == (50, 25, 150, 99.9)


def test_box_texts():
    assert parse_box("(012,345)(678,999)</box>") == (12, 345, 678, 999)
    assert parse_box(" ( 5 , 6 ), (1, 2) and (9,9)(9,9)") == (1, 2, 5, 6)  # corners in order
    for bad in ("", "(1,2)", "(1,2)(3,x)", "(1234,1)(2,3)", "no box"):
        assert parse_box(bad) is None


def test_ground_draws_at_the_originals_size_and_says_when_there_is_no_box(tmp_path, loader):
    task = GroundTask(draw=True, family="toon")
    job = task.read(Row(1, "g", {"image": "a.png", "expression": "x"}), loader)
    filled = [*job.pieces[:-1], Piece("text", "(250,250)(750,750)")]
    output = task.output(job, filled, "g", 16)
    assert output.fields == {"box": [10, 5, 30, 15], "size": [40, 20], "image": "g.png"}
    square = job.pieces[[piece.kind for piece in job.pieces].index("image")].value
    assert job.weight == 3 * (40 * 20 + square.width * square.height), "the original is held and must count"
    drawn = output.media["g.png"]
    assert drawn.size == (40, 20) and drawn.getpixel((10, 8))[0] > 200 and drawn.getpixel((20, 10)) == (0, 0, 0)
    with pytest.raises(GenerationError) as caught:
        task.output(job, [*job.pieces[:-1], Piece("text", "nothing")], "g", 16)
    assert caught.value.code == "no_box"


# -- options and candidates --------------------------------------------------------------------------------------------


def go(tmp_path: Path, task, rows: list[dict], engine: FakeEngine | None = None, **options):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / f"out-{task.name}"
    summary = run(task, Manifest(manifest), out, engine or FakeEngine(), RunOptions(**options))
    return out, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()], summary


def test_ranks_follow_the_scores(tmp_path, loader):
    options = ["a", "b", "c", "d", "e"]
    _, (row,), _ = go(tmp_path, VqaTask(), [{"id": "d", "image": "a.png", "question": "x", "options": options}])
    assert sorted(row["ranks"]) == [1, 2, 3, 4, 5]
    best = row["ranks"].index(1)
    assert row["answer"] == options[best] and row["scores"][best] == max(row["scores"])
    for first, second in itertools.combinations(range(5), 2):
        if row["scores"][first] > row["scores"][second]:
            assert row["ranks"][first] < row["ranks"][second]


def test_candidates_are_all_kept_or_the_best_of_them(tmp_path):
    rows = [{"id": "t", "prompt": "x"}, {"id": "t_0", "prompt": "y"}]
    out, results, _ = go(tmp_path, T2iTask(Candidates(3)), rows)
    assert [entry["image"] for entry in results[0]["images"]] == ["t_0.png", "t_1.png", "t_2.png"]
    every = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert len(every) == 6 and len(set(every.values())) == 6
    # the fake engine gives candidate 1 the best score
    out, results, _ = go(tmp_path, T2iTask(Candidates(3, "self")), rows, overwrite=True)
    assert (results[0]["image"], results[0]["candidate"]) == ("t.png", 1)
    assert {path.name for path in out.glob("*.png")} == {"t.png", "t_0.png"}
    assert (out / "t.png").read_bytes() == every["t_1.png"]
    out, results, _ = go(tmp_path, T2iTask(Candidates(3, "self", keep_all=True)), rows, overwrite=True)
    assert results[0]["image"] == "t_1.png" and {path.name for path in out.glob("*.png")} == set(every)


def test_contradictions_about_candidates_are_usage_errors(tmp_path):
    for arguments in ((1, "self"), (2, None, True), (2, str(tmp_path / "nowhere"))):
        with pytest.raises(UsageError):
            Candidates(*arguments)


# -- maps --------------------------------------------------------------------------------------------------------------


def test_a_map_in_any_form_is_the_same_picture(tmp_path):
    labels = np.arange(len(PALETTE), dtype=np.uint8).reshape(4, 7)
    expected = np.asarray(map_image(labels))
    forms = {
        "ids.png": Image.fromarray(labels),
        "ids16.png": Image.fromarray(labels.astype(np.uint16)),
        "grey-rgb.png": Image.fromarray(np.repeat(labels[..., None], 3, 2)),
        "colours.png": map_image(labels),
    }
    indexed, foreign = Image.fromarray(labels, "P"), Image.fromarray(labels, "P")
    indexed.putpalette([channel for color in PALETTE for channel in color])
    foreign.putpalette([channel for index in range(256) for channel in (index, 255 - index, 7)])
    forms |= {"indexed.png": indexed, "foreign-colours.png": foreign}
    for name, picture in forms.items():
        picture.save(tmp_path / name)
        found = np.asarray(load_map(ImageLoader(tmp_path), name, Palette.find("toon")))
        assert np.array_equal(found, expected), name


def test_unlabelled_pixels_and_values_that_are_no_class(tmp_path):
    Image.fromarray(np.array([[1, 255]], np.uint8)).save(tmp_path / "void.png")
    found = load_map(ImageLoader(tmp_path), "void.png", Palette.find("toon"))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [PALETTE[1], PALETTE[0]]
    Image.fromarray(np.array([[1, 200]], np.uint8)).save(tmp_path / "bad.png")
    with pytest.raises(ItemError) as caught:
        load_map(ImageLoader(tmp_path), "bad.png", Palette.find("toon"))
    assert caught.value.code == "bad_map"


@pytest.mark.parametrize("form", ["json", "png"])
def test_150_classes_are_painted_in_the_colours_of_a_file(form, tmp_path):
    """As ADE20K has them: a grey PNG of class numbers, 0 unlabelled; the colours are the user's."""
    colors = [[0, 0, 0], *np.random.default_rng(5).integers(1, 256, (150, 3)).tolist()]
    if form == "json":
        (tmp_path / "colours.json").write_text(json.dumps(colors))
    else:
        painted = Image.new("P", (3, 2))
        painted.putpalette([value for color in colors for value in color])
        painted.save(tmp_path / "colours.png")
    labels = np.random.default_rng(6).permutation(np.arange(151 * 2) % 151).reshape(2, 151).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "map.png")
    palette = Palette.find(str(tmp_path / f"colours.{form}"))
    found = np.asarray(load_map(ImageLoader(tmp_path), "map.png", palette))
    assert (found == np.asarray(colors)[labels]).all()
    if form == "json":
        Image.fromarray(labels + 1).save(tmp_path / "more.png")
        with pytest.raises(ImageError, match=r"class 151, palette .* has 0 to 150"):
            load_map(ImageLoader(tmp_path), "more.png", palette)


def test_palettes(tmp_path):
    voc = Palette.find("voc").colors  # the first colours as published with PASCAL VOC
    assert voc[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)) and voc[15] == (192, 128, 128)
    (tmp_path / "own.json").write_text("[[0, 0, 0], [1, 2, 3]]")
    assert Palette.find(str(tmp_path / "own.json")).colors == ((0, 0, 0), (1, 2, 3))
    for text in ("", "{}", "[[0, 0]]", "[[0, 0, 256]]", "[]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError):
            Palette.find(str(tmp_path / "bad.json"))


# -- pictures on their way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(700, 500), (129, 640), (64, 64), (31, 2000)])
def test_shrinking_first_changes_nothing(size):
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(noise)
    for target in (64, 40):
        small = shrink(picture, 64)
        assert min(small.size) < 128 or min(size) < 64
        if max(size) <= 4 * min(size):
            assert prepare(small, target).tobytes() == prepare(picture, target).tobytes()


def test_small_copies_of_inputs_are_kept_for_the_gallery_alone(tmp_path, loader):
    rows = [{"id": "a/b", "image": "a.png"}, {"id": "gone", "image": "no.png"}, {"id": "c", "image": "b.png"}]
    out, _, summary = go(tmp_path, CaptionTask(), rows)
    copies = sorted(path.name for path in (out / "index_files").iterdir())
    assert summary.failed == 1 and len(copies) == 2 and copies[1] == "0-c.jpg"
    page = (out / "index.html").read_text()
    assert all(f"index_files/{name}".replace("~", "%7E") in page.replace("~", "%7E") for name in copies)
    (out / "index_files/9-old.jpg").write_bytes((out / "index_files/0-c.jpg").read_bytes())  # left by a killed run
    go(tmp_path, CaptionTask(), rows)
    assert sorted(path.name for path in (out / "index_files").iterdir()) == copies
    go(tmp_path, CaptionTask(), rows, overwrite=True, gallery=False)
    assert not (out / "index_files").exists()


def test_files_of_the_user_beside_the_small_copies_are_left_alone(tmp_path, loader):
    rows = [{"id": "a", "image": "a.png"}, {"id": "b", "image": "b.png"}]
    folder = tmp_path / "out-caption/index_files"
    folder.mkdir(parents=True)
    (folder / "notes").mkdir()
    mine = {"holiday.jpg": small_copy(Image.new("RGB", (9, 9))).replace(SMALL_COPY, b"x" * len(SMALL_COPY))}
    mine |= {"0-a.jpg": b"the user's, by chance of that name", "1-b.jpg": b"and this", "notes/x.txt": b"mine"}
    for name, content in mine.items():
        (folder / name).write_bytes(content)
    for options in ({}, {}, {"overwrite": True}, {"overwrite": True, "seed": 1, "gallery": False}):
        out, _, summary = go(tmp_path, CaptionTask(), rows, **options)
        assert summary.done == 2
        assert {name: (folder / name).read_bytes() for name in mine} == mine
        assert (folder / "0-b.jpg").exists() == ("gallery" not in options)
        assert "gallery" in options or "0-a.jpg" not in (out / "index.html").read_text()
    assert not (out / "index.html").exists()
