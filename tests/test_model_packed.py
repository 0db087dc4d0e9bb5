"""Weights in oneDNN's layout: the same results, for as long as the weights are the same, and where that is safe."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

from mmi_engine.generate.literal import literal
from mmi_engine.model import packed as module
from mmi_engine.model.mmfs import project_all
from mmi_engine.model.packed import PackedConv2d, PackedLinear, PackedMap, packed
from mmi_engine.model.rows import steady

pytestmark = pytest.mark.skipif(not module.available(), reason="this processor or torch has no oneDNN layout")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 24, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(64, 48), nn.Linear(48, 16, bias=False)
    ).eval()


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 8, 16, 16, generator=torch.Generator().manual_seed(1))


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the packed operators that run, in order."""
    seen: list[str] = []
    for name in ("_linear", "_convolution"):
        operator = getattr(module, name)

        def call(*args: object, _name: str = name, _operator: object = operator) -> object:
            seen.append(_name)
            return _operator(*args)  # type: ignore[operator]

        monkeypatch.setattr(module, name, call)
    return seen


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW_ROWS", 20)  # the linear maps here see 24 rows of a picture


@torch.no_grad()
def test_the_same_results_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    seen, model = spied(monkeypatch), layers()
    expected, names = model.double()(pictures().double()), list(model.state_dict())
    found = packed(steady(model.float()))(pictures())
    assert seen == ["_convolution", "_linear", "_linear"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names and isinstance(model[2], nn.Linear)


@torch.no_grad()
def test_a_picture_alone_has_the_bits_it_has_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    model = packed(steady(layers()))
    together = model(pictures(8))
    for count in (1, 2, 3):
        assert torch.equal(model(pictures(8)[:count]), together[:count])


@torch.no_grad()
def test_new_weights_are_laid_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    model = packed(steady(layers()))
    first = model(pictures())
    for weight in model.parameters():
        weight.mul_(2)
    twice = model(pictures())
    plain = layers()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(twice, plain(pictures()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first, twice)
    model[2].weight = nn.Parameter(torch.zeros_like(model[2].weight))
    model[2].bias.zero_()
    assert not model(pictures()).any()


def test_gradients_autocast_and_training_take_the_ordinary_path(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    seen, model = spied(monkeypatch), packed(steady(layers()))
    model(pictures()).sum().backward()
    assert model[0].weight.grad is not None and not seen
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(pictures()).dtype == torch.bfloat16
    with torch.no_grad():
        model.train()(pictures())
        model.eval().double()(pictures().double())
    assert not seen


@torch.no_grad()
def test_copies_make_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    model = packed(steady(layers()))
    expected = model(pictures())
    twin = copy.deepcopy(model)
    twin[2].weight.mul_(3)
    assert torch.equal(model(pictures()), expected) and not torch.equal(twin(pictures()), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(pictures()), expected)


@torch.no_grad()
def test_a_large_model_and_other_padding_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = steady(
        nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"), nn.Conv2d(1, 1, 3, padding_mode="reflect", padding=1))
    )
    assert not any(isinstance(layer, PackedConv2d) for layer in packed(odd))
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    model = packed(steady(layers()))
    assert not any(isinstance(layer, PackedConv2d | PackedLinear) for layer in model)


@torch.no_grad()
def test_a_map_of_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(monkeypatch)
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(24, 16, generator=generator), torch.randn(24, generator=generator)
    many, one = torch.randn(2, 40, 16, generator=generator), torch.randn(2, 1, 16, generator=generator)
    linear = PackedMap(weight, bias)
    for rows in (many, one):
        torch.testing.assert_close(linear(rows), nn.functional.linear(rows, weight, bias), rtol=1e-5, atol=1e-5)
    assert seen == ["_linear"]


@torch.no_grad()
def test_the_literal_form_leaves_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    model = packed(steady(tiny_model().eval()))
    layer = next(layer for layer in model.modules() if isinstance(layer, PackedLinear))
    seen, rows = spied(monkeypatch), torch.randn(1, 32, layer.in_features)
    layer(rows)
    assert seen == ["_linear"]
    blocks = list(model.image_decoder.unet.mmfs_blocks)
    features = torch.randn(1, 1, 40, blocks[0].mmfs.value_proj.in_features)
    project_all(blocks, features)
    assert len(seen) == 1 + len(blocks)
    with literal(model):
        layer(rows)
        project_all(blocks, features)
    assert len(seen) == 1 + len(blocks)
    layer.plain = True
    with literal(model):
        assert layer.plain
    assert layer.plain, "what was chosen before stays"
    layer.plain = False
    layer(rows)
    assert len(seen) == 2 + len(blocks)
