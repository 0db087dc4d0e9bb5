"""Times the backends of `deform_sample` on this machine, after checking what they compute.

Place in the flow: `mmi bench kernel` calls `run` and shows its rows; the figures kept under `kernels/results/` are what
`run` returned, as JSON. Nothing here prints.

Verify before timing: a backend's output and gradients may be at most twice as far from the float64 reference as the
float32 reference is (plus a floor of a few units in the last place), else the case fails and is not timed.

Figures per case, backend and pass ("forward", "training" = forward + backward): the median in milliseconds, the spread
(80th minus 20th percentile over the median), the speed relative to torch, what moving every input and output once would
take at the bandwidth of a large copy over the time taken (above 1 where they stay in the caches), and by how much a
call raises the process's memory at most (`memory.py`, Linux). The backends take turns within each repetition, every
other time in reverse, and the speed is the median over repetitions of torch's time over theirs: a load that comes and
goes, or a cache left warm, hits them alike. On a shared machine read the ratios, not the milliseconds, and prefer the
processor clock with one thread.

Shapes: the MMFS calls of the released model (LLM: 16 heads × 64 channels, 8 points, levels 32², 16², 8²; image decoder:
the same with levels 64² … 8²; vision adapter: 16 × 32, 4 points), rows and queries cut to what a CPU does in seconds,
and the training shapes of the toon model. Source: architecture of MM-Interleaved; Deformable DETR for the operation.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from operator import truediv
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmi_kernels import memory
from mmi_kernels.op import backends, deform_sample, resolve
from mmi_kernels.reference import deform_sample_reference

# A median of fewer repetitions means little; the float32 floor is in units of the largest magnitude.
_LEAST_REPEATS = 5
FLOOR = 2e-6
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
COMPILED = "torch compiled"
"""The torch backend under `torch.compile`, as a name among the backends."""
_RESULTS = ("output", "value gradient", "locations gradient", "weights gradient")


@dataclass(frozen=True)
class Case:
    """One call's shapes.

    Attributes:
        name: unique, for people.
        rows, heads, dim, queries, points: N, H, D, Q, P.
        sides: side of each square level of one image, in positions.
        images: how many images each query samples; L = images · len(sides).
        offsets: "near" draws ±3 positions (standard deviation) around the query's place, as trained offsets do;
            "uniform" draws anywhere on the map.
        training: whether the call occurs in training, so that gradients are checked and timed too.
        large: takes torch seconds a call on a CPU, so that it is timed only when asked for.
    """

    name: str
    rows: int
    sides: tuple[int, ...]
    images: int
    heads: int
    dim: int
    queries: int
    points: int
    offsets: str = "near"
    training: bool = True
    large: bool = False

    @property
    def spatial_shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of all L levels."""
        return tuple((side, side) for side in self.sides) * self.images

    def draw(self, device: torch.device | str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """value [N, S, H, D], locations [N, Q, H, L, P, 2] and softmax weights [N, Q, H, L, P], float32."""
        generator = torch.Generator().manual_seed(seed)
        n, q, h, levels, p = self.rows, self.queries, self.heads, len(self.spatial_shapes), self.points
        positions = sum(height * width for height, width in self.spatial_shapes)
        value = torch.randn(n, positions, h, self.dim, generator=generator)
        if self.offsets == "uniform":
            locations = torch.rand(n, q, h, levels, p, 2, generator=generator)
        else:
            offsets = torch.randn(n, q, h, 1, p, 2, generator=generator) * 3 / self.sides[0]
            locations = (self.places() + offsets).expand(n, q, h, levels, p, 2).contiguous()
        weights = torch.randn(n, q, h, levels * p, generator=generator).softmax(-1).view(n, q, h, levels, p)
        return value.to(device), locations.to(device), weights.to(device)

    @property
    def moved(self) -> int:
        """Bytes of all inputs and the output in float32."""
        samples = self.rows * self.queries * self.heads * len(self.spatial_shapes) * self.points
        values = self.rows * self.heads * self.dim * sum(height * width for height, width in self.spatial_shapes)
        return 4 * (3 * samples + values + self.rows * self.queries * self.heads * self.dim)

    def places(self) -> Tensor:
        """[1, Q, 1, 1, 1, 2]: cell centres of the query grid where Q is a square, else the middle (as in the LLM)."""
        side = round(self.queries**0.5)
        if side * side != self.queries or side == 1:
            return torch.full((1, 1, 1, 1, 1, 2), 0.5)
        centres = (torch.arange(side) + 0.5) / side
        return torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1).view(1, -1, 1, 1, 1, 2)


