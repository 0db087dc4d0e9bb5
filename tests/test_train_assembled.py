"""Models assembled of parts of every family learn in the loop that trains the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_parts import COMBINATIONS, make_parts
from train_cache import small_cache

from mmi_cli.main import main
from mmi_engine.model.checkpoint import load_model
from mmi_engine.train.interleaved import InterleavedTask
from mmi_engine.train.loop import Loop
from mmi_engine.train.recipe import DataConfig, LoopConfig, LossConfig, OptimConfig, Recipe


@pytest.fixture(params=COMBINATIONS, ids="-".join)
def assembled(request, tmp_path) -> Path:
    spec = make_parts(tmp_path / "parts", *request.param)
    assert main(["model", "new", str(spec), "--out", str(tmp_path / "parts/out"), "-q"]) == 0
    return tmp_path / "parts"


def test_two_training_steps_of_the_loop(assembled, tmp_path, monkeypatch) -> None:
    pictures = small_cache(tmp_path / "pictures", monkeypatch, shards=1)
    recipe = Recipe(
        task="interleaved",
        data=DataConfig(mixture={"story": 1.0, "caption": 1.0}, row_tokens=120),
        model={"base": str(assembled / "out")},
        loss=LossConfig(noise_repeats=1),
        optim=OptimConfig(lr=1e-3, warmup=1),
        loop=LoopConfig(steps=2, batch_size=2, eval_samples=8, eval_every=100, log_every=1, ema=0.5),
    )
    task = InterleavedTask(recipe, pictures, pictures, lambda done, total: None)
    monkeypatch.setattr(task, "preview", lambda path: path.write_bytes(b""))
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    (tmp_path / "run").mkdir()
    figures = Loop(recipe, task, tmp_path / "run").run()
    assert figures["text"] > 0 and figures["image"] > 0
    after = task.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    for part in (".cross.gate", "zero_conv", "visual_tokenizer.project_out", "context_resampler", "boi_embedding"):
        assert any(part in name for name in moved), part
    assert not any(".codec." in name for name in moved)
    assert load_model(tmp_path / "run/model").config == task.model.config
