"""Kept latents: the same bits as a run that encodes anew, each picture once, found again after an interruption."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import tiny_model
from train_rows import manifest, recipe_of

from mmi_engine.errors import ConfigError
from mmi_engine.model.checkpoint import save_model
from mmi_engine.model.vae import ImageCodec
from mmi_engine.train.curves import read
from mmi_engine.train.start import train

FROZEN = "optim.freeze=['visual_tokenizer\\.trunk\\.', 'codec\\.']"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model(), tmp_path_factory.mktemp("base"))


def losses(directory: Path) -> list[float]:
    return [x.get("image", x.get("val_image")) for x in read(directory / "metrics.jsonl")]


def test_kept_latents_change_no_bit_and_are_encoded_once(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = manifest(tmp_path / "pairs", "pairs")
    encoded: list[int] = []
    plain = ImageCodec.posterior

    def counted(codec: ImageCodec, images: torch.Tensor) -> object:
        encoded.append(len(images))
        return plain(codec, images)

    monkeypatch.setattr(ImageCodec, "posterior", counted)
    words = (FROZEN, "loop.steps=4", "data.augment=flip", f"data.cache={tmp_path / 'cache'}", "loop.threads=1")
    words += ("data.pack=false", "loop.batch_size=1")  # several pictures at once are convolved in another order
    train(recipe_of(tmp_path, base, pairs, *words, image=10.0), tmp_path / "plain")
    anew, encoded[:] = sum(encoded), []
    kept = (*words, "data.keep_latents=true")
    train(recipe_of(tmp_path, base, pairs, *kept, image=10.0), tmp_path / "kept")
    assert losses(tmp_path / "plain") == losses(tmp_path / "kept")
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("plain", "kept")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert set(encoded) == {1} and len(encoded) <= anew
    assert len(list((tmp_path / "cache" / "latents").glob("latents-*.sqlite"))) == 1

    encoded.clear()  # a run that was stopped finds them again
    run = tmp_path / "kept"
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(run / "model")
    train(recipe_of(tmp_path, base, pairs, *kept, image=10.0), run, resume=True)
    assert not encoded and files[0].read_bytes() == files[1].read_bytes()

    with pytest.raises(ConfigError, match="frozen codec"):
        trained = (*kept, "optim.freeze=['visual_tokenizer\\.trunk\\.']")
        train(recipe_of(tmp_path, base, pairs, *trained, image=10.0), tmp_path / "trained")
    with pytest.raises(ConfigError, match="whole codec"):
        train(recipe_of(tmp_path, base, pairs, *kept, "loop.shard=fsdp", image=10.0), tmp_path / "sharded")


def test_the_codec_keeps_its_precision_beside_halved_weights(tmp_path: Path, base: Path) -> None:
    AcceleratorState._reset_state()  # the runs before had another precision
    pairs = manifest(tmp_path / "pairs", "pairs")
    words = (FROZEN, "loop.steps=1", f"data.cache={tmp_path / 'cache'}", "loop.threads=1", "loop.precision=bf16")
    words += ("optim.frozen_dtype=bf16", "data.keep_latents=true", "loop.ema=0.0")
    train(recipe_of(tmp_path, base, pairs, *words, image=10.0), tmp_path / "run")
    assert all(0 < loss < 10 for loss in losses(tmp_path / "run"))
