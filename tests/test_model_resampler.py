"""Q-Former resampler: against a written-out formula, and by what a resampler must and must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_engine.errors import ModelError
from mmi_engine.model.config import QFormerConfig
from mmi_engine.model.resampler import HeadNormProjection, QFormer


def small(**changes: object) -> QFormerConfig:
    sizes = {
        "num_queries": 5,
        "hidden_size": 24,
        "encoder_hidden_size": 14,
        "num_layers": 3,
        "num_heads": 3,
        "intermediate_size": 40,
        "dropout": 0.0,
    }
    return QFormerConfig(**{**sizes, **changes})


def randomised(config: QFormerConfig) -> QFormer:
    """Every parameter random, norms and biases too, so that a forgotten one shows."""
    torch.manual_seed(0)
    model = QFormer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.normal_(centre, 0.3)
    return model


def by_hand(model: QFormer, features: Tensor) -> Tensor:
    """BLIP-2's Q-Former with norms on queries and keys, head by head, from the tensors of the state dictionary."""
    config, state = model.config, {k: v.double() for k, v in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt(centred.square().mean(-1, keepdim=True) + config.layer_norm_eps)
        return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attend(x: Tensor, source: Tensor, name: str) -> Tensor:
        deeper = ".linear" if config.qk_norm else ""
        query = linear(x, f"{name}.attention.query{deeper}")
        key = linear(source, f"{name}.attention.key{deeper}")
        value = linear(source, f"{name}.attention.value")
        width, heads = config.hidden_size // config.num_heads, []
        for h in range(config.num_heads):
            own = slice(h * width, (h + 1) * width)
            q, k = query[..., own], key[..., own]
            if config.qk_norm:
                q, k = norm(q, f"{name}.attention.query.norm"), norm(k, f"{name}.attention.key.norm")
            heads.append((q @ k.transpose(1, 2) / math.sqrt(width)).softmax(-1) @ value[..., own])
        return norm(linear(torch.cat(heads, -1), f"{name}.output.dense") + x, f"{name}.output.LayerNorm")

    features = features.double()
    x = norm(state["queries"].expand(len(features), -1, -1), "former.layernorm")
    for i in range(config.num_layers):
        layer = f"former.encoder.layer.{i}"
        x = attend(x, x, f"{layer}.attention")
        if i % config.cross_attention_frequency == 0:
            x = attend(x, features, f"{layer}.crossattention")
        inner = linear(x, f"{layer}.intermediate_query.dense")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(linear(inner, f"{layer}.output_query.dense") + x, f"{layer}.output_query.LayerNorm")
    return x


@pytest.mark.parametrize(("qk_norm", "frequency"), [(True, 2), (False, 1)])
def test_qformer_equals_the_written_out_formula(qk_norm: bool, frequency: int) -> None:
    model = randomised(small(qk_norm=qk_norm, cross_attention_frequency=frequency))
    features = torch.randn(2, 7, 14)
    with torch.no_grad():
        got = model(features)
    expected = by_hand(model, features)
    assert got.shape == (2, 5, 24)
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()


def test_masked_features_change_nothing() -> None:
    model = randomised(small(qk_norm=False, cross_attention_frequency=1, num_layers=1))
    features = torch.randn(2, 6, 14)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        padded = model(features, mask)
        other = features.clone()
        other[0, 4:] = 100.0
        changed = model(other, mask)
        short = model(features[:1, :4])
    assert torch.equal(padded, changed)
    torch.testing.assert_close(padded[:1], short, rtol=1e-5, atol=1e-5)
    other[1, 5] = 100.0
    with torch.no_grad():
        assert not torch.allclose(model(other, mask)[1], padded[1], atol=1e-3)


def test_masked_features_get_no_gradient() -> None:
    model = randomised(small(cross_attention_frequency=1))
    features = torch.randn(1, 4, 14, requires_grad=True)
    model(features, torch.tensor([[1, 1, 0, 1]])).square().sum().backward()
    assert features.grad is not None
    assert features.grad[0, 2].abs().max() == 0
    assert features.grad[0, [0, 1, 3]].abs().amax(dim=-1).min() > 0
    assert model.queries.grad is not None and model.queries.grad.abs().amax(dim=-1).min() > 0


def test_order_of_features_does_not_matter() -> None:
    model = randomised(small())
    features = torch.randn(1, 9, 14)
    with torch.no_grad():
        torch.testing.assert_close(model(features), model(features.flip(1)), rtol=1e-4, atol=1e-5)


def test_head_norm_is_a_norm_per_head() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(6, 12)
    projection = HeadNormProjection(linear, heads=3, eps=1e-12)
    nn.init.normal_(projection.norm.weight)
    nn.init.normal_(projection.norm.bias)
    x = torch.randn(2, 5, 6)
    expected = torch.cat(
        [
            F.layer_norm(part, (4,), projection.norm.weight, projection.norm.bias, 1e-12)
            for part in linear(x).split(4, -1)
        ],
        dim=-1,
    )
    torch.testing.assert_close(projection(x), expected)


def test_start_values_follow_the_configuration() -> None:
    torch.manual_seed(0)
    model = QFormer(small(num_queries=64, hidden_size=96, initializer_range=0.05))
    assert abs(model.queries.std().item() - 0.05) < 0.005
    query = model.former.encoder.layer[0].attention.attention.query
    assert abs(query.linear.weight.std().item() - 0.05) < 0.005


def test_dropout_acts_in_training_only() -> None:
    model = randomised(small(dropout=0.5))
    features = torch.randn(1, 4, 14)
    assert torch.equal(model(features), model(features))
    model.train()
    assert not torch.equal(model(features), model(features))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ModelError):
        small(num_heads=5)
