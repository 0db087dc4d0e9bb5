"""Training on manifests from end to end, on the tiny model: what is loaded, trained, resumed, written, refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from train_rows import manifest, numbers, recipe_of

from mmi_cli.commands.train import train as command
from mmi_engine.errors import ConfigError, ModelError, OutputError, UsageError
from mmi_engine.model.checkpoint import load_model, save_model
from mmi_engine.train import foundation, sources
from mmi_engine.train.curves import read
from mmi_engine.train.finetune import ManifestTask, sets_of, settled
from mmi_engine.train.start import train

SCRIPT = Path(__file__).with_name("train_rows.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifest(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifest(tmp_path_factory.mktemp("pairs"), "pairs")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path, pairs: Path) -> Path:
    """An undisturbed run of four steps that learns texts and pictures."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    train(recipe_of(directory.parent, base, pairs, image=10.0), directory)
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_model(directory).state_dict()


def task_of(folder: Path, base: Path, rows: Path, *overrides: str, image: float = 0.0) -> ManifestTask:
    recipe = numbers(recipe_of(folder, base, rows, *overrides, image=image))
    train_rows, val_rows = sets_of(recipe.data, sources.locate(recipe.data), lambda _: None)
    return ManifestTask(recipe, train_rows, val_rows, folder)


def test_a_text_recipe_leaves_the_image_decoder_on_the_disk(tmp_path: Path, base: Path, rows: Path) -> None:
    task = task_of(tmp_path, base, rows)
    assert not any(name.startswith("image_decoder") for name, _ in task.model.named_parameters())
    loss, parts = task.module(task.to_device(task.batch(0), "cpu"))
    loss.backward()
    assert set(parts) == {"text"} and task.model.text_head.head.weight.grad is not None
    task.export(tmp_path / "model")
    before, after = weights(base), weights(tmp_path / "model")
    assert before.keys() == after.keys()
    same = [n for n in before if n.startswith("image_decoder")]
    assert same and all(torch.equal(before[n].half(), after[n].half()) for n in same)
    assert load_model(tmp_path / "model").config.loss_image_weight == tiny_config().loss_image_weight


def test_losses_and_frozen_parts_of_an_image_recipe(finished: Path, base: Path) -> None:
    before, after = weights(base), weights(finished / "model")
    moved = {n for n in before if not torch.equal(before[n].half(), after[n].half())}
    assert any(n.startswith("image_decoder.unet") for n in moved) and any(".cross." in n for n in moved)
    assert not any("trunk" in n for n in moved)
    lines = [line for line in read(finished / "metrics.jsonl") if "loss" in line]
    assert all(line["loss"] == pytest.approx(line["text"] + 10 * line["image"], rel=1e-3) for line in lines)
    assert (finished / "recipe.json").is_file() and (finished / "preview.png").is_file()
    assert json.loads((finished / "model" / "data.json").read_text(encoding="utf-8"))["filled"] > 0.4


