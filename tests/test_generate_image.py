"""Denoising against the algorithm written out, and independence from neighbours."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch

from mmi_engine.errors import BackendError, UsageError
from mmi_engine.generate.compiled import compile_unet
from mmi_engine.generate.image import Denoising, ImageRequest, denoise, to_images
from mmi_engine.generate.settings import Settings
from mmi_engine.model.config import GenerationDefaults
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.rows import DRAWN_TOGETHER, drawn_together, invariant_rows, steady
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> MMInterleaved:
    return tiny_model(seed=3)


def request_of(count: int, seeds: list[int], seen: list[int]) -> ImageRequest:
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randn(count, 5, 16, generator=generator)
    features = [torch.randn(count, 1, 16, s, s, generator=generator) for s in (16, 8, 4, 2)]
    visible = torch.tensor(seen)[:, None]
    return ImageRequest(tokens, features, visible, [torch.Generator().manual_seed(s) for s in seeds])


@torch.no_grad()
def test_ddim_with_guidance_written_out(model: MMInterleaved) -> None:
    request, steps, guidance = request_of(1, [4], [1]), 4, 2.5
    got = denoise(model, request, Denoising(steps, guidance, "ddim"))
    alphas = model.image_decoder.scheduler.alphas_cumprod.double()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4)).double()
    unet = model.image_decoder.unet
    vision = unet.look(request.features, request.visible)
    stride = 1000 // steps
    for index in reversed(range(steps)):
        t = index * stride
        noisy = x.float()
        empty = unet(noisy, torch.tensor(t), model.image_decoder.unconditional, vision).double()
        told = unet(noisy, torch.tensor(t), request.tokens, vision).double()
        v = empty + guidance * (told - empty)
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        clean, noise = a * x - s * v, a * v + s * x
        before = alphas[t - stride] if index else torch.ones(()).double()  # the last step ends clean
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_every_scheduler_is_finite_and_repeatable(model: MMInterleaved, scheduler: str) -> None:
    plan = Denoising(4, 2.0, scheduler)
    first, second = (denoise(model, request_of(2, [1, 2], [0, 1]), plan) for _ in range(2))
    assert torch.equal(first, second)
    pictures = to_images(model, first)
    assert pictures.shape == (2, 3, 32, 32) and bool(((pictures >= 0) & (pictures <= 1)).all())


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_place_in_the_batch_does_not_matter(model: MMInterleaved, scheduler: str) -> None:
    rows = invariant_rows(2 * torch.get_num_threads(), model.device)
    plan, whole = Denoising(3, 2.0, scheduler), request_of(rows, list(range(rows)), [1] * rows)
    expected = denoise(model, whole, plan)
    order = [rows - 1, *range(rows - 1)]
    turned = request_of(rows, order, [1] * rows)
    turned.tokens = whole.tokens[order]
    turned.features = [m[order] for m in whole.features]
    assert torch.equal(denoise(model, turned, plan), expected[order])


def test_context_image_matters_only_where_it_is_visible(model: MMInterleaved) -> None:
    plan = Denoising(2, 1.0, "ddim")
    base = denoise(model, request_of(2, [1, 2], [1, 0]), plan)
    changed = request_of(2, [1, 2], [1, 0])
    changed.features = [m.flip(-1) for m in changed.features]  # a shift would vanish in the LayerNorm
    moved = denoise(model, changed, plan)
    assert not torch.allclose(moved[0], base[0], atol=1e-4)
    torch.testing.assert_close(moved[1], base[1])


def test_user_choices_come_before_the_models() -> None:
    defaults = GenerationDefaults(steps=20, guidance=2.0, scheduler="ddim")
    assert Denoising.choose(Settings(), defaults) == Denoising(20, 2.0, "ddim")
    assert Denoising.choose(Settings(steps=3, guidance=0.0), defaults) == Denoising(3, 0.0, "ddim")


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"scheduler": "euler"}, {"top_p": 0.0}, {"min_new_tokens": 99}, {"beams": 2, "temperature": 1.0}],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError):
        Settings(**wrong)


def test_rows_computed_together_are_a_multiple_of_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    cpu = torch.device("cpu")
    assert [invariant_rows(n, cpu) for n in (1, 3, 4, 7, 8)] == [1, 1, 4, 4, 8]
    assert invariant_rows(7, torch.device("cuda")) == 7


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_a_cpu_denoises_equal_parts_of_few_rows(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows in range(1, 40):
        part = drawn_together(rows, torch.device("cpu"))
        assert 1 <= part <= min(rows, max(DRAWN_TOGETHER, threads))
        assert part == rows or part % threads == 0
        assert drawn_together(rows, torch.device("cuda")) == rows


@torch.no_grad()
def test_parts_draw_what_the_whole_draws(model: MMInterleaved) -> None:
    plan, seen = Denoising(3, 2.0, "ddpm"), [1, 0, 1, 1, 0, 1]
    whole = denoise(model, request_of(6, list(range(6)), seen), plan)
    parts = [denoise(model, part, plan) for part in request_of(6, list(range(6)), seen).split(4)]
    assert [len(part) for part in parts] == [4, 4], "the last one is filled up"
    torch.testing.assert_close(torch.cat(parts)[:6], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_small_picture_alone_has_the_bits_it_has_in_a_batch(stride: int) -> None:
    layer = torch.nn.Sequential(torch.nn.Conv2d(32, 96, 3, padding=1, stride=stride))
    names, rows = list(layer.state_dict()), torch.randn(6, 32, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = layer(rows)
    assert list(steady(layer).state_dict()) == names
    assert torch.equal(layer(rows[:1]), expected[:1]) and torch.equal(layer(rows), expected)


@torch.no_grad()
def test_a_compiled_unet_draws_the_same() -> None:
    """Traced, without a compiler's minutes: what is compiled is what runs."""
    model, plan = tiny_model(seed=3), Denoising(1, 2.0, "ddim")
    plain = denoise(model, request_of(1, [4], [1]), plan)
    compile_unet(model, 1, backend="eager")
    assert model.image_decoder.unet.compiled
    assert torch.allclose(denoise(model, request_of(1, [4], [1]), plan), plain, atol=1e-5)


def test_what_cannot_be_compiled_is_said_at_once() -> None:
    with pytest.raises(BackendError, match="leave out --compile"):
        compile_unet(tiny_model(), 1, backend="no such backend")


@torch.no_grad()
def test_attention_is_not_asked_for_its_arguments_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers inspects a processor's signature at each call; this is remembered, in copies of a model too."""
    model, plan = tiny_model(seed=3), Denoising(1, 2.0, "ddim")
    expected = denoise(model, request_of(1, [4], [1]), plan)
    twin = copy.deepcopy(model)

    find = inspect._signature_from_function  # type: ignore[attr-defined]

    def read(cls: type, function: Callable[..., object], *rest: object, **named: object) -> object:
        assert "AttnProcessor" not in function.__qualname__, "a processor's signature was read anew"
        return find(cls, function, *rest, **named)

    monkeypatch.setattr(inspect, "_signature_from_function", read)
    for each in (model, twin):
        assert torch.equal(denoise(each, request_of(1, [4], [1]), plan), expected)
