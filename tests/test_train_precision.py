"""Forward passes in bf16 with weights kept in fp32, and the attention that stands in for torch's on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmi_engine.train import precision
from mmi_engine.train.precision import attend, lean_attention, run_in


def _given(queries: int, keys: int, seed: int = 0) -> list[Tensor]:
    """Query, key and value ``[2, 3, …, 8]`` in fp32 that bf16 holds exactly."""
    torch.manual_seed(seed)
    return [torch.randn(2, 3, n, 8).bfloat16().float() for n in (queries, keys, keys)]


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "additive": {"attn_mask": torch.randn(80, 80).bfloat16().float()},
    "boolean": {"attn_mask": torch.ones(80, 80, dtype=torch.bool).tril()},
    "scale": {"scale": 0.7},
}


# 16 keys: as products; 80: fused, in fp32
@pytest.mark.parametrize(("keys", "mask"), [(16, "none"), (16, "scale"), *((80, name) for name in MASKS)])
def test_attention_and_gradients_are_those_of_fp32_to_the_rounding_of_bf16(keys: int, mask: str) -> None:
    exact = [tensor.requires_grad_() for tensor in _given(80, keys)]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    direction = torch.randn(2, 3, 80, 8)
    given = {
        k: v.bfloat16().float() if k == "attn_mask" and v.dtype != torch.bool else v for k, v in MASKS[mask].items()
    }
    true = F.scaled_dot_product_attention(*exact, **given)
    true.backward(direction)
    casts = {k: v.bfloat16() if isinstance(v, Tensor) and v.dtype != torch.bool else v for k, v in given.items()}
    made = attend(*rounded, **casts)
    assert made.dtype == torch.bfloat16
    made.backward(direction.bfloat16())
    for one, other in [(true, made), *((a.grad, b.grad) for a, b in zip(exact, rounded, strict=True))]:
        assert one is not None and other is not None
        assert (one - other.float()).norm() < 0.01 * one.norm()


def test_it_stands_in_for_bf16_with_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, **given: object) -> Tensor:
        seen.append(query.dtype)
        return value

    monkeypatch.setattr(precision, "attend", watched)
    exact = _given(4, 4)
    rounded = [tensor.bfloat16() for tensor in exact]
    with lean_attention():
        F.scaled_dot_product_attention(*rounded)
        F.scaled_dot_product_attention(*rounded, dropout_p=0.0, is_causal=True)
        assert seen == [torch.bfloat16] * 2
        F.scaled_dot_product_attention(*exact)
        F.scaled_dot_product_attention(*rounded, dropout_p=0.5)
        with torch.no_grad():
            F.scaled_dot_product_attention(*rounded)
    F.scaled_dot_product_attention(*rounded)
    assert len(seen) == 2


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_cast_pass_reach_the_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    module = Attending()
    x = torch.randn(2, 5, 8)
    run_in(dtype, module, x.to(dtype), times=2).float().sum().backward()
    assert module.seen == (dtype, torch.int64) and module.linear.weight.dtype == torch.float32
    found = module.linear.weight.grad
    assert found is not None and found.dtype == torch.float32
    module.zero_grad()
    module(x, times=2).sum().backward()
    assert (found - module.linear.weight.grad).norm() < 0.03 * found.norm()
