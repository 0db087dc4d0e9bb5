"""Training rows: a function of (seed, index), packed, with a loss on exactly what the model has to say or draw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from train_cache import small_cache

from mmi_engine.errors import ConfigError
from mmi_engine.model.config import SpecialTokens
from mmi_engine.model.tokenizer import DirectoryTokenizer
from mmi_engine.sequence import NO_LOSS
from mmi_engine.toon.draw import PALETTE, render, semantic_map
from mmi_engine.toon.tokenizer import PATH, VOCABULARY
from mmi_engine.toon.world import sample_story
from mmi_engine.train import cache
from mmi_engine.train.data import Mixture, describe, mixture_counts
from mmi_engine.train.loader import stream
from mmi_engine.train.tasks import BUILDERS

TOKENS = SpecialTokens(1, 2, VOCABULARY - 1, VOCABULARY, VOCABULARY + 1)
TOKENIZER = DirectoryTokenizer(PATH.parent)
ALL = dict.fromkeys(BUILDERS, 1.0)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cache.Cache:
    opened = small_cache(tmp_path, monkeypatch)

    def moments(images: np.ndarray) -> np.ndarray:
        mean = images.reshape(len(images), -1)[:, :8].reshape(-1, 2, 2, 2)
        return np.concatenate([mean, np.full_like(mean, 3)], axis=1).astype(np.float16)

    assert opened.encode("test", moments, lambda done, total: None) == "latents-test"
    return opened


def mixture(pictures: cache.Cache, weights: dict[str, float] | None = None, **changes: int) -> Mixture:
    numbers = {"seed": 4, "row_tokens": 160, "per_image": 3, **changes}
    return Mixture(pictures, "latents-test", 0.5, TOKENIZER, TOKENS, weights=weights or ALL, **numbers)


def test_rows_depend_on_seed_and_index_alone(pictures: cache.Cache) -> None:
    forward = [mixture(pictures).row(i) for i in range(6)]
    late = mixture(pictures)
    assert [late.row(i) for i in (5, 3, 1)] == [forward[5], forward[3], forward[1]]
    assert mixture(pictures, seed=5).row(0) != forward[0]
    assert len({tuple(row.names) for row in forward}) == 6


def test_batches_in_the_middle_of_an_epoch_are_the_same_after_a_restart(pictures: cache.Cache) -> None:
    first, again = mixture(pictures), mixture(pictures)
    for index in range(3):
        first.batch(index, 2)
    ours, theirs = first.batch(3, 2), again.batch(3, 2)
    assert ours.names == theirs.names
    for name, value in vars(ours.inputs).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(theirs.inputs, name)), name


def test_rows_are_full_but_not_too_long(pictures: cache.Cache) -> None:
    rows = [mixture(pictures).row(i) for i in range(30)]
    assert max(len(row.ids) for row in rows) <= 160
    assert np.mean([len(row.ids) for row in rows]) > 110
    longer = mixture(pictures, {"story": 1.0}, row_tokens=10).row(0)  # a document that never fits stands alone
    assert len(longer.names) == 1 and len(longer.ids) > 10


def test_tasks_are_drawn_by_their_weights(pictures: cache.Cache) -> None:
    weights = {"caption": 3.0, "t2i": 1.0, "vqa": 0.0}
    counts = mixture_counts(mixture(pictures, weights, row_tokens=1), 600)  # one document per row
    assert sum(counts.values()) == 600 and "vqa" not in counts
    assert counts["caption"] == pytest.approx(450, abs=4 * np.sqrt(600 * 0.75 * 0.25))


@pytest.mark.parametrize("weights", [{"captions": 1.0}, {"caption": 0.0}])
def test_bad_mixtures_are_refused(pictures: cache.Cache, weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture"):
        mixture(pictures, weights)


def learnt_text(batch_ids: torch.Tensor, targets: torch.Tensor) -> str:
    """What the text loss asks for, decoded."""
    kept = [int(i) for i in batch_ids[targets != NO_LOSS] if i not in (TOKENS.boi, TOKENS.eos)]
    return TOKENIZER.decode(kept)


@pytest.mark.parametrize("task", sorted(ALL))
def test_loss_falls_on_answers_only(pictures: cache.Cache, task: str) -> None:
    batch = mixture(pictures, {task: 1.0}, row_tokens=1).batch(0, 1)
    inputs, (name,) = batch.inputs, batch.names
    assert inputs.target_ids is not None and inputs.image_loss_mask is not None
    text = learnt_text(inputs.text_ids[0], inputs.target_ids[0])
    story, _, frame = name.split(":")[1].partition(".")
    said = pictures.texts(int(story))
    facts = said["frames"][int(frame or 0)]
    expected = {
        "story": {" ".join(said["texts"]), "".join(said["texts"])},
        "caption": {facts["captions"][0], facts["details"][0]},
        "vqa": {facts["questions"][0][1]},
        "dialogue": {facts["questions"][0][1]},
        "ground": {facts["referring"][0][1], facts["referring"][0][1] + "</box>"},
        "t2i": {facts["captions"][0], facts["details"][0]},
        "seg2img": {facts["captions"][0]},
    }
    if task == "quiz":  # answers alone; that they are true, tests/test_train_quiz.py holds
        assert set(text.split()) <= {"yes", "no", "0", "1", "2"}
    else:
        assert text in expected[task]
    assert inputs.target_ids[0, -1] == TOKENS.eos  # where to stop is learnt in every task
    drawn = {"story": [1.0] * 5, "t2i": [1.0], "seg2img": [0.0, 1.0]}.get(task, [0.0])
    assert inputs.image_loss_mask.tolist() == drawn


def test_begin_of_image_is_a_target_where_the_model_decides(pictures: cache.Cache) -> None:
    inputs = mixture(pictures, {"story": 1.0}, row_tokens=1).batch(0, 1).inputs
    assert inputs.target_ids is not None
    assert int((inputs.target_ids == TOKENS.boi).sum()) == 5
    inputs = mixture(pictures, {"caption": 1.0}, row_tokens=1).batch(0, 1).inputs
    assert inputs.target_ids is not None
    assert not bool((inputs.target_ids == TOKENS.boi).any())


def test_images_match_placeholders_and_pictures(pictures: cache.Cache) -> None:
    rows_of = mixture(pictures, per_image=3)
    batch = rows_of.batch(2, 4)
    inputs, rows = batch.inputs, [rows_of.row(8 + i) for i in range(4)]
    assert inputs.image_counts.tolist() == [len(row.images) for row in rows]
    assert ((inputs.text_ids == TOKENS.image).sum(1) == 3 * inputs.image_counts).all()
    references = [reference for row in rows for reference in row.images]
    for picture, latent, reference in zip(inputs.images, inputs.latents, references, strict=True):
        stored = pictures.array(reference.kind, reference.story)[reference.frame]
        if reference.kind == "maps":
            stored = np.array(PALETTE, np.uint8)[stored]
            assert not latent.any()
        assert np.array_equal(picture.numpy(), stored)
    ready = batch.to("cpu").inputs.images
    assert ready.shape[1:] == (3, *inputs.images.shape[1:3])
    assert torch.allclose(ready, inputs.images.movedim(-1, 1) / 255.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_equal_for_any_number_of_processes(pictures: cache.Cache, workers: int) -> None:
    data = mixture(pictures)
    indices = [5, 7, 9, 11, 13, 15]
    found = list(stream(lambda index: data.batch(index, 2), indices, workers=workers, pin=False))
    assert [index for index, _ in found] == indices
    for index, batch in found:
        expected = data.batch(index, 2)
        assert batch.names == expected.names
        assert torch.equal(batch.inputs.images, expected.inputs.images)
        assert torch.equal(batch.inputs.latents, expected.inputs.latents)


def test_latents_are_scaled_samples_of_the_posterior(pictures: cache.Cache) -> None:
    rows_of = mixture(pictures, {"t2i": 1.0}, row_tokens=1)
    references = [rows_of.row(0).images[0]] * 4000
    sample = rows_of.sampled_latents(references, np.random.default_rng(0)) / 0.5
    mean = pictures.picture(references[0].story, references[0].frame).reshape(-1)[:8].reshape(2, 2, 2)
    assert np.allclose(sample.mean(0), mean, atol=5 * 3 / np.sqrt(4000))
    assert float(sample.std(0).mean()) == pytest.approx(3, rel=0.02)


def test_describe_counts_the_stream(pictures: cache.Cache) -> None:
    summary = json.loads(describe(mixture(pictures), rows=16))
    assert set(summary["documents"]) == set(ALL)
    assert 0 < summary["drawn_images_per_row"] <= summary["images_per_row"]


def test_latents_are_computed_once(pictures: cache.Cache) -> None:
    def never(images: np.ndarray) -> np.ndarray:
        raise AssertionError("latents of this codec are there already")

    pictures.encode("test", never, lambda done, total: None)


def test_drawn_shard_holds_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "STORIES", 2)
    (tmp_path / ".partial-00001").mkdir()  # what a killed process left
    (tmp_path / ".partial-00001" / "pictures.npy").write_bytes(b"half")
    cache._draw_shard((tmp_path, "train", 1))
    story = sample_story(3, "train")
    shard = tmp_path / "shard-00001"
    assert np.array_equal(np.load(shard / "pictures.npy")[1, 4], np.asarray(render(story.scenes[4])))
    assert np.array_equal(np.load(shard / "maps.npy")[1, 2], semantic_map(story.scenes[2]))
    said = [json.loads(line) for line in (shard / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert said[1]["texts"] == list(story.texts)
    assert all(frame["captions"] and frame["questions"] and frame["referring"] for frame in said[1]["frames"])
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00001"]


def test_a_changed_world_is_not_mixed_with_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cache(tmp_path / "before" / "train", monkeypatch, shards=1)
    silent = lambda done, total: None  # noqa: E731
    opened = cache.prepare(tmp_path, "train", 4, 1, silent, world="before")
    assert opened.picture(3, 4).shape == (32, 32, 3)
    with pytest.raises(ConfigError, match="lacks 1 of 2 shards"):
        cache.prepare(tmp_path, "train", 5, 1, silent, world="before")


def test_rows_of_so_many_images_have_one_shape(pictures: cache.Cache) -> None:
    even = mixture(pictures, row_images=5)
    for index in range(4):
        batch = even.batch(index, 3).inputs
        assert batch.text_ids.shape == (3, 160) and batch.image_counts.tolist() == [5, 5, 5]
        assert int((batch.text_ids == TOKENS.boi).sum()) == len(batch.images) == len(batch.latents) == 15
        blank = ~batch.images.bool().flatten(1).any(1)
        assert not batch.image_loss_mask[blank].any() and not batch.latents[blank].any()
    rows = [even.row(i) for i in range(20)]
    assert any(reference.kind == "blank" for row in rows for reference in row.images)
    assert all(len(row.ids) <= 160 for row in rows)
    for row in rows:  # a blank document is silent to its end
        blanks = sum(reference.kind == "blank" for reference in row.images)
        assert all(row.silent[len(row.ids) - blanks * (3 + 3) :])


def test_in_a_dialogue_only_the_answers_carry_loss(pictures: cache.Cache) -> None:
    facts = {
        "questions": [["How many cats are there?", "2"], ["What is Pip doing?", "running"], ["Who is this?", "Pip"]]
    }
    texts = {"frames": [facts] * cache.FRAMES}
    document = BUILDERS["dialogue"](texts, 0, 1, np.random.default_rng(0))
    built = mixture(pictures)
    ids = built._ids(document.pieces)
    silent = built._silent(document, len(ids) + 1)
    said = TOKENIZER.decode([token for token, quiet in zip(ids, silent[:-1], strict=True) if not quiet])
    order = [piece.value for piece in document.pieces[3::2]]
    assert sorted(order) == ["2", "Pip", "running"] and not silent[-1]
    assert said.split() == order