def test_a_run_stopped_in_the_middle_of_an_epoch_ends_with_the_same_bits(
    tmp_path: Path, base: Path, pairs: Path, finished: Path
) -> None:
    directory = tmp_path / "run"
    train(recipe_of(tmp_path, base, pairs, image=10.0), directory)
    for later in ("step-00000004",):  # as if the run had been killed behind its first checkpoint
        shutil.rmtree(directory / "checkpoints" / later)
    shutil.rmtree(directory / "model")
    shutil.rmtree(directory / "plan")
    train(recipe_of(tmp_path, base, pairs, image=10.0), directory, resume=True)
    ours, theirs = (directory / "model" / "model.safetensors", finished / "model" / "model.safetensors")
    assert ours.read_bytes() == theirs.read_bytes()
    losses = [[(x["step"], x["loss"]) for x in read(d / "metrics.jsonl") if "loss" in x] for d in (directory, finished)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_two_processes_equal_one_that_accumulates_twice(tmp_path: Path, base: Path, rows: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    words = [str(base), str(rows), "loop.steps=2", "loop.global_batch=4", "data.pack=false", "optim.eps=1e-3"]
    command_line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    subprocess.run(
        [*command_line, str(SCRIPT), str(tmp_path / "two"), *words], env=environment, check=True, timeout=200
    )
    assert json.loads((tmp_path / "two" / "run.json").read_text(encoding="utf-8"))["processes"] == 2
    train(recipe_of(tmp_path, base, rows, *words[2:]), tmp_path / "one")
    last = Path("checkpoints") / "step-00000002" / "model.safetensors"
    first, second = (load_file(tmp_path / name / last) for name in ("one", "two"))
    assert max(float((first[n] - second[n]).abs().max()) for n in first) < 1e-5
    before = weights(base)
    assert max(float((first[f"model.{n}"] - w).abs().max()) for n, w in before.items() if f"model.{n}" in first) > 1e-4
    losses = [read(tmp_path / name / "metrics.jsonl")[0]["grad_norm"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_global_batch_decides_on_accumulation(tmp_path: Path, base: Path, rows: Path) -> None:
    recipe = numbers(recipe_of(tmp_path, base, rows, "loop.global_batch=12"))
    assert [settled(recipe, n).loop.accumulate for n in (1, 2, 3)] == [6, 3, 2]
    with pytest.raises(ConfigError, match="no multiple of 2 rows × 4 processes"):
        settled(recipe, 4)


def test_parts_can_be_left_out_and_begin_fresh(tmp_path: Path, base: Path, rows: Path) -> None:
    changed = ["model.visual_resampler.num_queries=5"]
    with pytest.raises(ModelError, match="do not fit"):
        task_of(tmp_path, base, rows, *changed)
    without = ['model.without=["language.mmfs"]', "model.partial=true", *changed]
    task = task_of(tmp_path, base, rows, *without)
    assert task.model.language.mmfs_layers == [] and task.model.config.tokens_per_image == 5
    assert task.base.fresh and all("resampler" in name for name in task.base.fresh)
    body = "language.body.layers.0{}.mlp.up_proj.weight"  # the base's layer is wrapped by one with MMFS
    assert torch.equal(task.model.state_dict()[body.format("")], weights(base)[body.format(".layer")])
    with pytest.raises(ConfigError, match="no 'language.mmf'"):
        foundation.configuration(numbers(recipe_of(tmp_path, base, rows, 'model.without=["language.mmf"]')))


def test_numbers_that_contradict_each_other_are_refused_at_once(tmp_path: Path, base: Path, rows: Path) -> None:
    for words, match in (
        (["optim.frozen_dtype=bf16"], "needs loop.precision bf16"),
        (["loss.text=0.0"], "both 0"),
        (["model.base="], "model.base is missing"),
    ):
        with pytest.raises(ConfigError, match=match):
            train(recipe_of(tmp_path, base, rows, *words), tmp_path / "run")


def test_an_existing_run_is_not_overwritten(finished: Path, base: Path, pairs: Path) -> None:
    with pytest.raises(OutputError, match="already holds"):
        train(recipe_of(finished.parent, base, pairs, image=10.0), finished)


def test_a_run_that_never_began_leaves_its_directory_free(tmp_path: Path, base: Path, rows: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps({"id": str(n), "image": "gone.png"}) + "\n" for n in range(4)), encoding="utf-8")
    run, used = tmp_path / "run", tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine", encoding="utf-8")
    for directory in (run, used):
        with pytest.raises(ConfigError, match=r"no usable row .* dropped: \w+"):
            train(recipe_of(tmp_path, base, bad), directory)
    assert not run.exists() and [path.name for path in used.iterdir()] == ["notes.txt"]
    mine = shutil.copytree(rows.parent, tmp_path / "mine") / rows.name
    train(recipe_of(tmp_path, base, mine, "loop.steps=1"), run)
    mine.write_text(bad.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no usable row .* dropped: \w+"):  # of a begun run nothing is taken away
        train(recipe_of(tmp_path, base, mine, "loop.steps=2"), run, resume=True)
    assert (run / "checkpoints" / "step-00000001").is_dir() and (run / "recipe.json").is_file()
    with pytest.raises(ConfigError, match=r"began with model\.visual_resampler = None, now it is"):
        train(recipe_of(tmp_path, base, mine, "model.visual_resampler.num_queries=5"), run, resume=True)
    assert (run / "checkpoints" / "step-00000001").is_dir() and (run / "recipe.json").is_file()


def test_a_run_goes_on_only_with_its_own_data_and_base(
    tmp_path: Path, base: Path, rows: Path, pairs: Path, finished: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.copytree(base, tmp_path / "other")
    for recipe, key, old, new in (
        (recipe_of(tmp_path, base, rows, image=10.0), "data.sets rows.manifest", pairs, rows),
        (recipe_of(tmp_path, tmp_path / "other", pairs, image=10.0), "model.base", base, tmp_path / "other"),
    ):
        with pytest.raises(ConfigError) as caught:
            train(recipe, run, resume=True)
        assert all(repr(str(value)) in caught.value.message for value in (old, new)) and key in caught.value.message
        assert "--out" in str(caught.value.remedy)
    shutil.rmtree(run / "checkpoints")  # nothing to go on from: a new beginning, whose log holds nothing of the old
    figures = train(recipe_of(tmp_path, base, rows, "loop.steps=2", "loop.eval_every=1"), run, resume=True)
    assert "text" in figures and max(line["step"] for line in read(run / "metrics.jsonl")) == 2
    longer = recipe_of(tmp_path, base, Path(os.path.relpath(rows)), "loop.steps=3", "optim.lr=1e-4")
    train(longer, run, resume=True)
    assert max(line["step"] for line in read(run / "metrics.jsonl")) == 3


def test_missing_data_are_named_with_their_remedy_before_any_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--recipe", "sft_rec", "--model", "nowhere", f"data.root={tmp_path}"])
    assert isinstance(result.exception, UsageError) and result.exception.exit_code == 2
    message = result.exception.message
    assert "3 of 3 sets" in message and str(tmp_path / "refcocog" / "manifest.jsonl") in message
    assert "github.com/lichengunc/refer" in message and "mmi data import refcoco" in message
    code = (
        "import sys; from click.testing import CliRunner; from mmi_cli.commands.train import train;"
        "result = CliRunner().invoke(train, ['--recipe', 'pretrain', '--model', 'nowhere']);"
        "assert result.exception.exit_code == 2, result.exception;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_data_on_the_command_line(tmp_path: Path, rows: Path) -> None:
    words = ["--recipe", "sft_vqa", "--data", f"vqav2={rows}", "--dry-run", "loop.batch_size=1"]
    shown = json.loads(CliRunner().invoke(command, words).stdout)
    assert [entry["name"] for entry in shown["recipe"]["data"]["sets"]] == ["vqav2"]
    assert shown["recipe"]["model"] == {"base": "toon"} and shown["origins"]["data.sets"] == "command line"
    two = [
        "--recipe",
        "sft_vqa",
        "--model",
        "toon",
        "--data",
        str(rows),
        str(rows),
        "--dry-run",
        "loop.steps=3",
        "loop.batch_size=1",
    ]
    listed = json.loads(CliRunner().invoke(command, two).stdout)["recipe"]
    assert len(listed["data"]["sets"]) == 2 and listed["loop"]["steps"] == 3
    missing = CliRunner().invoke(command, ["--recipe", "sft_vqa", "--data", "vqav2=gone.jsonl", "--dry-run"])
    assert isinstance(missing.exception, UsageError) and "gone.jsonl" in str(missing.exception)
