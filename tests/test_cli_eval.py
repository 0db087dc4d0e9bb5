"""`mmi eval` as a user types it: cards, missing items, hostile files, comparisons, what lands on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmi_cli.main import main

REPOSITORY = Path(__file__).resolve().parent.parent
CAPTIONS = {
    "a": ["a cat sits on a mat", "the cat is on the mat"],
    "b": ["a man rides a red bicycle", "a person riding a bike"],
    "c": ["two dogs play in the park", "dogs are playing on green grass"],
}
SAID = {"a": "a cat sits on a mat", "b": "a man on a bicycle", "c": "two cats sleep on a couch"}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def references(tmp_path):
    return write(tmp_path / "r.jsonl", [{"id": k, "image": f"{k}.png", "captions": v} for k, v in CAPTIONS.items()])


def captions(path, **changes):
    rows = {k: {"id": k, "caption": v, "status": "ok"} for k, v in SAID.items()}
    rows.update({k: {"id": k, "caption": v} for k, v in changes.items()})
    return write(path, rows.values())


def run(capsys, *arguments):
    code = main(["eval", *map(str, arguments), "--resamples", "50"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_card_for_every_score_and_metrics_json(tmp_path, references, capsys):
    captions(tmp_path / "out" / "results.jsonl")
    code, out, err = run(capsys, tmp_path / "out", references)
    assert code == 0
    assert "cider · default · 3 items · missing 0, failed 0, unusable 0 (counted as wrong) · 2 references each" in out
    assert "CIDEr  2.4746  [" in out and "ROUGE-L  0.6274  [" in out and "BLEU-4  0.4507  [" in out
    assert "metrics that fit these rows: cider, bleu, rouge" in err and "the idf comes from 3 images" in err
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    card = content["scores"]["cider"]
    assert card["measures"]["CIDEr"]["value"] == pytest.approx(2.474630780)
    assert card["items"] == 3 and card["references_per_item"] == 2 and card["measures"]["CIDEr"]["resamples"] == 50
    assert card["references"]["sha256"] and content["versions"]["numpy"] and "tokeniser" in card["implementation"]
    page = (tmp_path / "out" / "worst.html").read_text()
    assert page.index("two cats sleep") < page.index("a man on a bicycle")


def test_the_worst_are_those_with_a_fault(tmp_path, capsys):
    truth = write(tmp_path / "t.jsonl", [{"id": name, "answers": [name]} for name in ("cat", "dog", "hen")])
    made = [{"id": name, "answer": name} for name in ("cat", "dog", "hen")]
    page = tmp_path / "out" / "worst.html"
    made[1]["answer"] = "cow"
    assert run(capsys, write(tmp_path / "out" / "results.jsonl", made), truth, "--metric", "exact")[0] == 0
    assert "answer: cow" in page.read_text() and "hen" not in page.read_text()
    made[1]["answer"] = "dog"
    assert run(capsys, write(tmp_path / "out" / "results.jsonl", made), truth, "--metric", "exact")[0] == 0
    assert "no item with a fault" in page.read_text()


def test_missing_and_failed_items_count_as_wrong_are_listed_and_can_be_left_out(tmp_path, references, capsys):
    out_dir = tmp_path / "out"
    write(out_dir / "results.jsonl", [{"id": "a", "caption": SAID["a"]}, {"id": "z", "caption": "?"}])
    write(out_dir / "errors.jsonl", [{"id": "b", "line": 2, "error": "image_not_found", "message": "no b.png"}])
    code, out, err = run(capsys, out_dir, references, "--metric", "rouge")
    assert code == 3 and "ROUGE-L  0.3333" in out and "missing 1, failed 1, unusable 0 (counted as wrong)" in out
    assert "1 missing: c" in err and "1 failed: b (failed: image_not_found: no b.png)" in err
    assert "1 results that no reference asks for, such as z" in err
    code, out, _ = run(capsys, out_dir, references, "--metric", "rouge", "--missing", "skip")
    assert code == 0 and "rouge · default · 1 items" in out and "ROUGE-L  1.0000" in out
    code, out, err = run(capsys, out_dir, references, "--metric", "rouge", "--parity", "released")
    assert "rouge · released · 1 items" in out and "scores only the items that have a result" in err
    assert set(json.loads((out_dir / "metrics.json").read_text())["scores"]) == {"rouge", "rouge/released"}


HOSTILE = {
    "empty results": ([], None, 'holds no result; let the run finish at least one item'),
    "duplicate ids": (
        [{"id": "a", "caption": "x"}, {"id": "a", "caption": "y"}],
        None,
        'results.jsonl:2: id "a" occurs before; a number over ambiguous results would mean nothing',
    ),
    "no ids": ([{"caption": "x"}], None, "results.jsonl:1: the row has no id"),
    "NaN": (['{"id": "a", "caption": "x", "score": NaN}'], None, "results.jsonl:1: broken JSON: NaN is not JSON"),
    "no common id": ([{"id": "q", "caption": "x"}], None, 'no id of'),
    "another field": (
        [{"id": "a", "answer": "x"}],
        None,
        'none of 1 items has a usable result; the first: results.jsonl:1: no "caption"',
    ),
    "wrong type": ([{"id": "a", "caption": 3}], None, '"caption" must be a string, found a number'),
    "no references": ([{"id": "a", "caption": "x"}], [], "holds no reference"),
    "duplicate references": ([{"id": "a", "caption": "x"}], [{"id": "a", "caption": "x"}] * 2, "r.jsonl:2: id"),
    "reference without truth": ([{"id": "a", "caption": "x"}], [{"id": "a"}], 'r.jsonl:1: no "captions" or "caption"'),
    "empty truth": ([{"id": "a", "caption": "x"}], [{"id": "a", "captions": []}], '"captions" is empty'),
    "truth without words": ([{"id": "a", "caption": "x"}], [{"id": "a", "caption": "."}], "no reference caption has"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_end_with_cause_place_and_remedy(tmp_path, capsys, case):
    results, truth, words = HOSTILE[case]
    truth = [{"id": "a", "captions": ["x y"]}] if truth is None else truth
    reference = write(tmp_path / "r.jsonl", truth)
    code, out, err = run(capsys, write(tmp_path / "o" / "results.jsonl", results), reference, "--metric", "cider")
    assert code == 2 and out == "" and words in err, err
    assert not (tmp_path / "o" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{o}"], "expected RESULTS and REFERENCES, found 1"),
        (["{o}", "{r}", "--metric", "cidr"], 'no metric "cidr"; choose from cider'),
        (
            ["{o}", "{r}", "--metric", "fid"],
            "--metric fid needs --inception; name the weights (docs/eval.md says which)",
        ),
        (["{o}", "{r}", "--metric", "fid"], "or --metric fd-encoder for the model's own encoder"),
        (["{o}", "{o}"], "2 runs and no truth; mmi eval"),
        (["--references", "{r}"], "no run to score"),
        (["gone", "{r}"], 'manifest "gone" not found'),
        (["{o}", "{r}", "--suite", "toon"], "--suite takes no RESULTS"),
    ],
)
def test_command_lines_that_cannot_be_met(tmp_path, references, capsys, arguments, words):
    captions(tmp_path / "o" / "results.jsonl")
    code, _, err = run(capsys, *(text.format(o=tmp_path / "o", r=references) for text in arguments))
    assert code == 2 and words in err


def test_vqa_boxes_and_rankings_choose_their_metrics(tmp_path, capsys):
    truth = [
        {"id": "1", "question": "?", "answers": ["red"] * 3 + ["blue"] * 7},
        {"id": "2", "question": "?", "answers": ["two"] * 10},
    ]
    said = [{"id": "1", "answer": "Red."}, {"id": "2", "answer": "2"}]
    reference = write(tmp_path / "vqa.jsonl", truth)
    _, out, err = run(capsys, write(tmp_path / "v" / "results.jsonl", said), reference)
    assert "VQA accuracy  95.00 %" in out and "metrics that fit these rows: vqa" in err
    _, out, err = run(capsys, tmp_path / "v", reference, "--metric", "vqa", "--parity", "released")
    assert "VQA accuracy  45.00 %" in out and "normalised only where the references disagree" in err
    box = write(tmp_path / "box.jsonl", [{"id": "1", "box": [0, 0, 300, 300], "width": 640, "height": 480}])
    _, out, _ = run(capsys, write(tmp_path / "b" / "results.jsonl", [{"id": "1", "box": [100, 0, 400, 300]}]), box)
    assert "REC accuracy  0.00 %" in out and "mean IoU      0.5000" in out
    row = {"id": "1", "options": list("abcde"), "relevance": [1, 0.5, 0, 0.25, 0], "answers": ["b"]}
    dialogue = write(tmp_path / "d.jsonl", [row])
    _, out, _ = run(capsys, write(tmp_path / "d" / "results.jsonl", [{"id": "1", "ranks": [2, 1, 3, 4, 5]}]), dialogue)
    assert "NDCG       0.7851" in out and "R@1        1.0000" in out and "mean rank  1.0000" in out
    _, _, err = run(
        capsys, write(tmp_path / "e.jsonl", [{"id": "1", "ranks": [1, 1, 3, 4, 5]}]), dialogue, "--metric", "ranking"
    )
    assert '"ranks" must be 1 to 5, each once' in err


def test_one_answer_alone_is_no_vqa_accuracy(tmp_path, capsys):
    reference = write(tmp_path / "r.jsonl", [{"id": "1", "answers": ["red"]}])
    results = write(tmp_path / "s.jsonl", [{"id": "1", "answer": "a red"}])
    code, _, err = run(capsys, results, reference, "--metric", "vqa")
    assert code == 2 and "r.jsonl:1: one answer alone" in err and "use --metric exact" in err
    code, out, _ = run(capsys, results, reference)
    assert code == 0 and "exact match  100.00 %" in out


@pytest.mark.parametrize("value", ([1], {}, "1", 2, -0.1))
def test_how_answerable_a_question_is_held_is_a_number_or_the_item_is_unusable(tmp_path, capsys, value):
    truth = [{"id": k, "answers": ["red"] * 10, "answerable": 1} for k in "ab"]
    said = [{"id": "a", "answer": "red", "answerable": 0.5}, {"id": "b", "answer": "red", "answerable": value}]
    reference = write(tmp_path / "r.jsonl", truth)
    code, out, err = run(capsys, write(tmp_path / "o.jsonl", said), reference, "--metric", "vizwiz")
    assert code == 3 and "unusable 1" in out and 'o.jsonl:2: "answerable" must be a number from 0 to 1' in err


def test_odd_fields_of_one_item_do_not_cost_the_page_of_the_worst(tmp_path, references, capsys):
    for name in CAPTIONS:
        picture(tmp_path / f"{name}.png", 1)
    odd = {"a": {"frames": 5}, "b": {"frames": [{"image": "x.png", "generated": 5}]}, "c": {"box": [{}, 0, 1, 2]}}
    said = [{"id": k, "caption": SAID[k], **odd[k]} for k in CAPTIONS]
    write(tmp_path / "out" / "results.jsonl", said)
    code, out, err = run(capsys, tmp_path / "out", references, "--metric", "rouge")
    assert code == 0, err
    page = (tmp_path / "out" / "worst.html").read_text()
    assert all(f"<h2>{name}<small>" in page for name in CAPTIONS) and page.count("cannot be shown") == 2
    assert SAID["a"] in page  # frames that are no list are none


def test_comparison_with_plot_and_galleries(tmp_path, references, capsys):
    captions(tmp_path / "A" / "results.jsonl")
    captions(tmp_path / "B" / "results.jsonl", b=CAPTIONS["b"][0], c=CAPTIONS["c"][0])
    runs = (tmp_path / "A", tmp_path / "B", "--references", references, "--metric", "rouge,bleu")
    code, out, _ = run(capsys, *runs, "--out", tmp_path / "cmp")
    assert code == 0 and "rouge · default · 3 items · paired differences" in out and "(sign flips)" in out
    assert "(paired bootstrap)" in out and "+0.3726" in out
    content = json.loads((tmp_path / "cmp" / "metrics.json").read_text())
    found = content["comparisons"][0]["differences"][0]["ROUGE-L"]
    assert found["value"] == pytest.approx(1 - 0.627403063) and found["p"] == 0.5 and found["items"] == 3
    assert Image.open(tmp_path / "cmp" / "rouge.png").size[0] > 500
    assert (tmp_path / "cmp" / "worst-1-A.html").exists() and (tmp_path / "cmp" / "worst-2-B.html").exists()


def test_comparison_without_resamples_has_dashes_and_sound_json(tmp_path, references, capsys):
    for name in "AB":
        captions(tmp_path / name / "results.jsonl")
    arguments = (
        tmp_path / "A",
        tmp_path / "B",
        "--references",
        references,
        "--metric",
        "rouge",
        "--out",
        tmp_path / "c",
    )
    assert main(["eval", *map(str, arguments), "--resamples", "0"]) == 0
    assert "nan" not in capsys.readouterr().out
    text = (tmp_path / "c" / "metrics.json").read_text()
    assert "NaN" not in text and json.loads(text)["comparisons"][0]["differences"][0]["ROUGE-L"]["p"] is None


def test_comparison_under_skip_takes_the_common_items(tmp_path, references, capsys):
    write(tmp_path / "A.jsonl", [{"id": k, "caption": SAID[k]} for k in "ab"])
    write(tmp_path / "B.jsonl", [{"id": k, "caption": SAID[k]} for k in "bc"])
    arguments = (tmp_path / "A.jsonl", tmp_path / "B.jsonl", "--references", references, "--metric", "rouge")
    code, out, _ = run(capsys, *arguments, "--missing", "skip")
    assert code == 0 and "rouge · default · 1 items" in out
    code, out, err = run(capsys, *arguments)
    assert code == 3 and "rouge · default · 3 items" in out and "1 missing: c" in err


def picture(path, seed, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path.name


def test_pictures_of_other_sizes_and_broken_ones_are_unusable_not_fatal(tmp_path, capsys):
    rows = [{"id": str(k), "prompt": "x", "image": picture(tmp_path / f"t{k}.png", k)} for k in range(4)]
    reference = write(tmp_path / "r.jsonl", rows)
    out_dir = tmp_path / "out"
    names = [picture(out_dir / "0.png", 0), picture(out_dir / "1.png", 1, (20, 24)), "gone.png"]
    write(out_dir / "results.jsonl", [{"id": str(k), "image": name} for k, name in enumerate(names)])
    code, out, err = run(capsys, out_dir, reference, "--metric", "psnr")
    assert code == 3 and "psnr · default · 4 items · missing 1, failed 0, unusable 2" in out and "PSNR  25.00 dB" in out
    assert "results.jsonl:2: picture of 20 × 24 px, the true one has 24 × 20; bring both to one size first" in err
    assert 'results.jsonl:3: image "gone.png" not found' in err
    code, out, _ = run(capsys, out_dir, reference, "--metric", "psnr", "--missing", "skip")
    assert code == 0 and "1 items" in out and "PSNR  100.00 dB" in out


def test_maps_with_the_toon_oracle_and_as_label_files(tmp_path, capsys):
    from mmi_engine.toon.dataset import make_dataset

    make_dataset(tmp_path / "toon", "test", 3, tasks=("seg2img",))
    rows = [json.loads(line) for line in (tmp_path / "toon" / "seg2img.jsonl").read_text().splitlines()]
    said = [{"id": row["id"], "image": f"../toon/{row['meta']['image']}"} for row in rows]
    write(tmp_path / "out" / "results.jsonl", said)
    reference = tmp_path / "toon" / "seg2img.jsonl"
    code, out, _ = run(capsys, tmp_path / "out", reference, "--metric", "miou", "--segmenter", "toon")
    value = json.loads((tmp_path / "out" / "metrics.json").read_text())["scores"]["miou"]["measures"]["mIoU"]["value"]
    assert code == 0 and value > 0.9 and "segmenter toon oracle" in out
    code, _, err = run(capsys, tmp_path / "out", reference, "--metric", "miou")
    assert code == 2 and "no segmenter to read its picture; name one: --segmenter DIR" in err
    Image.new("L", (5, 6)).save(tmp_path / "out" / "small.png")
    write(tmp_path / "out" / "results.jsonl", [{**said[0]}, {"id": rows[1]["id"], "labels": "small.png"}, said[2]])
    code, _, err = run(capsys, tmp_path / "out", reference, "--metric", "miou", "--segmenter", "toon")
    assert code == 3 and "map of 5 × 6 px, the true one has 128 × 128" in err


@pytest.fixture
def plain_encoder(monkeypatch):
    """The encoder on the torch kernel: nothing to compile."""
    from mmi_engine.metrics.encoder import EncoderFeatures

    make = EncoderFeatures.__init__

    def plain(self, *arguments):
        make(self, *arguments)
        for module in self.network.modules():
            if hasattr(module, "backend"):
                module.backend = "torch"

    monkeypatch.setattr(EncoderFeatures, "__init__", plain)


@pytest.mark.usefixtures("plain_encoder")
def test_encoder_distance_is_never_called_fid(tmp_path, capsys):
    from mmi_engine.toon.dataset import make_dataset

    make_dataset(tmp_path / "toon", "test", 2, tasks=("story",))
    full = [json.loads(line) for line in (tmp_path / "toon" / "stories_full.jsonl").read_text().splitlines()]
    frames = [
        [{"image": f"../toon/{f['image']}", "generated": ["image"] if k else []} for k, f in enumerate(row["frames"])]
        for row in full
    ]
    write(tmp_path / "out" / "results.jsonl", [{"id": r["id"], "frames": f} for r, f in zip(full, frames, strict=True)])
    for name in ("stories.jsonl", "stories_full.jsonl"):
        arguments = (tmp_path / "out", tmp_path / "toon" / name, "--metric", "fd-encoder,kd-encoder,psnr")
        code, out, err = run(capsys, *arguments, "--cache", tmp_path / "cache")
        assert code == 0 and "4 references each" in out and "PSNR  100.00 dB" in out and "FID" not in out
        assert "8 pictures for 128 features: the distance is biased upwards" in err
        scores = json.loads((tmp_path / "out" / "metrics.json").read_text())["scores"]
        assert scores["fd-encoder"]["measures"]["FD (own encoder)"]["value"] == pytest.approx(0.0, abs=1e-5)


def test_the_first_example_of_the_docs_runs_as_it_stands(tmp_path):
    page = (REPOSITORY / "docs" / "eval.md").read_text(encoding="utf-8")
    script = page.split("```sh\n")[1].split("```")[0]
    path = os.pathsep.join(str(REPOSITORY / name) for name in (".", "engine", "kernels"))
    run = subprocess.run(
        ["bash", "-c", f'mmi() {{ "{sys.executable}" -m mmi_cli "$@"; }}\nset -e\n{script}'],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    shown = page.split("```")[2].strip().splitlines()
    assert shown[1].strip() in run.stdout and shown[0].strip().rstrip("…") in run.stdout
