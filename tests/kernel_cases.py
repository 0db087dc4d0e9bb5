"""Calls of the two attentions and of deform_sample that the kernel's tests share, with odd shapes on purpose.

`CASES` name them; `draw` makes the inputs, `evaluate` runs any implementation forward and backward, `errors` measures
results against the float64 reference. Used by the emulated tests and by those on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mmi_kernels import cuda_op, deform_attention, deform_sample, mmfs_attention


@dataclass(frozen=True)
class KernelCase:
    """mode: "mmfs", "attention" or "sample"; offsets and locations reach `spread` maps beyond their middle."""

    mode: str
    batch: int
    queries: int
    heads: int
    dim: int
    points: int
    shapes: tuple[tuple[int, int], ...]
    images: int = 1
    visible: str = "all"  # "all", "some" (per query, one of which sees nothing), "row" (one mask per sequence)
    rows: int = 0  # value rows, if they are indexed
    token: bool = False
    spread: float = 0.6


CASES = {
    "mmfs, odd sizes": KernelCase("mmfs", 2, 11, 3, 16, 3, ((5, 7), (2, 3)), 3, "some"),
    "mmfs, one query": KernelCase("mmfs", 2, 1, 2, 64, 8, ((8, 8), (4, 4), (2, 2)), 10, "row"),
    "mmfs, tiles": KernelCase("mmfs", 1, 100, 2, 64, 8, ((10, 10), (5, 5)), 1),
    "mmfs, token and rows": KernelCase("mmfs", 3, 9, 2, 32, 4, ((4, 6),), 2, "some", rows=2, token=True),
    "mmfs, toon": KernelCase("mmfs", 2, 64, 4, 16, 4, ((8, 8), (4, 4), (2, 2)), 2, "some", token=True),
    "mmfs, 64 images": KernelCase("mmfs", 1, 5, 1, 8, 2, ((2, 2),), 64, "some"),
    "mmfs, ragged channels": KernelCase("mmfs", 1, 7, 2, 37, 5, ((3, 4), (1, 1)), 2, "some", token=True),
    "attention, injector": KernelCase("attention", 2, 16, 2, 32, 4, ((8, 8), (4, 4), (2, 2))),
    "attention, one level": KernelCase("attention", 1, 21, 3, 32, 4, ((3, 7),)),
    "attention, narrow": KernelCase("attention", 1, 5, 2, 6, 3, ((4, 3), (2, 1))),
    "sample, two levels": KernelCase("sample", 2, 5, 4, 6, 4, ((8, 8), (4, 4))),
    "sample, one point": KernelCase("sample", 3, 4, 3, 16, 1, ((3, 9), (2, 2))),
    "sample, wide": KernelCase("sample", 1, 3, 1, 256, 9, ((4, 5),)),
    "sample, many levels": KernelCase("sample", 1, 3, 2, 64, 7, ((4, 6),) * 11),
    "sample, one query": KernelCase("sample", 1, 1, 2, 64, 8, ((16, 16), (8, 8))),
}

FLOOR = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Part of the largest magnitude that a result may be off by whatever torch's own error is: rounding of the dtype."""


