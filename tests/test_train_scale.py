"""Training that fits: adapters, recomputed activations, halves; and what one sees: best model, sheets, trackers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import LoggerType
from tiny import tiny_model
from train_rows import manifest, numbers, recipe_of

from mmi_engine.errors import ConfigError, UsageError
from mmi_engine.model.checkpoint import load_model, save_model
from mmi_engine.train import adapters, frozen, sources
from mmi_engine.train.curves import read
from mmi_engine.train.finetune import ManifestTask, sets_of
from mmi_engine.train.sections import LoraConfig
from mmi_engine.train.start import train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifest(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifest(tmp_path_factory.mktemp("pairs"), "pairs")


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps its precision for the life of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_model(directory).state_dict()


def task_of(folder: Path, base: Path, rows: Path, *overrides: str, image: float = 10.0) -> ManifestTask:
    recipe = numbers(recipe_of(folder, base, rows, *overrides, image=image))
    train_rows, val_rows = sets_of(recipe.data, sources.locate(recipe.data), lambda _: None)
    return ManifestTask(recipe, train_rows, val_rows, folder)


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in read(directory / "metrics.jsonl") if "loss" in line]


LORA = ("lora.rank=2", "lora.alpha=8.0", "optim.freeze=['codec\\.']")


def test_adapters_train_beside_frozen_layers_and_fold_in(tmp_path: Path, base: Path, pairs: Path) -> None:
    pytest.importorskip("peft")
    task = task_of(tmp_path, base, pairs, *LORA)
    trained = {n for n, p in task.model.named_parameters() if p.requires_grad}
    assert any("language.body" in n and ".lora_A." in n for n in trained)
    assert any("image_decoder.unet.unet" in n and ".lora_A." in n for n in trained)
    assert not any(n.endswith("q_proj.base_layer.weight") for n in trained)
    assert any(".cross.mmfs." in n for n in trained) and not any(".cross." in n and "lora" in n for n in trained)
    assert any("resampler" in n for n in trained)
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    task.export(tmp_path / "model")
    merged = load_model(tmp_path / "model").eval()
    batch = task.to_device(task.batch(0), "cpu")
    task.module.eval()
    with torch.no_grad():
        visual = task.model.visual_tokenizer(batch.inputs.images)
        ours = task.model.hidden_states(batch.inputs, visual)
        theirs = merged.hidden_states(batch.inputs, merged.visual_tokenizer(batch.inputs.images))
        before = load_model(base)
        base_hidden = before.hidden_states(batch.inputs, before.visual_tokenizer(batch.inputs.images))
    real = batch.inputs.attention_mask.bool()
    difference = (ours - theirs).abs()[real].max()
    assert float(difference) < 0.02 < float((ours - base_hidden).abs()[real].max())  # stored in fp16


def test_adapters_survive_a_run_and_their_names_are_checked(tmp_path: Path, base: Path, pairs: Path) -> None:
    pytest.importorskip("peft")
    train(recipe_of(tmp_path, base, pairs, *LORA, "loop.steps=2", image=10.0), tmp_path / "run")
    before, after = weights(base), weights(tmp_path / "run" / "model")
    name = "language.body.layers.1.self_attn.q_proj.weight"
    rank = int(torch.linalg.matrix_rank(after[name].float() - before[name].float(), atol=1e-3))
    assert before.keys() == after.keys() and 0 < rank <= 3
    with pytest.raises(ConfigError, match="no layer matches"):
        adapters.targets(tiny_model(), LoraConfig(rank=2, layers=("nothing",)))


def test_recomputed_activations_give_the_same_gradients(tmp_path: Path, base: Path, pairs: Path) -> None:
    grads = []
    for words in ((), ("loop.activation_checkpointing=true",)):
        task = task_of(tmp_path, base, pairs, *words)
        torch.manual_seed(0)
        loss, _ = task.module(task.to_device(task.batch(0), "cpu"))
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-6), name


def test_recomputing_calls_each_layer_twice(tmp_path: Path, base: Path, rows: Path) -> None:
    task = task_of(tmp_path, base, rows, "loop.activation_checkpointing=true", image=0.0)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    task.model.language.body.layers[1].mlp.register_forward_pre_hook(count)
    loss, _ = task.module(task.to_device(task.batch(0), "cpu"))
    assert calls == 1
    loss.backward()
    assert calls == 2


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # RMSNorm under autocast
def test_frozen_parts_in_half_precision(tmp_path: Path, base: Path, rows: Path) -> None:
    words = ["optim.frozen_dtype=bf16", "loop.precision=bf16"]
    freeze = "optim.freeze=['visual_tokenizer\\.trunk\\.', 'language\\.body\\.(?!layers\\.\\d+\\.cross\\.)']"
    task = task_of(tmp_path, base, rows, *words, freeze, image=0.0)
    kinds = {(p.requires_grad, p.dtype) for n, p in task.model.named_parameters() if n.endswith("q_proj.weight")}
    assert kinds == {(False, torch.bfloat16)}
    assert all(p.dtype == torch.float32 for p in task.model.parameters() if p.requires_grad)
    assert frozen.halve(task.module) == 0
    train(recipe_of(tmp_path, base, rows, *words, freeze, "loop.steps=2"), tmp_path / "run")
    assert all(torch.isfinite(torch.tensor(losses(tmp_path / "run"))))


def test_best_model_sheets_and_trackers(tmp_path: Path, base: Path, rows: Path) -> None:
    pytest.importorskip("tensorboard")
    words = ["loop.eval_every=1", "loop.keep_best=text", "loop.sample_every=2", 'loop.trackers=["tensorboard"]']
    train(recipe_of(tmp_path, base, rows, *words, "optim.lr=1e-4"), tmp_path / "run")
    lines = read(tmp_path / "run" / "metrics.jsonl")
    held_out = [line["val_text"] for line in lines if "val_text" in line]
    assert len(held_out) == 4 and (tmp_path / "run" / "model-best" / "config.json").is_file()
    assert [p.name for p in sorted((tmp_path / "run" / "samples").iterdir())] == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    assert list((tmp_path / "run" / "trackers").rglob("events.out.tfevents.*"))
    last = [line for line in lines if "loss" in line][-1]
    assert last["memory_gib"] > 0.05 and last["tokens_per_s"] > 0 and last["eta_s"] == 0
    with pytest.raises((UsageError, ValueError)):
        train(recipe_of(tmp_path, base, rows, 'loop.trackers=["nothing"]'), tmp_path / "other")


class FakeRun:
    """What accelerate's W&B tracker needs of a run; keeps what it is told."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.lines, self.finished = settings, [], False
        self.config = SimpleNamespace(update=lambda values, **_: self.settings.update(values))

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_lines_reach_w_and_b_through_accelerate(
    tmp_path: Path, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a module in W&B's place; what the real one does with it is accelerate's and W&B's."""
    runs: list[FakeRun] = []
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.run = None  # type: ignore[attr-defined]
    module.config = SimpleNamespace(update=lambda values, **_: runs[-1].settings.update(values))  # type: ignore[attr-defined]
    module.init = lambda **settings: runs.append(FakeRun(**settings)) or runs[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    train(recipe_of(tmp_path, base, rows, 'loop.trackers=["wandb"]', "loop.steps=2"), tmp_path / "run")
    (run,) = runs
    assert run.settings["project"] == "mmi" and run.settings["steps"] == 2 and run.finished
    written = [line for line in read(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    sent = {step: values["loss"] for step, values in run.lines if "loss" in values}
    assert sent == {line["step"]: pytest.approx(line["loss"]) for line in written} and len(sent) == 2
    assert any("val_text" in values for _, values in run.lines)
