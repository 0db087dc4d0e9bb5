"""The image decoder's task: what is kept is what joint training computes, and a run resumes across turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from train_cache import small_cache

from mmi_engine.errors import ConfigError, Interrupted
from mmi_engine.model.checkpoint import save_model
from mmi_engine.model.image_decoder import Draws
from mmi_engine.train.cache import Cache
from mmi_engine.train.image_decoder import ImageDecoderObjective, ImageDecoderTask, Kept
from mmi_engine.train.loop import Loop
from mmi_engine.train.recipe import Recipe
from mmi_engine.train.sections import DataConfig, LoopConfig, LossConfig, OptimConfig

MIXTURE = {"story": 1.0, "caption": 1.0, "t2i": 2.0, "seg2img": 2.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Cache]]:
    folder = tmp_path_factory.mktemp("decoder")
    save_model(tiny_model(), folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        yield folder / "base", small_cache(folder / "pictures", patch, shards=1)


def make_task(made: tuple[Path, Cache], **loop: float) -> ImageDecoderTask:
    base, pictures = made
    recipe = Recipe(
        task="image_decoder",
        data=DataConfig(mixture=MIXTURE, row_tokens=120, kept_rows=6, kept_steps=2),
        model={"base": str(base)},
        loss=LossConfig(noise_repeats=2),
        optim=OptimConfig(lr=1e-3, warmup=1),
        loop=LoopConfig(batch_size=5, eval_samples=8, eval_every=100, log_every=1, ema=0.5, **loop),
    )
    return ImageDecoderTask(recipe, pictures, pictures, lambda done, total: None)


def test_what_is_kept_gives_the_losses_of_joint_training(made: tuple[Path, Cache]) -> None:
    task = make_task(made)
    batch = task.to_device(task.train.batch(0, 6), "cpu")
    model, inputs = task.model.eval(), batch.inputs
    generator = torch.Generator().manual_seed(0)
    draws = Draws(
        uncond_uniform=torch.rand(len(inputs.images), 1, 1, generator=generator),
        diffusion_noise=torch.randn(inputs.latents.shape, generator=generator),
        timesteps=torch.randint(1000, (len(inputs.images),), generator=generator),
    )
    with torch.no_grad():
        joint = model(inputs, draws=draws).diffusion.per_image
    kept = Kept(model, torch.float32)
    kept.add(batch, 0.0)
    kept.close()
    assert len(kept.seeing) > 0 and len(kept.blind) > 0
    assert len(kept.row) == int(inputs.image_loss_mask.sum())
    uniform = (np.arange(40) + 0.5) / 40
    chosen, pictures = kept.image[kept.numbers(uniform)], kept.pictures(uniform)
    assert len(set(chosen.tolist())) > len(kept.row) // 2
    with torch.no_grad():
        ours = model.image_decoder.diffusion_loss(
            model.image_decoder.context_tokens(pictures.hidden, pictures.mask),
            pictures.features,
            pictures.visible,
            latents=pictures.latents,
            images=None,
            weights=torch.ones(40),
            draws=Draws(draws.uncond_uniform[chosen], None, draws.diffusion_noise[chosen], draws.timesteps[chosen]),
            seeing=pictures.seeing,
        ).per_image
    torch.testing.assert_close(ours, joint[chosen], rtol=2e-3, atol=2e-3)  # latents are kept in half precision


def test_only_the_image_decoder_learns(made: tuple[Path, Cache]) -> None:
    task = make_task(made)
    loss, parts = task.module(task.to_device(task.batch(0), "cpu"))
    loss.backward()
    learning = {name for name, p in task.model.named_parameters() if p.grad is not None}
    wanted = {n for n, _ in task.model.named_parameters() if n.startswith("image_decoder.") and ".codec." not in n}
    assert learning == {name for name in wanted if not name.endswith("ignore_token")}
    assert float(parts["image"]) == float(loss.detach())


def test_bf16_stays_near_fp32(made: tuple[Path, Cache]) -> None:
    task = make_task(made)
    pictures = task.to_device(task.batch(0), "cpu")
    halves = dataclasses.replace(
        pictures, hidden=pictures.hidden.bfloat16(), features=[m.bfloat16() for m in pictures.features]
    )
    losses = []
    for dtype, given in ((torch.float32, pictures), (torch.bfloat16, halves)):
        torch.manual_seed(1)
        losses.append(ImageDecoderObjective(task.model, 4, dtype)(given)[1]["image"].item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]


def test_a_run_resumed_between_turns_repeats_an_undisturbed_one(made: tuple[Path, Cache], tmp_path: Path) -> None:
    def run(name: str, stop_at: int = 0, resume: bool = False) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir(exist_ok=True)
        task = make_task(made, steps=6)
        loop = Loop(task.recipe, task, tmp_path / name)
        if stop_at:
            plain = task.to_device

            def watched(batch, device):  # type: ignore[no-untyped-def]
                if getattr(batch, "turn", -1) == stop_at:
                    loop.stop_signal = 15
                return plain(batch, device)

            task.to_device = watched  # type: ignore[method-assign]
        loop.run(resume=resume)
        assert task.turn == 2  # six steps, two for each turn
        return {n: p.detach().clone() for n, p in task.model.named_parameters()}

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("parts", stop_at=1)
    resumed = run("parts", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[n], p) for n, p in make_task(made).model.named_parameters())


def test_a_graph_asked_for_where_none_can_be_recorded_is_refused(made: tuple[Path, Cache]) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="needs a CUDA device"):
            make_task(made, cuda_graph=True)
    with pytest.raises(ConfigError, match="is for the task image_decoder"):
        Recipe(task="interleaved", loop=LoopConfig(cuda_graph=True))


@pytest.mark.gpu
def test_a_recorded_step_equals_a_plain_one(made: tuple[Path, Cache]) -> None:
    task = make_task(made)
    task.model.to("cuda")
    pictures = task.to_device(task.batch(0), "cuda")
    plain, graph = (ImageDecoderObjective(task.model, 4, torch.float32, kind).train() for kind in (False, True))
    graph(pictures)[0].backward()  # records, which takes random numbers
    task.model.zero_grad(set_to_none=True)
    found = []
    for objective in (plain, graph, graph):
        torch.manual_seed(1)
        loss, _ = objective(pictures)
        loss.backward()
        norm = sum(float((p.grad**2).sum()) for p in task.model.parameters() if p.grad is not None)
        task.model.zero_grad(set_to_none=True)
        found.append((float(loss.detach()), norm))
    assert found[1] == pytest.approx(found[0], rel=1e-3) and found[2] == pytest.approx(found[1], rel=1e-3)


def test_rows_without_a_picture_to_draw_are_told(made: tuple[Path, Cache]) -> None:
    task = make_task(made)
    batch = task.to_device(task.train.batch(0, 2), "cpu")
    batch.inputs = dataclasses.replace(batch.inputs, image_loss_mask=torch.zeros_like(batch.inputs.image_loss_mask))
    kept = Kept(task.model.eval(), torch.float32)
    kept.add(batch, 0.0)
    with pytest.raises(ConfigError, match=r"data\.mixture: no row has a picture to draw"):
        kept.close()