def draw(case: KernelCase, dtype: torch.dtype, query: torch.dtype | None = None) -> dict[str, Tensor]:
    """Float inputs by name, as leaves in ``dtype`` (query side in ``query``), plus "visible", "rows" and "pull"."""
    generator = torch.Generator().manual_seed(case.queries + case.dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    cells, levels = sum(h * w for h, w in case.shapes), len(case.shapes)
    grid = (case.batch, case.queries, case.heads)
    side = max(max(shape) for shape in case.shapes)
    found = {"value": normal(case.rows or case.batch, case.images * cells, case.heads, case.dim)}
    if case.mode == "sample":
        found["offsets"] = 0.5 + case.spread * 0.7 * normal(*grid, levels, case.points, 2)
        found["logits"] = normal(*grid, levels, case.points)
    else:
        per_level = levels if case.mode == "attention" else 1
        found["offsets"] = side * case.spread * 0.7 * normal(*grid[:2], case.heads * per_level * case.points * 2)
        found["logits"] = 2 * normal(*grid[:2], case.heads * levels * case.points)
    if case.mode == "mmfs":
        rows = case.images + 2
        found["table_offsets"] = side * 0.2 * normal(rows, case.heads * case.points * 2)
        found["table_logits"] = normal(rows, case.heads * levels * case.points)
    query = query or dtype
    found = {name: tensor.to(dtype if name == "value" else query) for name, tensor in found.items()}
    if case.mode == "mmfs":
        found["token"] = normal(case.heads * case.dim) if case.token else torch.zeros(case.heads * case.dim)
    if case.mode != "sample":
        found["reference"] = torch.rand(1 if case.batch % 2 else case.batch, case.queries, 2, generator=generator)
    found["pull"] = normal(case.batch, case.queries, case.heads * case.dim).to(dtype)
    if case.mode == "mmfs":
        shape = (case.batch, 1 if case.visible == "row" else case.queries, case.images)
        seen = torch.rand(shape, generator=generator) < (2.0 if case.visible == "all" else 0.6)
        if case.visible == "some":
            seen[0, case.queries // 2] = False
        found["visible"] = seen.long()
    if case.rows:
        found["rows"] = torch.randint(0, case.rows, (case.batch,), generator=generator)
    return found


def run(case: KernelCase, given: dict[str, Tensor], backend: str = "torch") -> Tensor:
    """One forward pass by the public entry points."""
    if case.mode == "sample":
        return deform_sample(given["value"], case.shapes, given["offsets"], given["logits"], backend=backend)
    value, offsets, logits = given["value"], given["offsets"], given["logits"]
    if case.mode == "attention":
        return deform_attention(value, case.shapes, offsets, logits, given["reference"][0], backend=backend)
    side = max(max(shape) for shape in case.shapes)
    scales = [(w / side / w, h / side / h) for h, w in case.shapes]
    tables = (given["table_offsets"], given["table_logits"])
    rest = (tables, given["reference"], scales, given["visible"], given["token"])
    return mmfs_attention(value, case.shapes, offsets, logits, *rest, rows=given.get("rows"), backend=backend)


LEAVES = ("value", "offsets", "logits", "table_offsets", "table_logits", "token")


def evaluate(function: Callable[[dict[str, Tensor]], Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients under Σ output · pull, by name."""
    leaves = {name: given[name].detach().clone().requires_grad_() for name in LEAVES if name in given}
    out = function({**given, **leaves})
    gradients = torch.autograd.grad(out, list(leaves.values()), given["pull"])
    return {"out": out.detach(), **{f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}}


def operands(case: KernelCase, given: dict[str, Tensor]) -> tuple[Any, ...]:
    """What the operator `mmi::sample` is called with when the backend is "cuda"; leaves require gradients."""
    seen: list[tuple[Any, ...]] = []

    def remember(*arguments: Any) -> tuple[Tensor]:
        seen.append(arguments)
        return (arguments[0],)

    leaves = {name: given[name].requires_grad_() for name in LEAVES if name in given}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_op, "_operator", remember)
        run(case, {**given, **leaves}, "cuda")
    return tuple(t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in seen[0])


def precise(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest deviation over the largest magnitude of the truth, per result."""
    return {
        name: ((found[name].double() - truth[name]).abs().max() / truth[name].abs().max().clamp_min(1e-30)).item()
        for name in truth
    }


def assert_as_good_as_torch(case: KernelCase, given: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """Every result at most twice as far from float64 as torch's in the same dtype, plus `FLOOR`. Returns the errors."""
    truth = evaluate(lambda inputs: run(case, inputs), precise(given))
    torchs = errors(evaluate(lambda inputs: run(case, inputs), given), truth)
    ours = errors(found, truth)
    floor = max(FLOOR[given["value"].dtype], FLOOR[given["logits"].dtype])
    for name, error in ours.items():
        assert error <= 2 * torchs[name] + floor, f"{name}: off by {error:.1e}, torch by {torchs[name]:.1e}"
    return {name: (ours[name], torchs[name]) for name in ours}


def told(kernel: str, name: str, dtype: torch.dtype, found: dict[str, tuple[float, float]]) -> str:
    """One line of the error table: ours / torch's, for each result."""
    errors = ", ".join(f"{result} {ours:.1e} / {torchs:.1e}" for result, (ours, torchs) in found.items())
    return f"{kernel}, {str(dtype).removeprefix('torch.')}, {name}: {errors}"
