"""Models assembled of parts of every family are trained by the command that a user types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_parts import COMBINATIONS, make_parts
from train_rows import manifest

from mmi_cli.main import main
from mmi_engine.model.checkpoint import load_model

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
