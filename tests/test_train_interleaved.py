"""The whole model's task: losses weighed and counted, only the codec frozen, a run from `train` to a loadable model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_model
from train_cache import small_cache

from mmi_engine.errors import ConfigError, ModelError
from mmi_engine.model.checkpoint import load_model, save_model
from mmi_engine.model.presets import toon_config
from mmi_engine.toon.tokenizer import VOCABULARY
from mmi_engine.train import foundation
from mmi_engine.train.cache import Cache
from mmi_engine.train.interleaved import InterleavedTask, build_model, redraw
from mmi_engine.train.loop import Loop
from mmi_engine.train.recipe import Recipe
from mmi_engine.train.sections import DataConfig, LoopConfig, LossConfig, OptimConfig
from mmi_engine.train.vae import codec_config

MIXTURE = {"story": 1.0, "caption": 1.0, "vqa": 1.0, "ground": 1.0, "t2i": 1.0, "seg2img": 1.0}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InterleavedTask]:
    """One task for all tests here; those that train it do not rely on its first weights."""
    folder = tmp_path_factory.mktemp("task")
    save_model(tiny_model(), folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        yield make_task(folder, small_cache(folder / "pictures", patch, shards=1))


def make_task(folder: Path, pictures: Cache) -> InterleavedTask:
    recipe = Recipe(
        task="interleaved",
        data=DataConfig(mixture=MIXTURE, row_tokens=120),
        model={"base": str(folder / "base")},
        loss=LossConfig(noise_repeats=2),
        optim=OptimConfig(lr=1e-3, warmup=1),
        loop=LoopConfig(steps=2, batch_size=2, eval_samples=8, eval_every=2, log_every=1, ema=0.5),
    )
    return InterleavedTask(recipe, pictures, pictures, lambda done, total: None)


def test_everything_is_trained_but_the_codec(task: InterleavedTask) -> None:
    loss, _ = task.module(task.to_device(task.batch(0), "cpu"))
    loss.backward()
    frozen = {n for n, p in task.model.named_parameters() if not p.requires_grad}
    assert {n for n in frozen if not n.endswith("ignore_token")} == {
        n for n, _ in task.model.named_parameters() if ".codec." in n
    }
    assert any(n.endswith("ignore_token") for n in frozen)
    untouched = [n for n, p in task.model.named_parameters() if p.requires_grad and p.grad is None]
    assert untouched == []


def test_counted_pictures_are_those_to_be_drawn(task: InterleavedTask) -> None:
    batch = task.to_device(task.batch(0), "cpu")
    drawn = int(sum({"story": 5, "t2i": 1, "seg2img": 1}.get(name.split(":")[0], 0) for name in batch.names))
    assert drawn > 0 and task.size(batch) == 2 * drawn
    assert len(task.ids(batch)) == len(batch.names)


def test_losses_add_up(task: InterleavedTask) -> None:
    torch.manual_seed(0)
    loss, parts = task.module(task.to_device(task.batch(1), "cpu"))
    config = task.model.config
    expected = config.loss_text_weight * parts["text"] + config.loss_image_weight * parts["image"]
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_evaluation_is_repeatable_and_leaves_the_generator_alone(task: InterleavedTask) -> None:
    torch.manual_seed(1)
    first = task.evaluate(8)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert task.evaluate(8) == first and set(first) == {"text", "image"}


def test_a_run_leaves_a_model_that_loads_and_draws(task: InterleavedTask, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    figures = Loop(task.recipe, task, run).run()
    assert figures["text"] > 0 and figures["image"] > 0
    loaded = load_model(run / "model").state_dict()
    codec = next(n for n in loaded if "codec" in n and n.endswith("conv_in.weight"))
    assert torch.equal(loaded[codec], before[codec].half().float())
    moved = [n for n in loaded if not torch.equal(loaded[n], before[n].half().float())]
    assert any("unet" in n for n in moved) and any("language" in n for n in moved)
    with Image.open(run / "preview.png") as sheet:
        assert sheet.size == (5 * 32, 6 * 32)
    assert set(json.loads((run / "model" / "data.json").read_text(encoding="utf-8"))["documents"]) == set(MIXTURE)


def test_what_cannot_be_built_is_refused(task: InterleavedTask) -> None:
    def refused(model: dict[str, Any], match: str, error: type[Exception] = ConfigError) -> None:
        with pytest.raises(error, match=match):
            build_model(dataclasses.replace(task.recipe, model=model))

    refused({}, "model.base is missing")
    refused({**task.recipe.model, "name": "other"}, "keeps its configuration")
    refused({**task.recipe.model, "visual_resampler": {"num_queries": 5}}, "keeps its configuration")
    partly = {**task.recipe.model, "partial": True}
    refused({**partly, "fresh": ["no_such_weight"]}, "no weight's name matches 'no_such_weight'")
    refused({**partly, "fresh": ["("]}, "is no regular expression")
    refused({**partly, "fresh": "mmfs"}, "is no list")
    refused({"base": "toon"}, "no codec", ModelError)
    refused({"base": "toon", "fresh": ["mmfs"]}, "every weight of a fresh model")


def test_what_is_changed_or_named_begins_fresh_and_all_else_is_the_bases(task: InterleavedTask) -> None:
    stored = load_model(task.recipe.model["base"]).state_dict()
    changes = {"partial": True, "without": ["language.mmfs"], "fresh": [r"\.mmfs_blocks\."]}
    changes |= {"image_decoder": {"context_images": 3, "maps": [1], "mmfs": {"levels": [8]}}}
    recipe = dataclasses.replace(task.recipe, model={**task.recipe.model, **changes})
    state, again = build_model(recipe).state_dict(), build_model(recipe).state_dict()
    # a decoder layer without MMFS is the library's own, not one around it
    base = {re.sub(r"(body\.layers\.\d+\.)layer\.", r"\1", name): value for name, value in stored.items()}
    assert set(state) < set(base) and all(".cross." in n for n in set(base) - set(state))
    decoder = {n for n in state if not torch.equal(state[n], base[n])}
    assert decoder and all(".mmfs_blocks." in n for n in decoder)
    zero = [v for n, v in state.items() if ".zero_conv." in n]
    assert zero and not any(bool(v.any()) for v in zero)  # the U-Net computes what it computes without MMFS
    assert all(torch.equal(state[n], again[n]) for n in state)


def test_the_embedded_model_is_the_base_where_parts_of_it_are_asked_for() -> None:
    config = {"partial": True, "without": ["image_decoder.mmfs"], "visual_resampler": {"num_queries": 4}}
    recipe = Recipe(task="interleaved", seed=1, model={"base": "toon", **config}, loss=LossConfig(image=0.0))
    model, base = build_model(recipe), load_model("toon").state_dict()
    state = model.state_dict()
    assert {n for n in state if not torch.equal(state[n], base[n])} == {
        n for n in state if "visual_tokenizer" in n and state[n].shape != base[n].shape
    }
    assert {n for n in base if n not in state} == {n for n in base if ".mmfs_blocks." in n}
    assert model.config.loss_image_weight == 10.0  # a loss that this run had not


def test_nested_configuration_values_are_replaced() -> None:
    vae = codec_config({"patch": 8, "image_size": 128, "diffusers": {"block_out_channels": [8], "latent_channels": 4}})
    config = toon_config(vae, VOCABULARY)
    model = {"base": "toon", "language": {"mmfs": None}, "image_decoder": {"mmfs": {"points": 2}}}
    changed = foundation.changed(config, Recipe(task="interleaved", model=model))
    assert changed.language.mmfs is None and changed.language.mmfs_every == config.language.mmfs_every
    assert changed.image_decoder.mmfs is not None and config.image_decoder.mmfs is not None
    assert changed.image_decoder.mmfs == dataclasses.replace(config.image_decoder.mmfs, points=2)
    with pytest.raises(ModelError, match="imagedecoder"):
        foundation.changed(config, Recipe(task="interleaved", model={"imagedecoder": {}}))
    with pytest.raises(ModelError, match="one feature map for each"):
        foundation.changed(config, Recipe(task="interleaved", model={"image_decoder": {"maps": [1]}}))


def test_redrawn_pictures_come_from_the_codec_and_maps_stay(task: InterleavedTask) -> None:
    inputs = task.to_device(task.batch(0), "cpu").inputs
    torch.manual_seed(0)
    seen = redraw(task.model, inputs, 1.0).images
    has_latents = inputs.latents.flatten(1).any(1)
    assert has_latents.any() and not has_latents.all()
    assert torch.equal(seen[~has_latents], inputs.images[~has_latents])
    exact = task.model.codec.decode(inputs.latents[has_latents])
    nearest = torch.cdist(seen[has_latents].flatten(1), exact.flatten(1)).argmin(1)
    assert nearest.tolist() == list(range(len(exact)))  # each is a noisy drawing of its own latents
    assert not torch.equal(seen[has_latents], exact)
    assert redraw(task.model, inputs, 0.0).images.equal(inputs.images)


def test_a_run_without_image_loss_encodes_and_draws_nothing(task: InterleavedTask) -> None:
    recipe = dataclasses.replace(task.recipe, loss=LossConfig(image=0.0))
    encoded: list[int] = []
    only_text = InterleavedTask(recipe, task.train.cache, task.val.cache, lambda done, total: encoded.append(done))
    batch = only_text.to_device(only_text.batch(0), "cpu")
    assert batch.inputs.latents is None and encoded == []
    loss, parts = only_text.module(batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(parts["text"]), rel=1e-6) and "image" not in parts
    assert all(p.grad is None for p in only_text.model.image_decoder.parameters())
    assert set(only_text.evaluate(8)) == {"text"}


def test_the_weights_of_the_losses_are_those_of_the_recipe(task: InterleavedTask) -> None:
    model = build_model(dataclasses.replace(task.recipe, loss=LossConfig(text=0.5, image=3.0)))
    assert (model.config.loss_text_weight, model.config.loss_image_weight) == (0.5, 3.0)
