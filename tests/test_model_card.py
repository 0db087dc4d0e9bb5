"""Sharing: what is saved loads again bit by bit, in one file or many; the card says what the files say."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_model
from torch import Tensor

from mmi_cli.main import main
from mmi_engine.errors import ConfigError, ModelError
from mmi_engine.metrics.encoder import EncoderFeatures
from mmi_engine.model.checkpoint import load_model, save_model
from mmi_engine.model_info import describe, fingerprint
from mmi_engine.train.recipe import resolve
from mmi_engine.weights import store
from mmi_engine.weights.card import write_card


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_sizes_of_files_follow_the_limit() -> None:
    assert store.SHARD_BYTES == 5_000_000_000  # what the hub takes in one piece without trouble
    tensors = [store.Planned(name, (n,), torch.float32) for name, n in zip("abcde", (5, 5, 20, 3, 3), strict=True)]
    files = store.split(tensors, 40)
    assert [[t.name for t in file.tensors] for file in files] == [["a", "b"], ["c"], ["d", "e"]]
    assert [file.name for file in files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    big = store.split([store.Planned(str(n), (10**9,), torch.bfloat16) for n in range(14)])
    assert [len(file.tensors) for file in big] == [2] * 7 and len(store.split(tensors)) == 1


@pytest.mark.parametrize("limit", [store.SHARD_BYTES, 50_000])
def test_what_is_saved_loads_again_bit_by_bit(tmp_path, model, limit) -> None:
    directory = save_model(model, tmp_path / "m", shard_bytes=limit)
    again = save_model(load_model(directory), tmp_path / "again", shard_bytes=limit)
    assert fingerprint(directory) == fingerprint(again)
    state, loaded = model.state_dict(), load_model(again).state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert (directory / store.INDEX).exists() == (limit == 50_000)
    if limit == 50_000:
        index = json.loads((directory / store.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in state.values())
        for path in directory.glob("*.safetensors"):
            assert set(load_file(path)) == {n for n, file in index["weight_map"].items() if file == path.name}


def test_a_file_of_mixed_dtypes_is_read_by_the_library(tmp_path) -> None:
    values = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "brain": torch.randn(3, 3).bfloat16(),
        "long": torch.arange(4),
    }
    (file,) = store.split([store.Planned(k, tuple(v.shape), v.dtype) for k, v in values.items()])
    path = store.write(file, tmp_path, lambda planned: values[planned.name])
    assert path.stat().st_size == file.bytes and not list(tmp_path.glob("*.partial"))
    found: dict[str, Tensor] = load_file(path)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in values.items())
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_save_in_the_place_of_another_leaves_none_of_its_files(tmp_path, model) -> None:
    save_model(model, tmp_path, shard_bytes=50_000)
    many = len(list(tmp_path.glob("*.safetensors")))
    save_model(model, tmp_path, shard_bytes=150_000)
    assert 1 < len(list(tmp_path.glob("*.safetensors"))) < many
    load_model(tmp_path)
    save_model(model, tmp_path, dtype=torch.float16)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert load_model(tmp_path).boi_embedding.dtype == torch.float32


def test_a_save_that_fails_keeps_the_old_files(tmp_path, model, monkeypatch) -> None:
    save_model(model, tmp_path, shard_bytes=100_000)
    before, written = fingerprint(tmp_path), []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_model(tiny_model(seed=1), tmp_path, shard_bytes=100_000)
    assert fingerprint(tmp_path) == before and not list(tmp_path.glob("*.partial"))


def test_a_kill_between_two_files_leaves_no_model_of_two_saves(tmp_path, model, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    save_model(model, tmp_path, shard_bytes=100_000)
    other, replace, done = tiny_model(seed=1), os.replace, []

    def killed(source: Path, target: Path) -> None:
        done.append(target)
        if len(done) == 2:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(store.os, "replace", killed)
    with pytest.raises(Killed):
        save_model(other, tmp_path, shard_bytes=100_000)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.partial"))) > 1
    for read in (load_model, lambda path: describe(str(path)), lambda path: EncoderFeatures(str(path))):
        with pytest.raises(ModelError, match=f"has no {store.INDEX}.*--resume"):
            read(tmp_path)
    save_model(other, tmp_path, shard_bytes=150_000)
    state = load_model(tmp_path).state_dict()
    assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())
    assert not list(tmp_path.glob("*.partial"))


def test_the_card_says_what_the_files_say(tmp_path, model, capsys) -> None:
    directory = save_model(model, tmp_path / "my-model")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(resolve("toon_anneal", ["optim.lr=3e-4"]).to_json())
    (tmp_path / "refs.jsonl").write_text('{"id":"a","caption":"a cat on a mat"}\n{"id":"b","caption":"a red bus"}\n')
    rows = [{"id": "a", "caption": "a cat", "status": "ok"}, {"id": "b", "caption": "a bus", "status": "ok"}]
    (tmp_path / "res.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = ["eval", str(tmp_path / "res.jsonl"), str(tmp_path / "refs.jsonl"), "--metric", "cider"]
    assert main([*scored, "--out", str(tmp_path / "scores")]) == 0
    command = ["model", "card", str(directory), "--run", str(run), "--metrics", str(tmp_path / "scores")]
    assert main([*command, "--license", "apache-2.0", "--base-model", "lab/llm"]) == 0
    text = (directory / "README.md").read_text()
    head = text.split("---\n")[1]
    assert "license: apache-2.0" in head and "base_model:\n- lab/llm" in head and "library_name: mmi" in head
    assert f"| **all** | **{describe(str(directory)).parameters:,}** |" in text and "# tiny" in text
    value = json.loads((tmp_path / "scores/metrics.json").read_text())["scores"]["cider"]["measures"]["CIDEr"]["value"]
    assert f"| cider | {value:.4g} |" in text
    assert re.search(r"\| `optim\.lr` \| 0\.0003 \| command line \|", text) and "| `loss.image` | 10.0 |" in text
    load_model(directory)  # a card disturbs nothing
    assert fingerprint(directory) == fingerprint(save_model(model, tmp_path / "bare"))


def test_files_that_hold_no_scores_are_refused(tmp_path, model) -> None:
    directory = save_model(model, tmp_path / "m")
    (tmp_path / "metrics.json").write_text('{"scores": 3}')
    with pytest.raises(ConfigError, match="holds no scores"):
        write_card(directory, metrics=[tmp_path])
    with pytest.raises(ConfigError, match="cannot be read"):
        write_card(directory, run=tmp_path / "absent")
    assert not (directory / "README.md").exists()


def test_the_encoder_of_a_model_in_several_files(tmp_path, model) -> None:
    whole, sharded = save_model(model, tmp_path / "a"), save_model(model, tmp_path / "b", shard_bytes=40_000)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    picture = Image.linear_gradient("L").convert("RGB")
    one, other = (EncoderFeatures(str(path)) for path in (whole, sharded))
    assert (one.features([one.prepare(picture)]) == other.features([other.prepare(picture)])).all()


def test_a_card_changed_by_hand_is_left_alone(tmp_path, model, capsys) -> None:
    directory = save_model(model, tmp_path / "m")
    card, command = directory / "README.md", ["model", "card", str(directory)]
    assert main(command) == 0 and main([*command, "--license", "mit"]) == 0  # its own is written anew
    own = card.read_text().replace("# tiny", "# My thesis")
    for text in (own, "# Notes\n", ""):
        card.write_text(text)
        assert main(command) == 1 and card.read_text() == text
    assert "changed by hand, or by another version of mmi" in capsys.readouterr().err
    card.write_bytes(b"\xff")
    assert main(command) == 1 and card.read_bytes() == b"\xff"
    assert main([*command, "--overwrite"]) == 0 and main(command) == 0 and "# tiny" in card.read_text()


def test_a_card_written_from_inside_names_the_directory(tmp_path, model, monkeypatch) -> None:
    monkeypatch.chdir(save_model(model, tmp_path / "my-model"))
    assert "--model my-model --out" in write_card(Path(".")).read_text()


def test_a_save_leaves_files_of_the_users(tmp_path, model) -> None:
    (tmp_path / "model_before.safetensors").write_text("x")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("x")  # of a save before
    save_model(model, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors", "model_before.safetensors"]
