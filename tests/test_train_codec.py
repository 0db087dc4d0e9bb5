"""The codec task: start at the best linear code, losses in closed form, export with the measured scale."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from train_cache import small_cache

from mmi_engine.errors import ConfigError, ModelError
from mmi_engine.model.checkpoint import load_model, save_model
from mmi_engine.train.loop import Loop
from mmi_engine.train.recipe import Recipe
from mmi_engine.train.sections import DataConfig, LoopConfig, LossConfig, OptimConfig
from mmi_engine.train.vae import CodecTask, codec_config, edge_loss, load_codec, psnr

CHANNELS, PATCH, WIDTH = 5, 4, 56
MODEL = {
    "patch": PATCH,
    "image_size": 32,
    "diffusers": {
        "in_channels": 48,
        "out_channels": 48,
        "latent_channels": CHANNELS,
        "block_out_channels": [WIDTH],
        "layers_per_block": 1,
        "norm_num_groups": 1,
        "mid_block_add_attention": False,
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
    },
}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CodecTask:
    pictures = small_cache(tmp_path / "pictures", monkeypatch, shards=25)
    recipe = Recipe(
        task="vae",
        data=DataConfig(crop=16),
        model=MODEL,
        loss=LossConfig(edge=0.5),
        optim=OptimConfig(lr=1e-3, warmup=1, weight_decay=0.0),
        loop=LoopConfig(steps=3, batch_size=2, eval_samples=40, eval_every=3, log_every=1, ema=0.5),
    )
    torch.manual_seed(0)
    return CodecTask(recipe, pictures, pictures)


def patches(pictures: np.ndarray) -> np.ndarray:
    """uint8 ``[N, 32, 32, 3]`` → float64 ``[N·64, 48]`` in [-1, 1], any fixed order within a patch."""
    grid = pictures.astype(np.float64).reshape(-1, 8, PATCH, 8, PATCH, 3) / 127.5 - 1
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, PATCH * PATCH * 3)


def test_starts_as_principal_components(task: CodecTask) -> None:
    rng = np.random.default_rng(0)
    for shard in range(25):  # textured pictures: the flat ones of the cache have only three components
        path = task.train.folder / f"shard-{shard:05d}" / "pictures.npy"
        flat = np.load(path)
        np.save(path, np.clip(flat * 0.5 + rng.normal(60, 30, flat.shape), 0, 255).astype(np.uint8))
    fresh = CodecTask(task.recipe, dataclasses.replace(task.train), dataclasses.replace(task.train))
    first = np.stack([fresh.train.picture(i, 0) for i in range(100)])
    data = patches(first)
    mean = data.mean(0)
    _, _, basis = np.linalg.svd(data - mean, full_matrices=False)
    shown = patches(np.stack([fresh.val.picture(i // 5, i % 5) for i in range(40)])) - mean
    error = shown - shown @ basis[:CHANNELS].T @ basis[:CHANNELS]
    expected = 10 * math.log10(4 / np.mean(error**2))
    assert fresh.evaluate(40)["psnr"] == pytest.approx(expected, abs=0.1)


def test_held_channels_do_not_move(task: CodecTask) -> None:
    vae = task.codec.vae
    before = [vae.encoder.conv_in.bias[-2:].clone(), vae.decoder.conv_norm_out.weight[-2:].clone()]
    moving = vae.encoder.conv_in.weight[0].clone()
    optimizer = torch.optim.SGD(task.module.parameters(), lr=1e-3)
    for index in range(2):
        loss, _ = task.module(task.to_device(task.batch(index), "cpu"))
        loss.backward()
        optimizer.step()
    assert torch.equal(vae.encoder.conv_in.bias[-2:], before[0])
    assert torch.equal(vae.decoder.conv_norm_out.weight[-2:], before[1])
    assert not torch.equal(vae.encoder.conv_in.weight[0], moving)


def test_batches_are_crops_and_repeatable(task: CodecTask) -> None:
    batch = task.batch(7)
    assert batch.shape == (2, 16, 16, 3) and batch.dtype == torch.uint8
    assert torch.equal(batch, task.batch(7)) and not torch.equal(batch, task.batch(8))
    assert task.ids(batch) == task.ids(task.batch(7))
    floats = task.to_device(batch, "cpu")
    assert torch.equal((floats * 255).round().byte().permute(0, 2, 3, 1), batch)


def test_losses_in_closed_form() -> None:
    target = torch.zeros(1, 1, 2, 3)
    rebuilt = torch.tensor([[[[0.0, 1.0, 1.0], [0.0, 0.0, 2.0]]]])
    assert float(edge_loss(rebuilt, target)) == pytest.approx((1 + 0 + 0 + 2) / 4 + (0 + 1 + 1) / 3)
    assert psnr(target + 0.1, target) == pytest.approx(20.0, abs=1e-4)


def test_kl_in_closed_form(task: CodecTask) -> None:
    with torch.no_grad():
        _, parts = task.module(task.to_device(task.batch(0), "cpu"))
        posterior = task.codec.posterior(task.to_device(task.batch(0), "cpu"))
        reference = torch.distributions.kl_divergence(
            torch.distributions.Normal(posterior.mean, posterior.std),
            torch.distributions.Normal(torch.zeros(1), torch.ones(1)),
        )
    assert float(parts["kl"]) == pytest.approx(float(reference.mean()), rel=1e-4)


def test_run_exports_a_codec_with_unit_latents(task: CodecTask, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    figures = Loop(task.recipe, task, run).run()
    codec = load_codec(run / "model")
    stored = json.loads((run / "model" / "codec.json").read_text(encoding="utf-8"))
    assert stored["diffusers"]["scaling_factor"] == pytest.approx(codec.scaling_factor)
    assert codec.scaling_factor == pytest.approx(1 / figures["latent_std"], rel=1e-3)
    pictures = task._held_out(40)
    with torch.no_grad():
        latents = codec.encode(pictures, noise=torch.zeros(1))
        rebuilt = codec.decode(latents)
    assert float(latents.std()) == pytest.approx(1.0, rel=0.01)
    assert psnr(rebuilt, pictures) == pytest.approx(figures["psnr"], abs=0.01)


def test_errors_name_what_is_wrong(task: CodecTask, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'pach'"):
        codec_config({"pach": 2})
    with pytest.raises(ModelError, match="no codec"):
        load_codec(tmp_path)
    crooked = dataclasses.replace(task.recipe, data=DataConfig(crop=15))
    with pytest.raises(ConfigError, match=r"data\.crop"):
        CodecTask(crooked, task.train, task.val)


def test_decoder_of_a_whole_model_is_trained_and_nothing_else(task: CodecTask, tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path / "base")
    recipe = dataclasses.replace(
        task.recipe,
        model={"base": str(tmp_path / "base")},
        loss=LossConfig(kl=0.0, latent_noise=0.1),
        optim=OptimConfig(lr=1e-2, warmup=1, freeze=(r"codec\.vae\.encoder\.", r"codec\.vae\.quant_conv\.")),
        data=DataConfig(crop=32),
        loop=dataclasses.replace(task.recipe.loop, steps=2, eval_every=2),
    )
    (tmp_path / "run").mkdir()
    Loop(recipe, CodecTask(recipe, task.train, task.val), tmp_path / "run").run()
    before = load_model(tmp_path / "base").state_dict()
    after = load_model(tmp_path / "run" / "model").state_dict()
    changed = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-3)}
    assert changed and all(".codec.vae.decoder." in n or ".codec.vae.post_quant_conv." in n for n in changed)
