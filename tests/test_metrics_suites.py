"""Suite files, the embedded world's measures with their baselines, and a suite run end to end on a stand-in model."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from mmi_cli.main import main
from mmi_engine.errors import ConfigError, ManifestError
from mmi_engine.metrics import pairs, score, suite
from mmi_engine.metrics.base import Options
from mmi_engine.toon import blind
from mmi_engine.toon.dataset import make_dataset, scenes_of
from mmi_engine.toon.score import CHOICES, truth
from mmi_engine.toon.texts import parse_text
from mmi_engine.toon.world import sample_scene

PAPER = {  # Tables 1 to 4
    "coco_caption": (129.0, 140.5), "flickr30k": (85.8, 93.0), "nocaps": (106.4, 123.2),
    "image2paragraph": (23.5, 30.3),
    "vqav2": (57.0, 80.2), "okvqa": (40.0, 51.7), "gqa": (60.5,), "vizwiz": (40.8, 54.9), "textvqa": (37.2, 61.0),
    "visdial": (48.7, 53.7), "refcoco": (89.92, 92.59, 86.54), "refcoco_plus": (82.99, 88.57, 77.07),
    "refcocog": (85.21, 84.92), "mscoco_t2i": (7.90,), "lncoco_t2i": (23.88,), "ade20k": (0.44,), "vist": (0.70, 39.7),
    "pororo": (14.7,), "flintstones": (18.7,),
}  # fmt: skip


def test_the_benchmarks_of_the_paper_are_all_there_with_its_figures():
    assert set(suite.names()) == {*PAPER, "toon"}
    for name, figures in PAPER.items():
        found = suite.load(name)
        assert tuple(value for part in found.parts for goal in part.goals for value in goal.paper.values()) == figures
        assert found.format and found.title and all(part.split for part in found.parts)


def test_every_part_of_every_suite_makes_its_task():
    from mmi_engine.generate.settings import Settings
    from mmi_engine.metrics.produce import TASKS, task_of

    assert set(TASKS) == set(suite.TASKS)
    for name in suite.names():
        for part in suite.load(name).parts:
            task, remarks = task_of(part, "toon", tuned=True)
            assert task.name == part.task and bool(remarks) == (name == "mscoco_t2i")
            Settings(**part.decoding)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('task = "caption"', r"no \[\[part\]\]"),
        ('colour = 1\n[[part]]\ndata = "x"', 'unknown key "colour"'),
        ('[[part]]\ndata = "x"\ntask = "dance"\n[[part.score]]\nmetric = "cider"', 'no task "dance"'),
        ('[[part]]\ndata = "x"\ntask = "vqa"\n[[part.score]]\nmetric = "cidr"', 'no metric "cidr"'),
        ('[[part]]\ndata = "x"\ntask = "vqa"', r"has no \[\[part.score\]\]"),
        ('[[part]]\ntask = "vqa"\n[[part.score]]\nmetric = "vqa"', "missing 'data'"),
        ("[[part", "suite x.toml"),
    ],
)
def test_broken_suite_files_are_refused(tmp_path, text, words):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        suite.load(str(path))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_dataset(folder, "test", 8)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def judged(world, name, said):
    results = world / f"said-{name}"
    results.write_text("".join(json.dumps(row) + "\n" for row in said))
    card = score.evaluate(["toon"], pairs.read_references(world / name), pairs.read_results(results), Options())[0]
    return card, {measure.name: measure for measure in card.measures}


def test_the_truth_itself_scores_full_marks_in_all_six_tasks(world):
    _, found = judged(
        world, "captions.jsonl", [{"id": r["id"], "caption": r["captions"][0]} for r in rows(world / "captions.jsonl")]
    )
    assert found["every stated attribute"].value == 100.0 and found["character"].baselines["chance"] == 12.5
    asked = rows(world / "vqa.jsonl")
    _, found = judged(world, "vqa.jsonl", [{"id": r["id"], "answer": r["answers"][0].upper() + "."} for r in asked])
    assert found["exact answer"].value == 100.0 and set(found) == {"exact answer", *(r["meta"]["kind"] for r in asked)}
    _, found = judged(world, "ground.jsonl", [{"id": r["id"], "box": r["box"]} for r in rows(world / "ground.jsonl")])
    assert found["IoU > 0.5"].value == 100.0 and 0 < found["mean IoU"].baselines["blind"] < 0.8
    for name in ("t2i.jsonl", "seg2img.jsonl"):
        _, found = judged(world, name, [{"id": r["id"], "image": r["meta"]["image"]} for r in rows(world / name)])
        first = next(iter(found.values()))
        assert first.value == 100.0 if name == "t2i.jsonl" else first.value > 0.95 > 0.3 > first.baselines["blind"]
    said = [
        {"id": r["id"], "frames": [{"image": f["image"]} for f in r["frames"]]}
        for r in rows(world / "stories_full.jsonl")
    ]
    _, found = judged(world, "stories.jsonl", said)
    assert found["all of a frame"].value == 100.0 and found["unstated attributes"].baselines["copy"] == 100.0
    assert found["all of a frame"].low == pytest.approx(100 / (1 + 1.96**2 / 8), abs=1e-6)  # Wilson's, all being right


def test_repeating_the_given_frame_scores_what_the_copy_baseline_says(world):
    asked = rows(world / "stories.jsonl")
    said = [{"id": r["id"], "frames": [{"image": r["meta"]["images"][0]}] * 5} for r in asked]
    _, found = judged(world, "stories.jsonl", said)
    for name in ("place", "unstated attributes", "action", "all of a frame"):
        assert found[name].value == pytest.approx(found[name].baselines["copy"])


def test_one_wrong_attribute_costs_its_share_of_what_the_text_states(world):
    """A picture of another scene: what both have in common is right, counted here by hand."""
    asked = rows(world / "t2i.jsonl")
    _, found = judged(world, "t2i.jsonl", [{"id": asked[0]["id"], "image": asked[1]["meta"]["image"]}])
    scenes = [truth(scenes_of(row["meta"])[0]) for row in asked]
    stated = [[n for n, value in parse_text(row["prompt"]).items() if value and n in CHOICES] for row in asked]
    common = [name for name in stated[0] if scenes[0][name] == scenes[1][name]]
    assert found["stated attributes"].parts[0] == pytest.approx(100 * len(common) / len(stated[0]))
    chances = [100 * sum(1 / CHOICES[name] for name in names) / len(names) for names in stated]
    assert found["stated attributes"].baselines["chance"] == pytest.approx(sum(chances) / len(chances))


def test_nothing_drawn_and_nothing_said_is_wrong(world):
    asked = rows(world / "t2i.jsonl")
    Image.new("RGB", (128, 128), (90, 90, 90)).save(world / "grey.png")
    card, found = judged(world, "t2i.jsonl", [{"id": r["id"], "image": "grey.png"} for r in asked[:4]])
    assert found["every stated attribute"].value == 0.0 == found["stated attributes"].value and len(card.missing) == 4
    assert "unreadable, counted as wrong: character 100%" in card.notes[0]
    asked = rows(world / "ground.jsonl")
    card, found = judged(world, "ground.jsonl", [{"id": r["id"], "box": None} for r in asked])
    assert found["IoU > 0.5"].value == 0.0 and card.notes == [f"{len(asked)} answers hold no box, counted as wrong"]


def test_rows_of_another_world_or_of_two_tasks_are_refused(world, tmp_path):
    reference = tmp_path / "r.jsonl"
    reference.write_text('{"id": "a", "caption": "x", "meta": {}}\n')
    results = tmp_path / "s.jsonl"
    results.write_text('{"id": "a", "caption": "x"}\n')
    with pytest.raises(ManifestError, match="r.jsonl:1: no scene of the embedded world in meta"):
        score.evaluate(["toon"], pairs.read_references(reference), pairs.read_results(results), Options())


def test_blind_guesses_follow_the_words():
    guesses = blind.answers()
    assert blind.answer("Is there a spaceship?", guesses) in ("yes", "no")
    assert blind.answer("Which is larger, the boat or the tree?", guesses) == "boat"
    assert blind.answer("On which side is the sun?", guesses) in ("left", "right")
    assert blind.pattern("Is Pip in the snow near 12?") == blind.pattern("Is Momo on the beach near 7?")
    x1, y1, x2, y2 = blind.box("the one in the pink shirt", blind.boxes())
    assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128
    assert sample_scene(0, "train") != sample_scene(0, "test")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A model directory small enough to generate in a moment."""
    from tiny import tiny_model

    from mmi_engine.model.checkpoint import save_model

    save_model(tiny_model(), tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_a_suite_of_ones_own_generates_scores_and_prints_the_table(tmp_path, tiny, capsys):
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "b.png")
    data = [{"id": str(k), "image": "a.png", "captions": ["a red picture", "all red"]} for k in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    drawn = [{"id": str(k), "prompt": "a red picture", "image": "a.png"} for k in range(2)]
    (tmp_path / "drawn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drawn))
    (tmp_path / "odd.jsonl").write_text(json.dumps({**drawn[0], "image": "b.png"}) + "\n")
    (tmp_path / "own.toml").write_text(
        'title = "Mine"\ntask = "caption"\n[decoding]\nbeams = 1\nmin_new_tokens = 0\nmax_new_tokens = 3\n'
        '[[part]]\ndata = "mine"\n[[part.score]]\nmetric = "rouge"\nscale = 100\npaper = { sft = 50.5 }\n'
        '[[part]]\ndata = "gone"\n[[part.score]]\nmetric = "cider"\n'
        '[[part]]\ndata = "drawn"\ntask = "t2i"\n[[part.score]]\nmetric = "fid64"\ninstead = "psnr"\n'
        "paper = { sft = 9.0 }\n"
        '[[part]]\ndata = "odd"\ntask = "t2i"\n[[part.score]]\nmetric = "psnr"\n'
    )
    arguments = ["eval", "--suite", str(tmp_path / "own.toml"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    arguments += ["--model", tiny, "--device", "cpu", "--threads", "1", "--resamples", "20"]
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == 3, captured.err  # of one part every result is unusable; the others have their scores
    assert "odd: --metric psnr: none of 1 items has a usable result" in captured.err
    lines = captured.out.splitlines()
    assert lines[0].split()[:4] == ["data", "metric", "measure", "score"] and "50.5 fine-tuned" in lines[1]
    assert lines[2].split()[:2] == ["gone", "cider"] and "gone: no data: gone.jsonl" in captured.err
    assert "no fid64 without --inception; psnr instead" in captured.err
    content = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert [row["metric"] for row in content["rows"]] == ["rouge", "cider", "psnr", "psnr"]
    assert content["rows"][2]["paper"] == {}  # another metric's number does not stand beside the paper's
    assert (tmp_path / "out" / "mine" / "metrics.json").exists() and (
        tmp_path / "out" / "drawn" / "worst.html"
    ).exists()
    page = (tmp_path / "out" / "index.html").read_text()
    linked = re.findall(r'href="([^"]+)"', page)
    assert {"mine/index.html", "mine/worst.html", "drawn/worst.html"} <= set(linked)
    assert all((tmp_path / "out" / link).is_file() for link in linked)
    assert "<h1>Mine</h1>" in page and "<td>50.5 fine-tuned</td>" in page
    assert main(arguments) == code and "3 of 3 done before" in capsys.readouterr().err
    assert main([*arguments, "--steps", "2"]) == 2  # made with other settings: the remedy is one that eval has
    said = capsys.readouterr().err
    assert (
        "settings.steps was" in said and f'remove "{tmp_path / "out" / "mine"}"' in said and "--overwrite" not in said
    )


def test_a_broken_row_of_one_manifest_leaves_the_other_parts_their_scores(tmp_path, tiny, capsys):
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "a.png")
    rows = [json.dumps({"id": str(k), "image": "a.png", "captions": ["a red picture"]}) + "\n" for k in range(2)]
    (tmp_path / "broken.jsonl").write_text(rows[0] + "{no json\n")
    (tmp_path / "sound.jsonl").write_text("".join(rows))
    (tmp_path / "own.toml").write_text(
        'title = "Mine"\ntask = "caption"\n[decoding]\nbeams = 1\nmin_new_tokens = 0\nmax_new_tokens = 3\n'
        '[[part]]\ndata = "broken"\n[[part.score]]\nmetric = "rouge"\n'
        '[[part]]\ndata = "sound"\n[[part.score]]\nmetric = "rouge"\n'
    )
    arguments = ["eval", "--suite", str(tmp_path / "own.toml"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    code = main([*arguments, "--model", tiny, "--device", "cpu", "--threads", "1", "--resamples", "20"])
    captured = capsys.readouterr()
    assert code == 3 and "broken: not scored: broken.jsonl:2: broken JSON" in captured.err, captured.err
    content = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert ["value" in row for row in content["rows"]] == [False, True]


def test_suites_are_listed_and_ask_for_what_they_need(tmp_path, capsys):
    assert main(["eval", "--suite", "ls"]) == 0
    assert "refcoco_testa.jsonl" in capsys.readouterr().out
    for arguments, words in (
        (["--suite", "toon"], "--suite needs --out"),
        (
            ["--suite", "vqav2", "--out", str(tmp_path)],
            "vqav2.jsonl; name its folder with --data DATA; get it by mmi data import vqa",
        ),
        (
            ["--suite", "vqav2", "--data", str(tmp_path), "--out", str(tmp_path)],
            f'"{tmp_path}" holds no manifest of --suite vqav2: vqav2.jsonl; name the folder they are in',
        ),
        (["--suite", "paper", "--data", str(tmp_path), "--out", str(tmp_path)], "holds no manifest of --suite paper"),
        (["--suite", "nope", "--out", str(tmp_path)], 'no suite "nope"; choose from ade20k'),
        (["--suite", "toon", "--out", str(tmp_path), "--tasks", "dance"], "no such task in toon; caption"),
    ):
        assert main(["eval", *arguments]) == 2 and words in capsys.readouterr().err
