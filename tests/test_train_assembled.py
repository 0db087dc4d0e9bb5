"""Models assembled of parts of every family are trained by the command that a user types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_parts import COMBINATIONS, make_parts
from train_rows import manifest, recipe_of

from mmi_cli.main import main
from mmi_engine.errors import ConfigError, ModelError
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


@pytest.mark.parametrize("partial", [False, True])
def test_a_damaged_base_is_refused_and_never_filled_up(tmp_path, partial) -> None:
    base = save_model(tiny_model(), tmp_path / "base", shard_bytes=40_000)
    setting = ["model.partial=true"] * partial
    recipe = recipe_of(tmp_path, base, tmp_path / "rows.jsonl", *setting).recipe
    foundation.load(recipe)
    (path, *others) = sorted(base.glob("model-*.safetensors"))
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of {len(others) + 1} weight files, first {path.name}; restore"):
        foundation.load(recipe)
    path.write_bytes(content[:-1])
    with pytest.raises(ModelError, match=rf"{path.name} cannot be read.*restore"):
        foundation.load(recipe)
    path.write_bytes(content)
    save_file({"boi_embedding": torch.zeros_like(tiny_model().boi_embedding)}, base / "model.safetensors")
    with pytest.raises(ModelError, match=r"boi_embedding stands in model-\d+-of-\d+\.safetensors too; restore"):
        foundation.load(recipe)


def test_what_helps_when_weights_do_not_fit_depends_on_the_recipe(tmp_path) -> None:
    base = save_model(tiny_model(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    rows = tmp_path / "rows.jsonl"
    changed = recipe_of(tmp_path, base, rows, 'model.name="x"').recipe
    del tensors["boi_embedding"]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 tensors do not fit.*first boi_embedding; remove the changes of \[model\]"):
        foundation.load(changed)
    with pytest.raises(ModelError, match="first boi_embedding; config.json and the weights do not belong together"):
        foundation.load(recipe_of(tmp_path, base, rows).recipe)
    assert foundation.load(recipe_of(tmp_path, base, rows, "model.partial=true").recipe).fresh == ["boi_embedding"]


def test_an_export_that_was_killed_half_way_is_refused_until_it_is_written_again(tmp_path, monkeypatch) -> None:
    base = save_model(tiny_model(), tmp_path / "base")
    found, out = foundation.load(recipe_of(tmp_path, base, tmp_path / "rows.jsonl", image=1.0).recipe), tmp_path / "out"
    monkeypatch.setattr(store.split, "__defaults__", (50_000,))
    state = found.model.state_dict()
    foundation.export(found, state, out, torch.float32)
    appear, done = store._appear, []

    def killed(partial: Path) -> Path:
        if done:
            raise KeyboardInterrupt
        done.append(partial)
        return appear(partial)

    moved = {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "_appear", killed)
        foundation.export(found, moved, out, torch.float32)
    with pytest.raises(ModelError, match="--resume"):
        load_model(out)
    foundation.export(found, moved, out, torch.float32)
    written = load_model(out).state_dict()
    assert all(torch.equal(written[name], value) for name, value in moved.items())


def test_an_error_in_a_process_that_builds_batches_is_told_as_it_is() -> None:
    def make(index: int) -> None:
        raise ConfigError(f"no row {index}", remedy="look at it")

    with pytest.raises(ConfigError, match="^no row 5; look at it$"):
        list(stream(make, [5], workers=1, pin=False))
