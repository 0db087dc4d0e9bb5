"""The benchmark refuses to time wrong numbers, and reports what it timed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mmi_engine import kernel_bench
from mmi_kernels import bench, deform_sample, memory
from mmi_kernels.bench import CASES, Case

SMALL = Case("small", 2, (4, 2), 2, 2, 16, 4, 3)
DECODE = Case("decode", 1, (4,), 1, 2, 16, 1, 3, offsets="uniform", training=False)


def test_rows_tell_what_was_timed() -> None:
    seen: list[bench.Row] = []
    result = bench.run([SMALL, DECODE], seconds=0.0, clock="processor", on_row=seen.append)
    assert json.loads(json.dumps(result)) == result
    steps = [(row.case, row.backend, row.step) for row in seen]
    assert steps == [
        *(("small", backend, step) for step in ("forward", "training") for backend in ("torch", "numba")),
        *(("decode", backend, "forward") for backend in ("torch", "numba")),
    ]
    assert all(row["median_ms"] > 0 and row["repeats"] >= 5 for row in result["rows"])
    assert all(row["bandwidth_share"] is None and row["peak_mib"] >= 0 for row in result["rows"])
    by_wall = bench.run([DECODE], seconds=0.0)["rows"]
    assert all(row["bandwidth_share"] > 0 for row in by_wall)
    assert all(row.speedup == 1 for row in seen[::2]) and all(row.speedup > 0 for row in seen)
    assert result["machine"]["torch"] == torch.__version__


def test_ratios_are_taken_within_a_repetition_and_turns_reversed() -> None:
    """A clock that runs ten times as fast in the second repetition leaves each repetition's ratio at 4."""
    now, order, cost = [0.0], [], {"slow": 4.0, "fast": 1.0}

    def call(name: str) -> None:
        order.append(name)
        now[0] += cost[name] * (10.0 if 4 <= len(order) - 1 < 6 else 1.0)

    times = bench.turns(call, ["slow", "fast"], 0.0, lambda: now[0])
    assert order[2:8] == ["slow", "fast", "fast", "slow", "slow", "fast"]  # after one call of each that is not timed
    assert [slow / fast for slow, fast in zip(times["slow"], times["fast"], strict=True)] == [4.0] * 5
    assert times["fast"] == [1.0, 10.0, 1.0, 1.0, 1.0]


def test_a_ratio_above_one_says_faster_than_torch() -> None:
    now, cost = [0.0], {"torch": 8.0, "numba": 2.0}

    def call(name: str) -> None:
        now[0] += cost[name]

    figures = bench.timed(call, ["torch", "numba"], 0.0, lambda: now[0])
    assert {name: figure["speedup"] for name, figure in figures.items()} == {"torch": 1.0, "numba": 4.0}
    where = {"level": "op", "case": "made up", "dtype": "float32", "step": "forward"}
    rows = [{**where, "name": name, **figure} for name, figure in figures.items()]
    (_, times, ratios), *_ = kernel_bench.compared(rows)
    assert times == {"torch": 8e3, "numba": 2e3} and ratios == {"torch": 4.0, "numba": 1.0}
    rows[1]["speedup"] = 5.0  # of the turns, which is not that of the medians
    assert kernel_bench.compared(rows)[0][2]["torch"] == 5.0
    assert kernel_bench.table(rows)[1][-1] == "8000.000 (5.00×)"
    del rows[1]["speedup"]  # a device's figures: no turns
    assert kernel_bench.compared(rows)[0][2] == {"torch": 4.0, "numba": 1.0}


@pytest.mark.parametrize("broken", ["output", "value gradient", "locations gradient", "weights gradient"])
def test_wrong_numbers_are_not_timed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose result is off by one in ten thousand in one of four places."""
    place = ("output", "value gradient", "locations gradient", "weights gradient").index(broken)

    class Skew(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor, ahead: float, back: float) -> Tensor:
            ctx.back = back
            return tensor * ahead

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            return gradient * ctx.back, None, None

    def skewed(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor, *, backend: str) -> Tensor:
        inputs = [value, locations, weights]
        if backend == "numba" and place:
            inputs[place - 1] = Skew.apply(inputs[place - 1], 1.0, 1.0001)
        out = deform_sample(inputs[0], shapes, inputs[1], inputs[2], backend=backend)
        return Skew.apply(out, 1.0001, 1.0) if backend == "numba" and not place else out

    monkeypatch.setattr(bench, "deform_sample", skewed)
    with pytest.raises(bench.VerificationError, match=f"numba, small: {broken} off by"):
        bench.run([SMALL], seconds=0.0)


def test_shipped_cases_are_distinct_and_consistent() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    value, locations, weights = SMALL.draw("cpu")
    assert value.shape == (2, 2 * (16 + 4), 2, 16)
    assert locations.shape == (2, 4, 2, 4, 3, 2) and weights.shape == (2, 4, 2, 4, 3)
    assert torch.allclose(weights.sum((-1, -2)), torch.ones(2, 4, 2))
    # a 2 × 2 query grid looks around its cell centres, x first
    _, locations, _ = Case("fine", 2, (64,), 1, 2, 16, 4, 3).draw("cpu")
    centres = locations.mean((0, 2, 3, 4))
    assert torch.equal(centres > 0.5, torch.tensor([[False, False], [True, False], [False, True], [True, True]]))


def test_memory_of_a_call_is_seen() -> None:
    held = memory.peak_mib(lambda: torch.ones(2**22).sum())  # 16 MiB
    if held is None:
        pytest.skip("this system does not tell a process's high-water mark")
    assert 15 < held < 40
    assert memory.peak_mib(lambda: None) < 2


def test_bytes_are_counted() -> None:
    out = deform_sample(*(value := SMALL.draw("cpu"))[:1], SMALL.spatial_shapes, *value[1:])
    assert SMALL.moved == sum(tensor.nbytes for tensor in (*value, out))


def test_slug_is_a_file_name() -> None:
    assert re.fullmatch(r"cpu(-[a-z0-9]+)+", bench.slug())
