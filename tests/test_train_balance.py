"""Weights of latent cells by the class they show: closed forms, a loop over cells, and what the loss makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from train_cache import small_cache

from mmi_engine.errors import ConfigError
from mmi_engine.model.checkpoint import save_model
from mmi_engine.model.image_decoder import Draws
from mmi_engine.toon.palette import CLASSES, ID
from mmi_engine.train.balance import cell_weights, class_weights
from mmi_engine.train.image_decoder import ImageDecoderTask
from mmi_engine.train.recipe import Recipe
from mmi_engine.train.sections import DataConfig, LoopConfig, LossConfig


class Maps:
    """A cache of one story whose maps are known: 3 of 4 pixels sky, 1 of 4 ground."""

    stories = 1

    def array(self, name: str, story: int) -> np.ndarray:
        assert (name, story) == ("maps", 0)
        labels = np.full((5, 8, 8), ID["sky"], np.uint8)
        labels[:, 6:] = ID["ground"]
        return labels


def test_class_weights_follow_their_closed_form() -> None:
    sky, ground, hat = (ID[name] for name in ("sky", "ground", "hat"))
    flat = class_weights(Maps(), 0.0, {})
    assert flat[sky] == flat[ground] == 1 and flat[hat] == 0
    equal = class_weights(Maps(), 1.0, {})  # both classes have half of the whole weight
    assert equal[sky] * 0.75 == pytest.approx(0.5) and equal[ground] * 0.25 == pytest.approx(0.5)
    rooted = class_weights(Maps(), 0.5, {})
    assert rooted[ground] / rooted[sky] == pytest.approx(3**0.5)
    raised = class_weights(Maps(), 0.5, {"ground": 4.0})
    assert raised[ground] / raised[sky] == pytest.approx(4 * 3**0.5)
    for weights in (flat, equal, rooted, raised):
        assert 0.75 * weights[sky] + 0.25 * weights[ground] == pytest.approx(1)
    with pytest.raises(ConfigError, match="no class 'moon'"):
        class_weights(Maps(), 0.5, {"moon": 2.0})


def test_cells_are_means_of_their_pixels() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(len(CLASSES), size=(3, 12, 12)).astype(np.uint8)
    weights = rng.random(len(CLASSES)).astype(np.float32)
    cells = cell_weights(labels, weights, 4)
    for n, y, x in np.ndindex(3, 4, 4):
        pixels = labels[n, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3].ravel()
        assert cells[n, y, x] == pytest.approx(np.mean([weights[label] for label in pixels]), rel=1e-5)


def test_the_loss_counts_cells_by_their_weight() -> None:
    torch.manual_seed(0)
    model = tiny_model().eval()
    decoder, vae = model.image_decoder, model.config.image_decoder.vae
    side, channels, repeats, number = vae.latent_size, vae.latent_channels, 2, 3
    tokens = decoder.unconditional.detach().expand(number, -1, -1)
    latents, noise = torch.randn(number, channels, side, side), torch.randn(number * repeats, channels, side, side)
    steps = torch.randint(1000, (number * repeats,))
    visible = torch.zeros(number, 1, dtype=torch.long)
    features = [torch.zeros(number, 1, model.config.vision.hidden_size, 8 // n, 8 // n) for n in (1, 2, 4, 8)]

    def loss(cells: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        result = decoder.diffusion_loss(
            tokens,
            features,
            visible,
            latents=latents,
            images=None,
            weights=torch.ones(number),
            draws=Draws(torch.ones(number, 1, 1), None, noise, steps),
            noise_repeats=repeats,
            cells=cells,
        )
        target = noise
        if decoder.scheduler.config.prediction_type == "v_prediction":
            target = decoder.scheduler.get_velocity(latents.repeat(repeats, 1, 1, 1), noise, steps)
        return result.per_image, (result.prediction - target).square().mean(1)  # (N·R), (N·R, h, w)

    with torch.no_grad():
        plain, squares = loss(None)
        torch.testing.assert_close(plain, squares.mean((1, 2)))
        torch.testing.assert_close(loss(torch.ones(number, side, side))[0], plain)
        cells = torch.rand(number, side, side)
        expected = torch.stack([(squares[i] * cells[i % number]).mean() for i in range(number * repeats)])
        torch.testing.assert_close(loss(cells)[0], expected)


def test_the_task_weighs_what_its_pictures_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model(), tmp_path / "base")
    pictures = small_cache(tmp_path / "pictures", monkeypatch, shards=1)

    def task(loss: LossConfig) -> ImageDecoderTask:
        recipe = Recipe(
            task="image_decoder",
            data=DataConfig(mixture={"t2i": 1.0, "seg2img": 1.0}, row_tokens=120, kept_rows=4, kept_steps=2),
            model={"base": str(tmp_path / "base")},
            loss=loss,
            loop=LoopConfig(batch_size=6),
        )
        return ImageDecoderTask(recipe, pictures, pictures, lambda done, total: None)

    weighed = task(LossConfig(class_balance=0.5, emphasis={"hill": 3.0}))
    shown = weighed.to_device(weighed.batch(0), "cpu")
    assert weighed.kept is not None
    numbers = weighed.kept.image[weighed.kept.numbers(weighed.batch(0).draws)].tolist()
    references = [r for row in range(64) for r in weighed.train.row(row).images]
    weights = class_weights(pictures, 0.5, {"hill": 3.0})
    assert np.abs(weights - class_weights(pictures, 0.5, {})).max() > 0.1  # the class is there
    for found, number in zip(shown.cells, numbers, strict=True):
        picture = references[number]
        expected = cell_weights(pictures.array("maps", picture.story)[[picture.frame]], weights, found.shape[-1])
        np.testing.assert_allclose(found.numpy(), expected[0], rtol=2e-3)
    assert torch.isfinite(weighed.module(shown)[0])
    plain = task(LossConfig())
    assert plain.to_device(plain.batch(0), "cpu").cells is None


@pytest.mark.parametrize(
    ("task", "loss", "told"),
    [
        ("interleaved", LossConfig(class_balance=0.5), "loss.class_balance is for"),
        ("image_decoder", LossConfig(class_balance=1.5), "between 0 and 1"),
        ("image_decoder", LossConfig(emphasis={"hat": 2.0}), "loss.emphasis needs"),
        ("image_decoder", LossConfig(class_balance=0.5, emphasis={"hat": 0.0}), "must be above 0"),
        ("image_decoder", LossConfig(class_balance=0.5, emphasis={"hats": 2.0}), "no class 'hats'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(task: str, loss: LossConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Recipe(task=task, loss=loss)
