"""Times the kernel against other implementations on a CUDA device, after checking what each computes.

Place in the flow: `kernels/gpu_bench.py` calls `run` with the peers it found and writes what it returns. Nothing here
prints. Cases, and what "near" and "uniform" offsets are, come from `bench.py`.

Two levels. "op": finished locations and weights in, as every deformable-attention kernel takes them. "attention":
projected queries in, so softmax, relative index and locations are inside (`mmfs_attention`); other implementations do
that part in torch and call their op.

Figures per case, dtype, level, implementation and step ("forward", "training" = forward + backward): device time by
CUDA events with a cold L2 cache (median, and spread = 80th minus 20th percentile over the median), wall time per call
back to back (launches and Python included), memory at the peak beyond the inputs, and the share of the measured copy
bandwidth that moving every input and output once would take.

Verify first: an output or gradient may be at most twice as far from float64 as torch's is in the same dtype, plus a
floor for rounding; a result that is not is reported as an error and not timed. At op level, coordinates of locations
that lie exactly on a cell's centre have no derivative, only one from each side, and implementations choose differently
(at -1, where a sample enters the map, `grid_sample` takes the side inside, others the side outside): `_settled` leaves
those components of the locations' gradient out, and nothing else. In bf16 they are frequent, up to a quarter on a map
of 64 cells; in float32 rare.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmi_kernels import fused
from mmi_kernels.bench import Case, relative_error
from mmi_kernels.op import deform_sample

Sampler = Callable[[Tensor, tuple[tuple[int, int], ...], Tensor, Tensor], Tensor]
"""(value [N, S, H, D], shapes, locations [N, Q, H, L, P, 2], weights [N, Q, H, L, P]) → [N, Q, H·D]"""

FLOOR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_COLD = 256 * 2**20  # bytes written between two calls: five times the largest L2 cache
_SECONDS = 0.025  # device time per figure


@dataclass(frozen=True)
class Figure:
    """One measured figure; times in milliseconds, memory in MiB."""

    case: str
    dtype: str
    level: str
    name: str
    step: str
    median_ms: float
    spread: float
    wall_ms: float
    peak_mib: float
    bandwidth_share: float
    error: float
    repeats: int


@dataclass(frozen=True)
class Trouble:
    """An implementation that failed or computed something else."""

    case: str
    dtype: str
    level: str
    name: str
    reason: str


def ours(value: Tensor, shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor) -> Tensor:
    """The kernel as an op."""
    return deform_sample(value, shapes, locations, weights, backend="cuda")


def torchs(value: Tensor, shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor) -> Tensor:
    """`grid_sample`, level by level."""
    return deform_sample(value, shapes, locations, weights, backend="torch")


def attention_by(sampler: Sampler | None, case: Case, backend: str = "cuda") -> Callable[..., Tensor]:
    """`mmfs_attention` by a backend (``None``), or its torch algebra around an op."""

    shapes = tuple((side, side) for side in case.sides)
    scales = [(1 / case.sides[0],) * 2] * len(shapes)

    @cache
    def given(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Visibility, reference points and token: inputs, so made once and not timed."""
        visible = torch.ones(case.rows, 1, case.images, dtype=torch.bool, device=device)
        reference = case.places().to(device).reshape(1, -1, 2).expand(1, case.queries, 2)
        return visible, reference, torch.zeros(case.heads * case.dim, device=device)

    def attend(value: Tensor, offsets: Tensor, logits: Tensor, table_offsets: Tensor, table_logits: Tensor) -> Tensor:
        tables, (visible, reference, token) = (table_offsets, table_logits), given(value.device)
        rest = (tables, reference, scales, visible, token)
        if sampler is None:
            return fused.mmfs_attention(value, shapes, offsets, logits, *rest, backend=backend)
        weights, _, moves = fused._mmfs_weights(offsets, logits, tables, visible.long(), case.heads, len(shapes))
        locations = fused._mmfs_locations(reference, moves, scales)
        return sampler(value, shapes * case.images, locations, weights)

    return attend


def op_by(sampler: Sampler, case: Case) -> Callable[..., Tensor]:
    """The op alone."""
    return lambda value, locations, weights: sampler(value, case.spatial_shapes, locations, weights)


