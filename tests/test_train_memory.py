"""The memory estimate beside the peak that is measured tensor by tensor, on small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from memory_meter import Meter
from tiny import tiny_model
from train_rows import manifest, numbers, recipe_of

from mmi_cli.main import cli
from mmi_engine.model.checkpoint import save_model
from mmi_engine.train import memory, sources
from mmi_engine.train.finetune import ManifestTask, sets_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tiny_model(), tmp_path_factory.mktemp("base")))


def task_of(folder: Path, base: str, image: float, *words: str) -> ManifestTask:
    rows = manifest(folder / "rows", "pairs" if image else "vqa")
    recipe = numbers(recipe_of(folder, Path(base) if base != "toon" else base, rows, *words, image=image))  # type: ignore[arg-type]
    train, val = sets_of(recipe.data, sources.locate(recipe.data), lambda _: None)
    return ManifestTask(recipe, train, val, folder)


def measured(task: ManifestTask) -> int:
    """Peak of the second step, when the moments are there."""
    parameters = [p for p in task.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    batch = task.train.batch(0, task.recipe.loop.batch_size).to("cpu")
    inputs = [value for value in vars(batch.inputs).values() if isinstance(value, torch.Tensor)]
    peak = 0
    for _ in range(2):
        moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        with Meter([*task.module.parameters(), *task.module.buffers(), *inputs, *moments]) as meter:
            loss, _ = task.module(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
        peak = meter.peak
    return peak


@pytest.mark.parametrize(
    ("name", "image", "words"),
    [
        ("tiny", 0.0, ("loop.batch_size=8",)),
        ("tiny", 10.0, ("loop.batch_size=3",)),
        ("toon", 0.0, ("loop.batch_size=2",)),
        ("toon", 10.0, ("loop.batch_size=2",)),
        ("toon", 10.0, ("loop.batch_size=4", "loop.activation_checkpointing=true")),
        ("toon", 0.0, ("loop.batch_size=2", "lora.rank=4", "optim.freeze=['visual_tokenizer']")),
    ],
)
def test_the_estimate_is_within_15_percent(
    tmp_path: Path, base: str, name: str, image: float, words: tuple[str, ...]
) -> None:
    if any("lora" in word for word in words):
        pytest.importorskip("peft")
    task = task_of(tmp_path, "toon" if name == "toon" else base, image, *words)
    told = memory.tried(task, task.recipe)
    assert told.peak == pytest.approx(measured(task), rel=0.15)
    assert all(p.grad is None for p in task.module.parameters())


@pytest.mark.parametrize(
    "words",
    [(), ("lora.rank=2",), ("loop.precision=bf16", "optim.frozen_dtype=bf16"), ("loop.ema=0.5",)],
)
def test_what_follows_from_the_configuration_alone_is_exact(tmp_path: Path, base: str, words: tuple[str, ...]) -> None:
    if words and "lora" in words[0]:
        pytest.importorskip("peft")
    task = task_of(tmp_path, base, 10.0, "optim.freeze=['codec\\.', 'language\\.body\\.']", *words)
    told, counted = memory.before_loading(task.recipe), memory.static(task.module, task.recipe)
    for part in ("gradients", "moments", "average"):
        assert getattr(told, part) == getattr(counted, part), part
    assert told.weights == pytest.approx(counted.weights, rel=0.01)
    assert told.activations is None and "at least" in told.sentence()


def test_a_dry_run_tells_it_and_writes_nothing(tmp_path: Path) -> None:
    rows = manifest(tmp_path / "rows")
    words = ["train", "--recipe", "sft_vqa", "--data", f"vqav2={rows}", "--out", str(tmp_path / "run"), "--dry-run"]
    result = CliRunner().invoke(cli, [*words, "loop.batch_size=2", "loop.global_batch=2"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recipe"]["loop"]["batch_size"] == 2
    assert "GiB a process" in result.stderr and "activations" in result.stderr
    assert not (tmp_path / "run").exists()
