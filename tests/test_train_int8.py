"""Frozen decoder layers in 8 bits (bitsandbytes): close to full precision, resumed exactly, exported as the base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_train_scale import base, fresh_accelerator, losses, rows, task_of, weights  # noqa: F401
from train_rows import recipe_of

from mmi_engine.errors import BackendError, ConfigError
from mmi_engine.train import memory
from mmi_engine.train.start import train
from mmi_engine.weights import quantize

FREEZE = "optim.freeze=['visual_tokenizer\\.trunk\\.', 'language\\.body\\.(?!layers\\.\\d+\\.cross\\.)']"
WORDS = ("optim.frozen_dtype=int8", "loop.precision=bf16")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),  # RMSNorm, autocast
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]


def test_what_does_not_go_together_is_refused(
    tmp_path: Path,
    base: Path,  # noqa: F811
    rows: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="int8 needs loop.precision bf16"):
        train(recipe_of(tmp_path, base, rows, "optim.frozen_dtype=int8"), tmp_path / "run")
    with pytest.raises(ConfigError, match="not sharded"):
        train(recipe_of(tmp_path, base, rows, *WORDS, "loop.shard=fsdp"), tmp_path / "run")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(BackendError, match="is not installed") as caught:
        train(recipe_of(tmp_path, base, rows, *WORDS), tmp_path / "run")
    assert "mmi[bits]" in str(caught.value.remedy) and not (tmp_path / "run").exists()


def test_hidden_states_stay_close_and_gradients_flow(tmp_path: Path, base: Path, rows: Path) -> None:  # noqa: F811
    pytest.importorskip("bitsandbytes")
    exact = task_of(tmp_path / "a", base, rows, FREEZE, image=0.0)
    small = task_of(tmp_path / "b", base, rows, *WORDS, FREEZE, image=0.0)
    layer = "model.language.body.layers.1.self_attn.q_proj.weight"
    assert small.module.state_dict()[layer].dtype == torch.int8
    told = memory.before_loading(small.recipe)
    assert told.weights == pytest.approx(memory.static(small.module, small.recipe).weights, rel=0.01)
    assert told.weights < memory.static(exact.module, exact.recipe).weights
    batch = exact.to_device(exact.batch(0), "cpu")
    found = []
    for task in (exact, small):
        task.module.eval()
        with task.precision():
            loss, _ = task.module(batch)
        loss.backward()
        found.append((loss.detach(), dict(task.model.named_parameters())))
    assert float(found[1][0]) == pytest.approx(float(found[0][0]), rel=0.03)
    name = next(n for n in found[0][1] if n.endswith("project_out.weight"))
    grads = [named[name].grad for _, named in found]
    assert all(grad is not None for grad in grads)
    cosine = torch.nn.functional.cosine_similarity(grads[0].flatten(), grads[1].flatten(), 0)
    assert float(cosine) > 0.99


def test_a_run_resumes_with_the_same_bits_and_keeps_the_base(tmp_path: Path, base: Path, rows: Path) -> None:  # noqa: F811
    pytest.importorskip("bitsandbytes")
    for name in ("whole", "stopped"):
        train(recipe_of(tmp_path / name, base, rows, *WORDS, FREEZE), tmp_path / name / "run")
    run = tmp_path / "stopped" / "run"
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(run / "model")
    train(recipe_of(tmp_path / "stopped", base, rows, *WORDS, FREEZE), run, resume=True)
    assert losses(run) == losses(tmp_path / "whole" / "run") and all(x == x for x in losses(run))
    first, second = (tmp_path / n / "run" / "model" / "model.safetensors" for n in ("whole", "stopped"))
    assert first.read_bytes() == second.read_bytes()
    before, after = weights(base), weights(run / "model")
    assert before.keys() == after.keys()
    frozen = [n for n in before if quantize.LINEAR.match(n.removesuffix(".weight"))]
    assert frozen and all(torch.equal(before[n].bfloat16(), after[n].bfloat16()) for n in frozen)
    assert any(not torch.equal(before[n].bfloat16(), after[n].bfloat16()) for n in before if "resampler" in n)


def test_adapters_fold_into_the_weights_of_the_base(tmp_path: Path, base: Path, rows: Path) -> None:  # noqa: F811
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    words = ("lora.rank=2", "lora.alpha=8.0", "lora.parts=['language.body']", "optim.freeze=['codec\\.']")
    task = task_of(tmp_path, base, rows, *WORDS, *words, image=10.0)
    layer = "language.body.layers.1.self_attn.q_proj"
    module = task.model.get_submodule(layer)
    assert module.base_layer.weight.dtype == torch.int8
    with torch.no_grad():
        module.lora_B["default"].weight.normal_(std=0.3)
    task.export(tmp_path / "model")
    low, high = (side["default"].weight.detach() for side in (module.lora_A, module.lora_B))
    change = 4.0 * high @ low
    found = weights(tmp_path / "model")[f"{layer}.weight"].float() - weights(base)[f"{layer}.weight"].float()
    assert torch.allclose(found, change, atol=0.02) and float(change.abs().max()) > 0.1
