"""`mmi story` with a real model of a few thousand weights: bytes that depend on the item alone, coded failures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_run_kill import tree
from tiny import tiny_model

from mmi_cli.main import main
from mmi_engine.model.checkpoint import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_model(tiny_model(), directory)
    return directory


@pytest.fixture
def story(tmp_path, model):
    """`mmi story` on rows: returns the exit code and the output folder."""
    Image.linear_gradient("L").resize((40, 30)).save(tmp_path / "a.png")

    def go(name: str, rows: list[dict], *arguments: str, code: int = 0) -> Path:
        manifest, out = tmp_path / f"{name}.jsonl", tmp_path / name
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        fixed = [
            "--model",
            str(model),
            "--device",
            "cpu",
            "--kernel",
            "torch",
            "--threads",
            "1",
            "--max-new-tokens",
            "6",
        ]
        assert main(["story", str(manifest), "--out", str(out), *fixed, *arguments]) == code
        return out

    return go


ROWS = [
    {
        "id": "given",
        "frames": [{"text": "Pip is on the beach.", "image": "a.png"}, {"text": "Pip runs."}, {"text": None}],
    },
    {"id": "short", "frames": [{"text": "Boo waves."}]},
    {"id": "nothing", "frames": [{}, {"text": None}]},
    {
        "id": "like-given",
        "frames": [{"text": "Boo is in the snow.", "image": "a.png"}, {"text": "Boo naps."}, {"text": None}],
    },
    {"id": "chat", "messages": [{"role": "user", "content": "Draw Pip."}]},
]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_neighbours_order_shards_and_resume_do_not_change_a_byte(story):
    whole = story("m", ROWS, "--batch-size", "2")
    results = rows(whole)
    assert [row["id"] for row in results] == [row["id"] for row in ROWS]
    for row in results[:4]:
        for frame in row["frames"]:
            with Image.open(whole / frame["image"]) as picture:
                assert (picture.mode, picture.size) == ("RGB", (32, 32))
    expected = tree(whole)
    whole.rename(whole.with_name("first"))
    again = story("m", ROWS, "--batch-size", "2", "--limit", "1")
    for part in ("2/2", "1/2"):
        again = story("m", ROWS, "--batch-size", "2", "--shard", part)
    assert tree(again) == expected
    backwards = {row["id"]: row for row in rows(story("backwards", ROWS[::-1], "--batch-size", "2"))}
    assert backwards == {row["id"]: row for row in results}
    for name, content in expected.items():
        if name.endswith(".png"):
            assert (again.with_name("backwards") / name).read_bytes() == content


def test_free_continuation_alternates_within_its_limit(story):
    out = story("free", ROWS[1:2] + ROWS[4:], "--free", "2", "--temperature", "1.0", "--batch-size", "1")
    frames, chat = rows(out)
    assert frames["frames"][0]["generated"] == ["image"] and len(frames["frames"]) <= 4
    assert sum(frame["image"] is not None for frame in frames["frames"]) <= 3
    answer = chat["messages"][-1]
    assert answer["generated"] and sum(part["type"] == "image" for part in answer["content"]) <= 2


def test_a_story_longer_than_the_context_fails_alone(story):
    long = {"id": "long", "frames": [{"text": "Pip is on the beach near a red ball. " * 40}]}
    out = story("long", [long, ROWS[1]], "--batch-size", "2", code=3)
    (error,) = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert (error["id"], error["error"]) == ("long", "text_too_long") and "shorten" in error["message"]
    assert [row["id"] for row in rows(out)] == ["short"]


def test_run_json_says_where_every_setting_comes_from(story, monkeypatch):
    monkeypatch.setenv("MMI_GUIDANCE", "1.5")
    out = story("origins", ROWS[1:2], "--steps", "2", "--seed", "4")
    record = json.loads((out / "run.json").read_text())
    told = {name: (entry["value"], entry["origin"]) for name, entry in record["settings"].items()}
    assert told["steps"] == (2, "command line")
    assert told["guidance"] == (1.5, "environment")
    assert told["scheduler"] == ("ddim", "model")
    assert told["beams"] == (1, "default")
    assert (told["seed"], told["free"]) == ((4, "command line"), (0, "default"))
    assert told["batch_size"][0] == 1 and told["device"][0] == "cpu" and told["dtype"][0] == "fp32"
    assert record["versions"]["torch"] == torch.__version__ or record["versions"]["torch"] in torch.__version__
    assert len(record["identity"]["model"]) == 64


def test_what_cannot_be_had_is_refused_not_replaced(story, capsys):
    if not torch.cuda.is_available():
        story("device", ROWS[1:2], "--device", "cuda", code=1)
        assert "no CUDA device" in capsys.readouterr().err
    story("kernel", ROWS[1:2], "--kernel", "cuda", code=1)
    assert "cuda" in capsys.readouterr().err
    story("model", ROWS[1:2], "--model", "/nowhere", code=1)
    assert 'model "/nowhere" not found' in capsys.readouterr().err
    story("both", ROWS[1:2], "--beams", "2", "--temperature", "1", code=2)
    assert "exclude each other" in capsys.readouterr().err


def test_text_settings_are_completed_sensibly_or_refused(tmp_path, model, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "m.jsonl").write_text('{"id": "x", "image": "a.png"}\n')
    fixed = ["--model", str(model), "--device", "cpu", "--kernel", "torch", "--threads", "1", "-q", "--batch-size", "1"]

    def settings(*arguments: str) -> dict:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert main(["caption", str(tmp_path / "m.jsonl"), "--out", str(out), *fixed, *arguments]) == 0
        return json.loads((out / "run.json").read_text())["settings"]

    told = settings()  # a model of another name: the published defaults
    assert [told[name]["value"] for name in ("beams", "max_new_tokens", "min_new_tokens")] == [5, 20, 7]
    assert told["beams"]["origin"] == "task" and told["beams"]["value"] == 5
    assert settings("--max-new-tokens", "3")["min_new_tokens"]["value"] == 3
    assert settings("--min-new-tokens", "24")["max_new_tokens"]["value"] == 24
    assert settings("--temperature", "0.7", "--top-p", "0.9")["beams"]["value"] == 1
    command = ["caption", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "no"), *fixed, "--top-p", "0.9"]
    assert main(command) == 2 and "--temperature" in capsys.readouterr().err


def test_a_hub_id_without_a_network_is_refused_with_its_reason(capsys):
    assert main(["model", "info", "nobody/nothing"]) == 1
    assert "the hub does not give it" in capsys.readouterr().err


def test_another_model_is_refused_by_its_weights_not_its_path(story, model, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    story("same", ROWS[1:2])
    story("same", ROWS[1:2], "--model", str(copy))
    save_model(tiny_model(seed=1), copy)
    story("same", ROWS[1:2], "--model", str(copy), code=2)
    assert "model was" in capsys.readouterr().err


def test_a_model_that_produces_nan_is_an_items_error(story, tmp_path):
    broken = tiny_model()
    with torch.no_grad():
        for parameter in broken.image_decoder.parameters():
            parameter.fill_(float("nan"))
    save_model(broken, tmp_path / "nan")
    out = story("nan-run", ROWS[1:2], "--model", str(tmp_path / "nan"), code=3)
    (error,) = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert error["error"] == "not_finite"
