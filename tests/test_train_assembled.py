"""Models assembled of parts of every family are trained by the command that a user types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_parts import COMBINATIONS, make_parts
from train_rows import manifest, recipe_of

from mmi_cli.main import main
from mmi_engine.errors import ConfigError
from mmi_engine.model.checkpoint import load_model, save_model
from mmi_engine.train import foundation
from mmi_engine.train.loader import stream
from mmi_engine.weights import store

FROZEN = ("visual_tokenizer.trunk.", "text_head.head.", "image_decoder.codec.")
MOVED = (".cross.gate", "zero_conv", "project_out", "boi_embedding")
"""What begins at zero or nearly so, one for every new piece between the parts: bfloat16 shows that it moved."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifest(tmp_path_factory.mktemp("rows"), "pairs")


@pytest.mark.parametrize("families", COMBINATIONS, ids="-".join)
def test_two_steps_of_pretraining(families, rows, tmp_path) -> None:
    spec, model, run = make_parts(tmp_path / "parts", *families), tmp_path / "model", tmp_path / "run"
    assert main(["model", "new", str(spec), "--out", str(model), "-q"]) == 0
    command = ["train", "--recipe", "pretrain", "--model", str(model), "--data", f"laion2b={rows}", "--out", str(run)]
    sizes = ["data.encoder_px=0", "data.decoder_px=0", "data.row_tokens=64", "loop.batch_size=2"]
    short = ["loop.steps=2", "loop.log_every=1", "loop.eval_samples=2", "measure.settings={steps=2}", "data.loaders=0"]
    assert main([*command, "-q", *sizes, *short, "data.held_out=0.2", "optim.warmup=1"]) == 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2]
    assert all(line["text"] > 0 and line["image"] > 0 for line in logged if "loss" in line)
    before, after = (load_file(path / "model.safetensors") for path in (model, run / "model"))
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(after[name].float(), before[name].bfloat16().float())}
    for part in MOVED:
        assert any(part in name for name in moved), part
    assert not any(name.startswith(FROZEN) for name in moved)
    assert load_model(run / "model").config == load_model(model).config


@pytest.mark.parametrize("image", [0.0, 1.0])
def test_a_base_in_several_files_is_read_and_written_whole(tmp_path, monkeypatch, image) -> None:
    model = tiny_model()
    base = save_model(model, tmp_path / "base", shard_bytes=40_000)
    assert len(list(base.glob("*.safetensors"))) > 3
    found = foundation.load(recipe_of(tmp_path, base, tmp_path / "rows.jsonl", image=image).recipe)
    own, state = model.state_dict(), found.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in state.items())
    assert any(name.startswith("image_decoder.") for name in state) == bool(image)
    monkeypatch.setattr(store.split, "__defaults__", (50_000,))
    foundation.export(found, state, tmp_path / "out", torch.float16)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    written = load_model(tmp_path / "out").state_dict()
    assert written.keys() == own.keys()
    assert all(torch.equal(written[name], value.half().float()) for name, value in own.items())


def test_an_error_in_a_process_that_builds_batches_is_told_as_it_is() -> None:
    def make(index: int) -> None:
        raise ConfigError(f"no row {index}", remedy="look at it")

    with pytest.raises(ConfigError, match="^no row 5; look at it$"):
        list(stream(make, [5], workers=1, pin=False))
