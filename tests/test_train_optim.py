"""Schedule and averaged weights against their closed forms; parameter groups and freezing by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmi_engine.errors import ConfigError
from mmi_engine.train.optim import Average, cosine_with_warmup, freeze, parameter_groups
from mmi_engine.train.sections import GroupConfig, OptimConfig


def test_schedule_closed_form() -> None:
    def factor(step: int) -> float:
        return cosine_with_warmup(step, total=110, warmup=10, min_ratio=0.1)

    assert [factor(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.55)  # half-way: the mean of peak and end
    assert factor(35) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert factor(110) == factor(500) == pytest.approx(0.1)


def test_schedule_without_warmup_or_with_nothing_but_warmup() -> None:
    assert cosine_with_warmup(0, total=4, warmup=0, min_ratio=0.0) == 1.0
    assert cosine_with_warmup(5, total=5, warmup=5, min_ratio=0.0) == 1.0


def test_schedule_equals_torch_cosine() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.2)
    for step in range(20):
        ours = cosine_with_warmup(step, total=20, warmup=0, min_ratio=0.2)
        assert ours == pytest.approx(reference.get_last_lr()[0], abs=1e-7)
        optimizer.step()
        reference.step()


def test_average_closed_form() -> None:
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.0)
    average = Average(module, 0.9)
    expected = 0.0
    for update, value in enumerate([1.0, -2.0, 5.0, 3.0] * 30):
        with torch.no_grad():
            module.weight.fill_(value)
        average.update(module)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    assert float(average.shadow["weight"]) == pytest.approx(expected, rel=1e-5)


def test_average_is_applied_and_taken_back() -> None:
    module = nn.Linear(2, 2)
    average = Average(module, 0.5)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    with average.applied(module):
        assert torch.equal(module.weight, before)
    assert torch.equal(module.weight, before + 1.0)


def test_average_skips_frozen_and_refuses_another_module() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freeze(module, (r"^0\.",))
    average = Average(module, 0.9)
    assert set(average.shadow) == {"1.weight", "1.bias"}
    with pytest.raises(ConfigError):
        average.load_state_dict(Average(nn.Linear(2, 2), 0.9).state_dict())


class Small(nn.Module):
    """A gate, offsets, a convolution and two kinds of norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.offsets = nn.Linear(3, 4)
        self.body = nn.Sequential(nn.Conv2d(2, 2, 3), nn.LayerNorm([2, 3, 3]), nn.GroupNorm(1, 2))


def test_parameter_groups_first_match_wins() -> None:
    rules = (
        GroupConfig(pattern=r"^gate$", decay=False),
        GroupConfig(pattern=r"offsets\.", lr_scale=0.1, decay=False),
        GroupConfig(pattern=r"offsets|body\.0", lr=7.0),
    )
    groups = parameter_groups(Small(), OptimConfig(lr=2.0, weight_decay=0.3, groups=rules))
    placed = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert placed == {
        "gate": (2.0, 0.0),
        "offsets.weight": (pytest.approx(0.2), 0.0),
        "offsets.bias": (pytest.approx(0.2), 0.0),
        "body.0.weight": (7.0, 0.3),
        "body.0.bias": (7.0, 0.0),
        "body.1.weight": (2.0, 0.0),  # three-dimensional, but a norm
        "body.1.bias": (2.0, 0.0),
        "body.2.weight": (2.0, 0.0),
        "body.2.bias": (2.0, 0.0),
    }


def test_freezing_removes_parameters_and_refuses_typing_errors() -> None:
    module = Small()
    assert freeze(module, ("offsets",)) == ["offsets.weight", "offsets.bias"]
    names = [n for g in parameter_groups(module, OptimConfig()) for n in g["names"]]
    assert "offsets.weight" not in names and "body.0.weight" in names
    with pytest.raises(ConfigError, match="matches no parameter"):
        freeze(module, ("ofsets",))
