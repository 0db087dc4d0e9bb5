"""Words as labels: the classes of a text, the loss in closed form, what learns by it, and noisy time steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from train_cache import small_cache

from mmi_engine.errors import ConfigError
from mmi_engine.model.checkpoint import load_model, save_model
from mmi_engine.model.image_decoder import shifted_timesteps
from mmi_engine.sequence import Piece
from mmi_engine.train.cache import Cache
from mmi_engine.train.image_decoder import ImageDecoderTask
from mmi_engine.train.interleaved import InterleavedTask
from mmi_engine.train.loop import Loop
from mmi_engine.train.recipe import Recipe
from mmi_engine.train.sections import DataConfig, LoopConfig, LossConfig, OptimConfig
from mmi_engine.train.tasks import texts_before
from mmi_engine.train.words import BUCKETS, MapWords, TokenWords, classes, labels, word_loss

SEES = "visual_tokenizer."
CONTEXT = ("image_decoder.context_proj", "image_decoder.context_resampler")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Cache]]:
    folder = tmp_path_factory.mktemp("words")
    save_model(tiny_model(), folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        yield folder / "base", small_cache(folder / "pictures", patch, shards=1)


def recipe(base: Path, task: str, loss: LossConfig, **optim: float) -> Recipe:
    return Recipe(
        task=task,
        data=DataConfig(mixture={"story": 1.0, "t2i": 1.0, "caption": 1.0}, row_tokens=120, kept_rows=6, kept_steps=50),
        model={"base": str(base)},
        loss=loss,
        optim=OptimConfig(**{"lr": 3e-3, "warmup": 1, **optim}),  # type: ignore[arg-type]
        loop=LoopConfig(steps=30, batch_size=6, eval_samples=8, eval_every=100, log_every=1, ema=0.5),
    )


def test_classes_are_words_neighbours_and_digits_by_place() -> None:
    assert classes("") == set()
    assert classes("A red ball.") == classes("a RED ball") != classes("a ball red")
    assert len(classes("a red ball")) == 5  # three words, two pairs
    both, other = classes("47"), classes("74")
    assert len(both) == 3 and not both & other  # the number, its first and its second digit
    assert classes("47") & classes("42") and classes("47") & classes("17")
    table = labels(["a red ball", "", "47"])
    assert table.shape == (3, BUCKETS) and table.dtype == torch.bool
    assert [set(row.nonzero().squeeze(1).tolist()) for row in table] == [classes("a red ball"), set(), both]


def test_loss_counts_rows_with_words_and_is_per_word() -> None:
    torch.manual_seed(0)
    words, logits = labels(["a red ball", "", "47"]), torch.randn(3, BUCKETS)
    total = 0.0
    for row in (0, 2):
        for bucket in range(BUCKETS):
            chance = 1 / (1 + math.exp(-float(logits[row, bucket])))
            right = chance if words[row, bucket] else 1 - chance
            total -= (1 - right) ** 2 * math.log(right)
    assert float(word_loss(logits, words)) == pytest.approx(total / 8, rel=1e-4)
    assert float(word_loss(logits, labels(["", "", ""]))) == 0.0


def test_heads_start_at_what_is_rare_and_learn() -> None:
    torch.manual_seed(0)
    words = labels([f"thing {n}" for n in range(6)])
    for head, given in ((TokenWords(4, 8), torch.randn(6, 4, 8)), (MapWords(8), torch.randn(6, 8, 5, 5))):
        assert torch.equal(head(given), torch.full((6, BUCKETS), -5.0))
        optimizer = torch.optim.Adam(head.parameters(), 0.05)
        for _ in range(200):
            optimizer.zero_grad()
            word_loss(head(given), words).backward()
            optimizer.step()
        assert torch.equal(head(given) > 0, words)


def test_texts_before_pictures() -> None:
    pieces = [Piece("image", 1), Piece("text", "a"), Piece("image", 2), Piece("image", 3), Piece("text", "b")]
    assert texts_before(pieces) == ["", "a", ""]


def test_visual_tokens_and_maps_learn_by_it(made: tuple[Path, Cache]) -> None:
    base, pictures = made
    task = InterleavedTask(recipe(base, "interleaved", LossConfig(words=0.5)), pictures, pictures, lambda *_: None)
    batch = task.to_device(task.batch(0), "cpu")
    assert batch.words is not None and batch.words.any(1).all()
    loss, parts = task.module(batch)
    config = task.model.config
    both = config.loss_text_weight * parts["text"] + config.loss_image_weight * parts["image"]
    assert float(loss.detach()) == pytest.approx(float(both + 0.5 * (parts["words"] + parts["map_words"])), rel=1e-5)
    # the heads begin at zero: after a step of theirs alone, words reach the visual tokenizer and nothing behind it
    optimizer = torch.optim.SGD([p for n, p in task.module.named_parameters() if "_words" in n], 1.0)
    loss.backward()
    optimizer.step()
    task.module.zero_grad(set_to_none=True)
    bare = dataclasses.replace(task.model.config, loss_text_weight=0.0, loss_image_weight=0.0)
    task.model.config = bare
    task.module(batch)[0].backward()
    reached = {n for n, p in task.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached and all(name.startswith(SEES) for name in reached)
    assert any("resampler" in n for n in reached) and any("adapter" in n for n in reached)


def test_maps_have_no_words(made: tuple[Path, Cache]) -> None:
    base, pictures = made
    plan = recipe(base, "interleaved", LossConfig(words=0.5))
    plan = dataclasses.replace(plan, data=dataclasses.replace(plan.data, mixture={"seg2img": 1.0}))
    batch = InterleavedTask(plan, pictures, pictures, lambda *_: None).batch(0)
    assert batch.words is not None and batch.told is not None
    drawn = batch.inputs.image_loss_mask.bool()
    assert torch.equal(batch.words.any(1), drawn) and torch.equal(batch.told.any(1), drawn)


def test_context_tokens_learn_to_tell_the_text_and_are_held(made: tuple[Path, Cache], tmp_path: Path) -> None:
    base, pictures = made
    found = {}
    for keep in (0.0, 30.0):
        folder = tmp_path / str(keep)
        folder.mkdir()
        plan = recipe(base, "image_decoder", LossConfig(image=0.0, words=1.0, keep=keep))
        task = ImageDecoderTask(plan, pictures, pictures, lambda *_: None)
        batch = task.to_device(task.batch(0), "cpu")
        first, parts = task.module(batch)
        assert set(parts) == ({"words", "moved"} if keep else {"words"}) and not keep or float(parts["moved"]) == 0.0
        Loop(plan, task, folder).run()
        task.model.eval()
        _, after = task.module(batch)
        assert float(after["words"]) < 0.8 * float(first.detach())
        old = load_model(base).state_dict()
        moved = {n for n, p in task.model.state_dict().items() if not torch.equal(p, old[n])}
        assert moved and all(name.startswith(CONTEXT) for name in moved)
        tokens = task.model.image_decoder.context_tokens(batch.hidden, batch.mask)
        before = load_model(base).eval().image_decoder.context_tokens(batch.hidden, batch.mask)
        found[keep] = float((tokens - before).detach().square().mean())
    assert found[30.0] < 0.5 * found[0.0]


def test_shifted_time_steps_follow_their_distribution() -> None:
    torch.manual_seed(0)
    device = torch.device("cpu")
    for shift in (1.0, 3.0):
        drawn = shifted_timesteps(40_000, 1000, shift, device)
        assert int(drawn.min()) >= 0 and int(drawn.max()) <= 999
        for time in (0.25, 0.5, 0.75):
            uniform = time / (shift - (shift - 1) * time)  # the shift's inverse is the distribution function
            assert float((drawn < 1000 * time).float().mean()) == pytest.approx(uniform, abs=0.01)


@pytest.mark.parametrize(
    ("task", "loss", "told"),
    [
        ("vae", LossConfig(words=1.0), "loss.words needs"),
        ("interleaved", LossConfig(words=1.0, keep=1.0), "loss.keep needs"),
        ("image_decoder", LossConfig(keep=1.0), "loss.keep needs"),
        ("interleaved", LossConfig(timestep_shift=2.0), "loss.timestep_shift is for"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(task: str, loss: LossConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Recipe(task=task, loss=loss)