def _decoder(side: int, images: int) -> Case:
    large = side == 64 or images == 10
    name = f"image decoder {side}×{side}, {images} images"
    return Case(name, 1, (64, 32, 16, 8), images, 16, 64, side * side, 8, large=large)


def _language(name: str, rows: int, queries: int, images: int) -> Case:
    label = f"{name} {rows}×{queries}, {images} images"
    training, large = queries > 1, queries > 1000
    return Case(label, rows, (32, 16, 8), images, 16, 64, queries, 8, training=training, large=large)


CASES: tuple[Case, ...] = (
    Case("toon image decoder, training", 64, (32, 16, 8, 4), 1, 4, 16, 256, 4),
    Case("toon language model, training", 16, (16, 8, 4), 5, 4, 16, 160, 4),
    *(_language("decode", rows, 1, images) for rows in (1, 8) for images in (1, 4, 10)),
    *(_language("prefill", 1, queries, images) for queries in (256, 2048) for images in (1, 10)),
    *(_decoder(side, images) for side in (8, 16, 32, 64) for images in (1, 4, 10)),
    Case("adapter injector", 2, (32, 16, 8), 1, 16, 32, 256, 4),
    Case("adapter extractor", 2, (16,), 1, 16, 32, 1344, 4),
    Case("adapter extractor, uniform", 2, (16,), 1, 16, 32, 1344, 4, "uniform"),
)


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        speedup: median of torch's time over this one's.
        error: the worst error found.
        bandwidth_share: what moving all inputs and outputs (with backward: three times) takes at copy speed, over the
            median; `None` for processor time, which is not comparable.
        peak_mib: by how much a call raised the process's memory; `None` where that cannot be told.
    """

    case: str
    backend: str
    step: str  # "forward" or "training"
    median_ms: float
    spread: float
    speedup: float
    error: float
    repeats: int
    bandwidth_share: float | None = None
    peak_mib: float | None = None


class VerificationError(RuntimeError):
    """A backend computed something else than the reference; its speed would mean nothing."""


def run(
    cases: Sequence[Case] = tuple(case for case in CASES if not case.large),
    *,
    device: torch.device | str = "cpu",
    names: Sequence[str] | None = None,
    seconds: float = 1.0,
    clock: str = "wall",
    on_row: Callable[[Row], None] | None = None,
) -> dict[str, Any]:
    """Verify, then time. Returns {"machine": …, "clock": …, "rows": […]}, ready for JSON.

    Args:
        cases: what to time.
        device: where.
        names: backends to time beside torch; default is what "auto" takes there.
        seconds: time to spend on each case and step (at least five repetitions are made).
        clock: "wall", or "processor": CPU time of this process, which other processes hardly disturb. It counts what
            threads spend waiting for each other, so use it with one thread, and not for a GPU.
        on_row: called with each figure as it comes.

    Raises:
        VerificationError: a backend's numbers are wrong.
        KernelUnavailable: a named backend cannot serve the device.
    """
    if names is None:
        served = {resolve("auto", device)}
        names = ["torch", *(name for name in backends() if name in served - {"torch"})]
    names = ["torch", *(name if name == COMPILED else resolve(name, device) for name in names if name != "torch")]
    rows: list[Row] = []
    for case in cases:
        errors = verify(case, names, device)
        for row in _timed(case, names, device, seconds, errors, CLOCKS[clock]):
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return {"machine": machine(device), "clock": clock, "rows": [asdict(row) for row in rows]}


def verify(case: Case, names: Sequence[str], device: torch.device | str = "cpu") -> dict[str, float]:
    """Worst relative error of each backend's output (and gradients) against float64. Raises VerificationError."""
    inputs = case.draw(device, seed=1)
    pull = torch.randn(case.rows, case.queries, case.heads * case.dim, generator=torch.Generator().manual_seed(2))
    pull = pull.to(device)
    truth = _all_results(case, tuple(tensor.double() for tensor in inputs), pull.double(), "torch")
    allowed = [
        2 * relative_error(single, exact) + FLOOR
        for single, exact in zip(_all_results(case, inputs, pull, "torch"), truth, strict=True)
    ]
    worst: dict[str, float] = {}
    for name in names:
        errors = [
            relative_error(result, exact)
            for result, exact in zip(_all_results(case, inputs, pull, name), truth, strict=True)
        ]
        for what, error, bound in zip(_RESULTS, errors, allowed, strict=False):
            if not error <= bound:
                raise VerificationError(f"{name}, {case.name}: {what} off by {error:.1e}, allowed {bound:.1e}")
        worst[name] = max(errors)
    return worst


