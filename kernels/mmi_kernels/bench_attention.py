"""Times MMFS's attention on a CPU, from projected queries to sampled values, after checking what each backend computes.

Place in the flow: `mmi bench kernel` takes its figures of level "attention" from `run`. Inputs are those of
`bench_cuda.py`, verification and turns as in `bench.py`. Forward is what generation calls, without gradients: there
numba does all of it in one loop (`numba_mmfs.py`); with backward its softmax and locations are torch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmi_kernels import bench, bench_cuda, memory

_RESULTS = ("output", "value gradient", "offsets gradient", "logits gradient", "offset table gradient")
_RESULTS += ("logit table gradient", "output with gradients")


def run(
    cases: Sequence[bench.Case], names: Sequence[str], *, seconds: float = 1.0, clock: str = "wall"
) -> Iterator[dict[str, Any]]:
    """Figures of every case, backend and step, as `bench.Row` has them, with "name" for the backend.

    Args:
        cases: what to time.
        names: backends, "torch" first.
        seconds: time for each case and step (at least five repetitions are made).
        clock: "wall" or "processor", see `bench.run`.

    Raises:
        VerificationError: a backend's numbers are wrong.
    """
    for case in cases:
        calls = {name: bench_cuda.attention_by(None, case, backend=name) for name in names}
        errors = _verified(case, calls)
        leaves = bench_cuda.draw(case, "attention", torch.float32, "cpu")
        pull = torch.ones(case.rows, case.queries, case.heads * case.dim)
        plain = [leaf.detach() for leaf in leaves]
        moved = sum(leaf.nbytes for leaf in leaves) + pull.nbytes
        for step in ("forward", "training")[: 1 + case.training]:
            call = partial(_forward, calls, plain) if step == "forward" else partial(_training, calls, leaves, pull)
            for name, found in bench.timed(call, names, seconds, bench.CLOCKS[clock]).items():
                if bench.CLOCKS[clock] is time.perf_counter:
                    least = moved * (3 if step == "training" else 1) / bench.copy_bandwidth()
                    found["bandwidth_share"] = least / found["median_ms"] / 1e-3
                found["peak_mib"] = memory.peak_mib(partial(call, name))
                yield {"case": case.name, "name": name, "step": step, "error": errors[name], **found}


def _forward(calls: dict[str, Callable[..., Tensor]], leaves: list[Tensor], name: str) -> None:
    with torch.no_grad():
        calls[name](*leaves)


def _training(calls: dict[str, Callable[..., Tensor]], leaves: list[Tensor], pull: Tensor, name: str) -> None:
    torch.autograd.grad(calls[name](*leaves), leaves, pull)


def _verified(case: bench.Case, calls: dict[str, Callable[..., Tensor]]) -> dict[str, float]:
    """Worst relative error of each backend against float64. Raises VerificationError."""
    leaves = bench_cuda.draw(case, "attention", torch.float32, "cpu")
    pull = torch.randn(case.rows, case.queries, case.heads * case.dim, generator=torch.Generator().manual_seed(2))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = _results(case, calls["torch"], exact, pull.double())
    allowed: list[float] = []
    worst: dict[str, float] = {}
    for name, call in calls.items():
        found = zip(_results(case, call, leaves, pull), truth, strict=True)
        errors = [bench.relative_error(result, true) for result, true in found]
        allowed = allowed or [2 * error + bench.FLOOR for error in errors]
        for what, error, bound in zip(_RESULTS, errors, allowed, strict=False):
            if not error <= bound:
                raise bench.VerificationError(f"{name}, {case.name}: {what} off by {error:.1e}, allowed {bound:.1e}")
        worst[name] = max(errors)
    return worst


def _results(case: bench.Case, call: Callable[..., Tensor], leaves: list[Tensor], pull: Tensor) -> list[Tensor]:
    with torch.no_grad():
        alone = call(*[leaf.detach() for leaf in leaves])
    if not case.training:
        return [alone]
    out = call(*leaves)
    return [alone, *torch.autograd.grad(out, leaves, pull), out.detach()]
