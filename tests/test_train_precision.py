"""Forward passes in bf16 with weights kept in fp32, and the attention that stands in for torch's on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_engine.train import precision
from mmi_engine.train.precision import attend, exact_attention, run_in


def _given(queries: int, keys: int, sharp: float = 1.0) -> list[Tensor]:
    """Query, key and value ``[2, 3, …, 8]`` in float64 that bf16 holds exactly; logits of deviation ``sharp``."""
    torch.manual_seed(0)
    drawn = [torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (queries, keys, keys)]
    return [(part * scale).bfloat16().double() for part, scale in zip(drawn, (sharp, 1.0, 1.0), strict=True)]


MASKS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "none": lambda q, k: {},
    "causal": lambda q, k: {"is_causal": True},
    "additive": lambda q, k: {"attn_mask": torch.linspace(-4, 4, q * k).reshape(q, k).bfloat16().double()},
    "boolean": lambda q, k: {"attn_mask": torch.ones(q, k, dtype=torch.bool).tril()},
    "scale": lambda q, k: {"scale": 0.7},
    "no scale": lambda q, k: {"scale": 0.0},
}


def _passed(attention: Callable[..., Tensor], parts: list[Tensor], dtype: torch.dtype, given: dict) -> list[Tensor]:
    """What an attention gives, and the gradients of query, key and value, computed in ``dtype``."""
    leaves = [part.detach().clone().to(dtype).requires_grad_() for part in parts]
    given = {k: v.to(dtype) if k == "attn_mask" and v.is_floating_point() else v for k, v in given.items()}
    made = attention(*leaves, **given)
    assert made.dtype == dtype
    made.backward(torch.linspace(-1, 1, made.numel()).reshape(made.shape).bfloat16().to(dtype))
    return [made.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("keys", "sharp"), [(16, 1.0), (16, 6.0), (80, 3.0)])
def test_attention_and_gradients_are_as_near_to_the_truth_as_torchs(mask: str, keys: int, sharp: float) -> None:
    parts, given = _given(80, keys, sharp), MASKS[mask](80, keys)
    true = _passed(F.scaled_dot_product_attention, parts, torch.float64, given)
    made = _passed(attend, parts, torch.bfloat16, given)
    torchs = _passed(F.scaled_dot_product_attention, parts, torch.bfloat16, given)
    assert len(true) == len(made) == 4
    for exact, ours, theirs in zip(true, made, torchs, strict=True):
        error, other = ((one.double() - exact).norm() / (exact.norm() + 1e-6) for one in (ours, theirs))
        assert error < 0.004  # one rounding to eight bits
        assert error <= 1.05 * other + 1e-4


def test_it_stands_in_for_bf16_with_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, **given: object) -> Tensor:
        seen.append(set(given))
        return value

    monkeypatch.setattr(precision, "attend", watched)
    exact = [part.float() for part in _given(4, 4)]
    rounded = [tensor.bfloat16() for tensor in exact]
    with exact_attention():
        F.scaled_dot_product_attention(*rounded)
        F.scaled_dot_product_attention(*rounded, None, 0.5, is_causal=True)
        F.scaled_dot_product_attention(*exact)
        with torch.no_grad():
            F.scaled_dot_product_attention(*rounded)
    F.scaled_dot_product_attention(*rounded)
    assert seen == [set(), {"attn_mask", "dropout_p", "is_causal"}]


class Attending(nn.Module):
    """A linear map, then attention of what it gives over itself; what it computes in is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor, *, times: int = 1) -> Tensor:
        """``[B, L, 8]`` → the same."""
        y = self.linear(x)
        self.seen = (y.dtype, self.count.dtype)
        return times * F.scaled_dot_product_attention(y, y, y)


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_gradients_of_a_cast_pass_reach_the_weights(
    dtype: torch.dtype, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    module, counted = Attending(), []
    monkeypatch.setattr(precision, "attend", lambda *parts, **given: counted.append(1) or attend(*parts, **given))
    x = torch.randn(2, 5, 8)
    run_in(dtype, module, x.to(dtype), times=2).float().sum().backward()
    assert len(counted) == calls
    assert module.seen == (dtype, torch.int64) and module.linear.weight.dtype == torch.float32
    found = module.linear.weight.grad
    assert found is not None and found.dtype == torch.float32
    module.zero_grad()
    module(x, times=2).sum().backward()
    assert (found - module.linear.weight.grad).norm() < 0.03 * found.norm()