def _all_results(case: Case, inputs: tuple[Tensor, ...], pull: Tensor, name: str) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = _sample(name, leaves[0], case, leaves[1], leaves[2])
    if not case.training:
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, leaves, pull)]


def _sample(name: str, value: Tensor, case: Case, locations: Tensor, weights: Tensor) -> Tensor:
    if name == COMPILED:
        return _compiled()(value, case.spatial_shapes, locations, weights)
    return deform_sample(value, case.spatial_shapes, locations, weights, backend=name)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(deform_sample_reference, dynamic=False)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Largest deviation over the largest magnitude of the truth."""
    return ((result.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()


def _timed(
    case: Case,
    names: Sequence[str],
    device: torch.device | str,
    seconds: float,
    errors: dict[str, float],
    clock: Callable[[], float],
) -> list[Row]:
    value, locations, weights = case.draw(device)
    leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    pull = torch.ones(case.rows, case.queries, case.heads * case.dim, device=device)

    def forward(name: str) -> None:
        with torch.no_grad():
            _sample(name, value, case, locations, weights)

    def training(name: str) -> None:
        out = _sample(name, leaves[0], case, leaves[1], leaves[2])
        torch.autograd.grad(out, leaves, pull)

    rows = []
    on_cpu = torch.device(device).type == "cpu"
    for step, call in (("forward", forward), ("training", training))[: 1 + case.training]:
        moved = case.moved * (3 if step == "training" else 1)
        for name, found in timed(partial(_finished, call, device), names, seconds, clock).items():
            if on_cpu and clock is time.perf_counter:
                found["bandwidth_share"] = moved / copy_bandwidth() / found["median_ms"] / 1e-3
            found["peak_mib"] = memory.peak_mib(partial(call, name)) if on_cpu else None
            rows.append(Row(case.name, name, step, error=errors[name], **found))
    return rows


@cache
def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 256 MiB in the CPU's memory, the best of five."""
    source, best = torch.zeros(2**28, dtype=torch.int8), float("inf")
    target = torch.empty_like(source)
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def timed(
    call: Callable[[str], None], names: Sequence[str], seconds: float, clock: Callable[[], float]
) -> dict[str, dict[str, Any]]:
    """{name: median_ms, spread, speedup over the first name, repeats} of `turns`."""
    times, figures = turns(call, names, seconds, clock), {}
    for name in names:
        low, middle, high = np.quantile(times[name], [0.2, 0.5, 0.8]).tolist()
        figures[name] = {
            "median_ms": middle * 1e3,
            "spread": (high - low) / middle,
            "speedup": statistics.median(map(truediv, times[names[0]], times[name])),
            "repeats": len(times[name]),
        }
    return figures


def turns(
    call: Callable[[str], None], names: Sequence[str], seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds per call of each name, taking turns until the time is up: repetition i of all is item i of each list."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        call(name)  # compiles, and warms caches
    order, end = list(names), clock() + seconds
    while len(times[names[0]]) < _LEAST_REPEATS or clock() < end:
        for name in order:
            start = clock()
            call(name)
            times[name].append(clock() - start)
        order.reverse()
    return times


def _finished(call: Callable[[str], None], device: torch.device | str, name: str) -> None:
    """The call, and what it started on a device."""
    call(name)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Hardware and versions that the figures hold for."""
    found: dict[str, Any] = {
        "device": _processor() if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if torch.device(device).type == "cuda":
        found |= {"cuda": torch.version.cuda, "driver": _driver()}
        if backends()["cuda"].available:
            import cupy

            found["cupy"] = cupy.__version__
    if backends()["numba"].available:
        import llvmlite
        import numba

        found |= {"numba": numba.__version__, "llvmlite": llvmlite.__version__, "cpu": numba.config.CPU_NAME or "host"}
    return found


def slug(device: torch.device | str = "cpu") -> str:
    """A file name for this machine's figures, such as "cpu-amd-epyc"."""
    kind = torch.device(device).type
    return f"{kind}-{re.sub(r'[^a-z0-9]+', '-', machine(device)['device'].lower()).strip('-')}"


def _driver() -> str:
    """Version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _processor() -> str:
    """The CPU's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()