def draw(case: Case, level: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Leaves of a level: value, locations, weights; or value, offsets, logits and the two tables."""
    value, locations, weights = case.draw(device)
    if level == "op":
        return [tensor.to(dtype).requires_grad_() for tensor in (value, locations, weights)]
    generator = torch.Generator(device).manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype).requires_grad_()

    offsets, logits = case.heads * case.points * 2, case.heads * len(case.sides) * case.points
    grid = (case.rows, case.queries)
    tables = (normal(50, offsets, scale=0.1), normal(50, logits, scale=0.1))
    return [value.to(dtype).requires_grad_(), normal(*grid, offsets, scale=3.0), normal(*grid, logits), *tables]


def run(
    cases: Sequence[Case],
    dtypes: Sequence[torch.dtype],
    levels: Sequence[str],
    samplers: dict[str, Sampler],
    *,
    device: str = "cuda",
    until: float = float("inf"),
    compiled: Sequence[str] = (),
) -> Iterator[Figure | Trouble]:
    """Verify and time every implementation; yields as it goes and stops at ``time.monotonic() == until``.

    Args:
        samplers: implementations beside the kernel ("mmi") and torch ("torch"), by name.
        compiled: names of cases for which torch is also timed under `torch.compile` (which takes many seconds).
    """
    ceiling = copy_bandwidth(device)
    for level in levels:
        for case in cases:
            for dtype in dtypes:
                if time.monotonic() >= until:
                    return
                yield from _case(case, level, dtype, samplers, device, ceiling, case.name in compiled)


def _case(
    case: Case,
    level: str,
    dtype: torch.dtype,
    samplers: dict[str, Sampler],
    device: str,
    ceiling: float,
    compiled: bool,
) -> Iterator[Figure | Trouble]:
    leaves = draw(case, level, dtype, device)
    generator = torch.Generator(device).manual_seed(5)
    pull = torch.randn(case.rows, case.queries, case.heads * case.dim, generator=generator, device=device).to(dtype)
    by = attention_by if level == "attention" else op_by
    calls = {"torch": by(torchs, case), "mmi": by(ours if level == "op" else None, case)}
    calls |= {name: by(sampler, case) for name, sampler in samplers.items()}
    if compiled:
        calls["torch compiled"] = torch.compile(calls["torch"], dynamic=False)
    where = (case.name, str(dtype).removeprefix("torch."), level)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = _results(calls["torch"], exact, pull.double(), case.training)
    if level == "op" and case.training:
        settled = _settled(exact[1].detach(), case.spatial_shapes)
        truth[2] = truth[2] * settled
    allowed: list[float] = []
    for name, call in calls.items():
        try:
            results = _results(call, leaves, pull, case.training)
            if level == "op" and case.training:
                results[2] = results[2] * settled
            errors = [relative_error(a, b) for a, b in zip(results, truth, strict=True)]
            allowed = allowed or [2 * error + FLOOR[dtype] for error in errors]
            if not all(error <= bound for error, bound in zip(errors, allowed, strict=True)):
                yield Trouble(*where, name, f"off by {max(errors):.1e}, allowed {max(allowed):.1e}")
                continue
            for step in ("forward", "training")[: 1 + case.training]:
                measured = measure(call, leaves, pull, step, device)
                moved = sum(leaf.nbytes for leaf in leaves) + pull.nbytes
                share = moved * (3 if step == "training" else 1) / measured["median_ms"] / 1e-3 / ceiling
                yield Figure(*where, name, step, **measured, bandwidth_share=share, error=max(errors))
        except Exception as error:
            yield Trouble(*where, name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _results(call: Callable[..., Tensor], leaves: list[Tensor], pull: Tensor, training: bool) -> list[Tensor]:
    out = call(*leaves)
    if not training:
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, leaves, pull)]


def _settled(locations: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """Where a location [N, Q, H, L, P, 2] in float64 is differentiable: False for coordinates on a cell's centre."""
    sizes = locations.new_tensor([(width, height) for height, width in shapes])  # (L, 2)
    cells = locations * sizes[:, None] - 0.5
    return cells != cells.round()


def measure(call: Callable[..., Tensor], leaves: list[Tensor], pull: Tensor, step: str, device: str) -> dict[str, Any]:
    """median_ms, spread, wall_ms, peak_mib and repeats of one step."""
    plain = [leaf.detach() for leaf in leaves]

    def once() -> None:
        if step == "forward":
            with torch.no_grad():
                call(*plain)
        else:
            torch.autograd.grad(call(*leaves), leaves, pull)

    once()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    once()
    torch.cuda.synchronize(device)
    rough = time.perf_counter() - start
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    repeats = int(min(max(_SECONDS / max(rough, 1e-5), 7), 50))
    start = time.perf_counter()
    for _ in range(repeats):
        once()
    torch.cuda.synchronize(device)
    wall = (time.perf_counter() - start) / repeats
    waste = torch.empty(_COLD, dtype=torch.int8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for first, last in events:
        waste.zero_()
        first.record()
        once()
        last.record()
    torch.cuda.synchronize(device)
    times = [first.elapsed_time(last) for first, last in events]
    low, high = np.quantile(times, [0.2, 0.8]).tolist()
    middle = statistics.median(times)
    return {
        "median_ms": middle,
        "spread": (high - low) / middle,
        "wall_ms": wall * 1e3,
        "peak_mib": peak,
        "repeats": repeats,
    }


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a device-to-device copy of half a GiB, the best of five."""
    source = torch.empty(2**29, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        target.copy_(source)
        last.record()
        torch.cuda.synchronize(device)
        best = min(best, first.elapsed_time(last))
    return 2 * source.nbytes / (best * 1e-3)


def launches(call: Callable[[], object]) -> dict[str, int]:
    """Kernels started and synchronisations made by one call, as torch's profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
    names = [event.key for event in seen.key_averages() for _ in range(event.count)]
    return {
        "launches": sum(
            name in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx") for name in names
        ),
        "synchronisations": sum("Synchronize" in name for name in names),
    }


def rows(found: Sequence[Figure | Trouble]) -> dict[str, list[dict[str, Any]]]:
    """For JSON."""
    return {
        "figures": [asdict(row) for row in found if isinstance(row, Figure)],
        "troubles": [asdict(row) for row in found if isinstance(row, Trouble)],
    }
