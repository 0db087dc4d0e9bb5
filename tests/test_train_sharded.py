"""Parameters spread over processes: they train as one, and one goes on from their checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import tiny_model
from train_rows import manifest, numbers, recipe_of

from mmi_cli.commands.train import train as command
from mmi_engine.errors import ConfigError, UsageError
from mmi_engine.model.checkpoint import load_model, save_model
from mmi_engine.train import launched, sources
from mmi_engine.train.finetune import ManifestTask, sets_of
from mmi_engine.train.start import train

SCRIPT = Path(__file__).with_name("train_rows.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(), tmp_path_factory.mktemp("base"))


def test_sharded_processes_train_as_one_and_one_goes_on_from_their_checkpoint(tmp_path: Path, base: Path) -> None:
    pairs = manifest(tmp_path / "pairs", "pairs")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    words = ["loop.steps=2", "loop.global_batch=4", "loop.checkpoint_steps=1", "data.pack=false", "optim.eps=1e-3"]
    words.append("optim.weight_decay=0.0")  # zero gradients decay, absent ones do not
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29531"]
    arguments = [
        str(SCRIPT),
        str(tmp_path / "two"),
        str(base),
        str(pairs),
        *words,
        "loop.shard=fsdp",
        "loss.image=10.0",
    ]
    subprocess.run([*command, *arguments], env=environment, check=True, timeout=200)
    assert json.loads((tmp_path / "two" / "run.json").read_text(encoding="utf-8"))["processes"] == 2
    train(recipe_of(tmp_path, base, pairs, *words, image=10.0), tmp_path / "one")
    last = Path("checkpoints") / "step-00000002"
    first, second = (load_file(tmp_path / name / last / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert max(float((first[n] - second[n]).abs().max()) for n in first) < 1e-5
    # one process resumes what two have begun, and ends where it would have ended alone
    shutil.rmtree(tmp_path / "two" / last)
    train(recipe_of(tmp_path, base, pairs, *words, image=10.0), tmp_path / "two", resume=True)
    third = load_file(tmp_path / "two" / last / "model.safetensors")
    assert max(float((first[n] - third[n]).abs().max()) for n in first) < 1e-5
    before = load_model(base).state_dict()
    assert max(float((first[f"model.{n}"] - w).abs().max()) for n, w in before.items() if f"model.{n}" in first) > 1e-4


def test_accelerates_own_configuration_shards(tmp_path: Path, base: Path) -> None:
    """`accelerate launch --config_file` of the example: two CPU processes end where one ends that accumulates twice."""
    rows = manifest(tmp_path / "rows")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    config = SCRIPT.parent.parent / "examples" / "accelerate" / "fsdp.yaml"
    words = ["loop.steps=1", "loop.global_batch=4", "data.pack=false", "optim.eps=1e-3", "optim.weight_decay=0.0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "29541", str(SCRIPT), str(tmp_path / "two"), str(base), str(rows), *words]
    subprocess.run(command, env=environment, check=True, timeout=200)
    assert json.loads((tmp_path / "two" / "run.json").read_text(encoding="utf-8"))["processes"] == 2
    resolved = json.loads((tmp_path / "two" / "recipe.json").read_text(encoding="utf-8"))
    assert resolved["recipe"]["loop"]["shard"] == "fsdp" and resolved["recipe"]["loop"]["reshard"]
    assert resolved["origins"]["loop.shard"] == launched.WORDS
    train(recipe_of(tmp_path, base, rows, *words), tmp_path / "one")
    last = Path("checkpoints") / "step-00000001" / "model.safetensors"
    first, second = (load_file(tmp_path / name / last) for name in ("one", "two"))
    assert first.keys() == second.keys() and max(float((first[n] - second[n]).abs().max()) for n in first) < 1e-5


def test_what_accelerate_asks_for_and_cannot_have(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path, base, manifest(tmp_path / "rows"))
    assert launched.adapted(recipe) is recipe and launched.deepspeed(recipe.recipe) is None
    monkeypatch.setenv(launched.FSDP, "true")
    with pytest.raises(ConfigError, match="version 1"):
        launched.adapted(recipe)
    monkeypatch.setenv("FSDP_VERSION", "2")
    averaged = recipe_of(tmp_path, base, tmp_path / "rows" / "manifest.jsonl", "loop.ema=0.9")
    with pytest.raises(ConfigError, match="averaged"):
        launched.adapted(averaged)
    monkeypatch.setenv(launched.FSDP, "false")
    monkeypatch.setenv(launched.DEEPSPEED, "true")
    with pytest.raises(UsageError, match="CUDA"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(launched.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed"):
        launched.deepspeed(recipe.recipe)
    monkeypatch.setattr(launched.importlib.util, "find_spec", lambda name: name)
    plugin = launched.deepspeed(recipe.recipe)
    assert "train_batch_size" not in plugin.deepspeed_config
    held = plugin.deepspeed_config
    assert (held["train_micro_batch_size_per_gpu"], held["gradient_accumulation_steps"]) == (2, 1)
    assert held["gradient_clipping"] == 1.0 and plugin.zero_stage == 2
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": "auto"}), encoding="utf-8")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    named = launched.deepspeed(recipe.recipe)
    assert named.deepspeed_config["zero_optimization"]["stage"] == 1
    assert named.deepspeed_config["train_micro_batch_size_per_gpu"] == 2
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="stage 3"):
        launched.deepspeed(recipe.recipe)


def test_flags_of_the_command(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = manifest(tmp_path / "rows")
    words = ["--recipe", "sft_vqa", "--model", str(base), "--data", f"vqav2={rows}", "--dry-run"]
    shown = json.loads(CliRunner().invoke(command, [*words, "--fsdp", "loop.precision=fp32"]).stdout)
    assert shown["recipe"]["loop"]["shard"] == "fsdp" and shown["recipe"]["loop"]["ema"] == 0.0
    monkeypatch.delenv(launched.DEEPSPEED, raising=False)  # so that it is taken back
    missing = CliRunner().invoke(command, [*words, "--deepspeed", "gone.json"])
    assert isinstance(missing.exception, UsageError) and "gone.json" in missing.exception.message
    both = CliRunner().invoke(command, [*words, "--deepspeed", "gone.json", "--fsdp"])
    assert both.exit_code == 2 and "exclude" in both.output


def test_texts_alone_reach_every_parameter_of_a_sharded_run(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "texts.jsonl"
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "Pip"}]
    path.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    recipe = numbers(recipe_of(tmp_path, base, path, "loop.shard=fsdp", "data.held_out=0.0", image=10.0))
    train_rows, val_rows = sets_of(recipe.data, sources.locate(recipe.data), lambda _: None)
    task = ManifestTask(recipe, train_rows, val_rows, tmp_path)
    batch = task.to_device(task.batch(0), "cpu")
    assert len(batch.inputs.images) == 1 and batch.inputs.image_loss_mask.tolist() == [0.0]
    loss, parts = task.module(batch)
    loss.backward()
    without = [n for n, p in task.model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == [] and float(loss.detach()) == pytest.approx(float(parts["text"]), rel=1e-5)
    moved = {n for n, p in task.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert any("mlp" in n for n in moved) and not any("unet" in n for n in moved)
    with pytest.raises(ConfigError, match="no averaged weights"):
        recipe_of(tmp_path, base, path, "loop.shard=fsdp", "loop.ema=0.9")
