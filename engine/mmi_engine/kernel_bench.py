"""Benchmark of the sampling kernels: runs it for a device, and turns its figures into a table and a plot.

Place in the flow: `mmi bench kernel` and `kernels/gpu_bench.py` come here. `mmi_kernels.bench` (CPU) and
`mmi_kernels.bench_cuda` verify and time the operation itself; the module level, queries in and output out of a whole
MMFS layer, is timed here because the layer is the engine's.

A figure is a dictionary with at least case, dtype, level ("op", "attention" or "module"), step ("forward" or
"training" = forward + backward), name (the implementation) and median_ms. The implementation of this project is called
"mmi" in every figure of a CUDA device and "numba" on a CPU; ratios are times over its time, so above 1 it is faster.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mmi_engine.errors import BackendError, DeviceError, OutputError, UsageError

Figure = dict[str, Any]

OURS = ("mmi", "numba")
_DETAILS = {
    "spread": ("spread", "{:.0%}"),
    "bandwidth_share": ("of copy speed", "{:.0%}"),
    "peak_mib": ("MiB", "{:.1f}"),
}
_COLUMNS = ("torch", "torch compiled", "deformable-detr", "msda-triton")


def device_of(wanted: str) -> str:
    """ "cpu" or "cuda:N" for auto, cpu, cuda or cuda:N. Raises DeviceError if it is not there."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not count):
        return "cpu"
    index = int(wanted.partition(":")[2] or 0) if wanted.startswith("cuda") else 0
    if index >= count:
        found = f"{count} CUDA devices" if count else "no CUDA device"
        raise DeviceError(f"--device {wanted}: {found} here", remedy="use --device cpu or auto; see mmi doctor")
    return f"cuda:{index}"


def run(
    device: str = "cpu",
    *,
    seconds: float = 60.0,
    compiled: bool = False,
    levels: Sequence[str] = (),
    pattern: str = "",
    clock: str = "wall",
    large: bool = False,
    on_case: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Verify, then time. Returns {"machine", "figures", "troubles"}, ready for JSON.

    Args:
        device: as :func:`device_of` returns it.
        seconds: about how long to measure altogether; every figure is a median of at least five repetitions.
        compiled: also time torch under `torch.compile`, which needs a C++ compiler and is slow to start.
        levels: what to time, of "op", "attention" and "module"; default all.
        pattern: only cases whose name contains it.
        clock: "wall", or "processor" (on a CPU): the process's own time, to be used with one thread.
        large: on a CPU, also the shapes that take torch seconds a call; a CUDA device always gets them.
        on_case: called with the name of each case when its first figure is there.

    Raises:
        UsageError: no such level, or no case of that name.
        BackendError: there is no kernel to measure on the CUDA device.
    """
    from mmi_kernels.bench import machine

    has = ("op", "attention", "module")
    if not set(levels) <= set(has):
        raise UsageError(f"--level {' '.join(levels)}: there are {', '.join(has)}")
    levels = [level for level in has if level in (levels or has)]
    result: dict[str, Any] = {"machine": machine(device), "clock": clock, "figures": [], "troubles": []}
    rows: list[Iterator[Figure]] = []
    if levels != ["module"]:
        share = seconds * (0.8 if "module" in levels else 1.0)
        operations = (partial(_cpu, clock, large) if device == "cpu" else partial(_cuda, device))(
            levels, share, compiled, pattern
        )
        rows.append(operations)
    if "module" in levels:
        rows.append(modules(device, seconds / (5 if len(levels) > 1 else 1), pattern=pattern, clock=clock))
    seen = ""
    for row in chain(*rows):
        result["troubles" if "reason" in row else "figures"].append(row)
        if on_case is not None and seen != (seen := f"{row['case']}, {row['level']}"):
            on_case(seen)
    if not result["figures"] and not result["troubles"]:
        raise UsageError(f"no case is named {pattern!r}", remedy="leave --case out to see all")
    return result


def write(result: dict[str, Any], out: Path | None, picture: Path | None) -> None:
    """JSON and plot into files, where asked for. Raises OutputError."""
    try:
        if out is not None:
            out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if picture is not None:
            plot(result["figures"], picture, title=f"{result['machine']['device']}: time over ours (above 1: faster)")
    except (OSError, ValueError) as error:
        raise OutputError(f"the figures cannot be written: {error}", remedy="choose another file") from error


def _cpu(
    clock: str, large: bool, levels: Sequence[str], seconds: float, compiled: bool, pattern: str
) -> Iterator[Figure]:
    from mmi_kernels import backends, bench, bench_attention

    cases = [case for case in bench.CASES if pattern in case.name and (large or not case.large)]
    names = ["torch", *(["numba"] if backends()["numba"].available else []), *([bench.COMPILED] if compiled else [])]
    todo = [(level, case) for level in levels if level != "module" for case in cases]
    for level, case in todo:
        where, share = {"level": level, "dtype": "float32"}, seconds / len(todo) / 2
        try:
            if level == "op":
                rows = bench.run([case], names=names, seconds=share, clock=clock)["rows"]
                yield from ({**where, "name": row.pop("backend"), **row} for row in rows)
            else:
                known = [name for name in names if name != bench.COMPILED]
                yield from (where | row for row in bench_attention.run([case], known, seconds=share, clock=clock))
        except bench.VerificationError as error:
            yield {**where, "case": case.name, "name": "numba", "reason": str(error)}


def _cuda(device: str, levels: Sequence[str], seconds: float, compiled: bool, pattern: str) -> Iterator[Figure]:
    import torch

    from mmi_kernels import KernelUnavailable, bench, bench_cuda, resolve

    try:
        resolve("cuda", device)
    except KernelUnavailable as error:
        raise BackendError(str(error)) from error
    cases = [case for case in bench.CASES if pattern in case.name]
    with torch.cuda.device(device):
        for row in bench_cuda.run(
            cases,
            (torch.float32, torch.bfloat16),
            [level for level in levels if level != "module"],
            {},
            device=device,
            until=time.monotonic() + seconds,
            compiled=[case.name for case in cases] if compiled else (),
        ):
            yield asdict(row)


# name, d_query, queries, images, levels, base: layers of the released model; the CPU takes fewer queries
_LAYERS = (
    ("LLM decode", 5120, 1, 4, (32, 16, 8), 16),
    ("LLM prefill 2048", 5120, 2048, 1, (32, 16, 8), 16),
    ("U-Net 64²", 320, 4096, 1, (64, 32, 16, 8), 64),
    ("U-Net 8²", 1280, 64, 1, (64, 32, 16, 8), 8),
)
_CPU_LAYERS = (_LAYERS[0], ("U-Net 16²", 1280, 256, 1, (64, 32, 16, 8), 16), _LAYERS[3])


def modules(device: str, seconds: float, *, pattern: str = "", clock: str = "wall") -> Iterator[Figure]:
    """An MMFS layer with cached values, by the kernel and by torch: bf16 on CUDA, fp32 on a CPU."""
    import torch

    from mmi_engine.model.config import MMFSConfig
    from mmi_engine.model.mmfs import MMFS

    on_cpu = torch.device(device).type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    layers = [layer for layer in (_CPU_LAYERS if on_cpu else _LAYERS) if pattern in layer[0]]
    for name, width, queries, images, levels, base in layers:
        config = MMFSConfig(heads=16, points=8, width=1024, levels=levels, max_images=50, offset_init=3.0)
        module = MMFS(config, d_query=width, d_value=1024, d_out=width, base=base).to(device, dtype).eval()
        shapes = [(side, side) for side in levels]
        cells = sum(h * w for h, w in shapes)
        query = torch.randn(1, queries, width, device=device, dtype=dtype)
        features = torch.randn(1, images, cells, 1024, device=device, dtype=dtype)
        leaves = [query.requires_grad_(), module.project_values(features).detach().requires_grad_()]
        reference, visible = (
            torch.rand(1, queries, 2, device=device),
            torch.ones(1, images, dtype=torch.long).to(device),
        )

        def call(query: Any, values: Any, rest: Any = (module, reference, shapes, visible)) -> Any:
            return rest[0](query, rest[1], values, *rest[2:])

        where = {"case": name, "dtype": str(dtype).removeprefix("torch."), "level": "module"}
        share = seconds / len(layers) / 4
        for step in ("forward", "training")[: 1 + (queries > 1)]:
            found = (partial(_in_turns, clock=clock) if on_cpu else _on_device)(module, call, leaves, step, share)
            yield from (where | {"step": step} | figure for figure in found)


def _on_device(module: Any, call: Callable[..., Any], leaves: list[Any], step: str, seconds: float) -> list[Figure]:
    """By torch and by the kernel: device time, memory and launches."""
    import torch

    from mmi_kernels import bench_cuda

    figures = []
    for backend in ("torch", "cuda"):
        module.backend = backend
        pull = torch.ones_like(call(*leaves).detach())
        found = bench_cuda.measure(call, leaves, pull, step, str(pull.device))
        if step == "forward":
            with torch.no_grad():
                found |= bench_cuda.launches(lambda: call(*leaves))
        figures.append({"name": "mmi" if backend == "cuda" else backend} | found)
    return figures


def _in_turns(
    module: Any, call: Callable[..., Any], leaves: list[Any], step: str, seconds: float, *, clock: str
) -> list[Figure]:
    """By torch and numba (where it is there), turn about, as `mmi_kernels.bench` times the operation."""
    import torch

    from mmi_kernels import backends, bench

    pull = torch.ones_like(call(*leaves).detach())

    def once(backend: str) -> None:
        module.backend = backend
        with torch.set_grad_enabled(step == "training"):
            out = call(*leaves)
        if step == "training":
            torch.autograd.grad(out, leaves, pull)

    names = ["torch", *(["numba"] if backends()["numba"].available else [])]
    return [{"name": name} | found for name, found in bench.timed(once, names, seconds, bench.CLOCKS[clock]).items()]


def compared(figures: Sequence[Figure]) -> list[tuple[tuple[str, str, str, str], dict[str, float], dict[str, float]]]:
    """((level, case, dtype, step), {name: ms}, {name: time over ours}) in the order of the figures, levels together.

    Where implementations took turns, the ratio is the median of the turns' ratios, else that of the medians.
    """
    found: dict[tuple[str, str, str, str], dict[str, Figure]] = {}
    for figure in figures:
        key = (figure["level"], figure["case"], figure["dtype"], figure["step"])
        found.setdefault(key, {})[figure["name"]] = figure
    order = {level: i for i, level in enumerate(("attention", "op", "module"))}
    rows = []
    for key, by_name in sorted(found.items(), key=lambda item: order.get(item[0][0], 9)):
        times = {name: figure["median_ms"] for name, figure in by_name.items()}
        own = next((by_name[name] for name in OURS if name in by_name), None)
        ratios = {name: time / own["median_ms"] for name, time in times.items()} if own else {}
        if own and "torch" in ratios and "speedup" in own:
            ratios["torch"] = own["speedup"]
        rows.append((key, times, ratios))
    return rows


def table(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    """Rows of text, the first a header: milliseconds, and in brackets the time over ours (above 1: ours is faster).

    Of ours also what was measured of spread, share of the copy bandwidth and memory.
    """
    groups = compared(figures)
    present = {name for _, times, _ in groups for name in times}
    others = [name for name in (*_COLUMNS, *sorted(present - {*_COLUMNS, *OURS})) if name in present]
    mine = next((name for name in OURS if name in present), None)
    own = {(f["level"], f["case"], f["dtype"], f["step"]): f for f in figures if f["name"] == mine}
    more = {name: form for name, form in _DETAILS.items() if any(f.get(name) is not None for f in own.values())}
    head = [f"{mine} ms", *(label for label, _ in more.values())] if mine else []
    rows: list[tuple[str, ...]] = [("level", "case", "dtype", "step", *head, *others)]
    for key, times, ratios in groups:
        cells = [f"{times[mine]:.3f}" if mine in times else "–"] if mine else []
        for name, (_, form) in more.items():
            value = own.get(key, {}).get(name)
            cells.append("–" if value is None else form.format(value))
        for name in others:
            ratio = f" ({ratios[name]:.2f}×)" if name in ratios else ""
            cells.append(f"{times[name]:.3f}{ratio}" if name in times else "–")
        rows.append((*key, *cells))
    return rows


def markdown(figures: Sequence[Figure]) -> str:
    """`table` as Markdown."""
    header, *rest = table(figures)
    lines = ["| " + " | ".join(row) + " |" for row in (header, tuple("---" for _ in header), *rest)]
    return "\n".join(lines) + "\n"


def plot(figures: Sequence[Figure], path: Path, *, title: str = "") -> None:
    """Time of every other implementation over ours: one panel per dtype and step, of the level the model calls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = compared(figures)
    level = groups[0][0][0] if groups else "op"
    groups = [group for group in groups if group[0][0] == level and group[2]]
    dtypes = [d for d in ("float32", "bfloat16") if any(key[2] == d for key, _, _ in groups)]
    steps = [s for s in ("forward", "training") if any(key[3] == s for key, _, _ in groups)]
    if not dtypes or not steps:
        return
    names = [n for n in _COLUMNS if any(n in times for _, times, _ in groups)]
    cases = list(dict.fromkeys(key[1] for key, _, _ in groups))
    size = (5.5 * len(steps) + 2, (0.42 * len(cases) + 1) * len(dtypes) + 0.8)
    figure, panels = pyplot.subplots(len(dtypes), len(steps), figsize=size, squeeze=False, sharex=True, sharey=True)
    for i, dtype in enumerate(dtypes):
        for j, step in enumerate(steps):
            axes = panels[i][j]
            _bars(axes, {key[1]: ratios for key, _, ratios in groups if key[2:] == (dtype, step)}, cases, names)
            axes.set_title(f"{dtype}, {'forward' if step == 'forward' else 'forward + backward'}", fontsize=10)
    panels[0][0].invert_yaxis()
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(names))]
    figure.legend(handles, names, loc="lower center", ncols=len(names), frameon=False)
    figure.suptitle(title or f"{level} level: time over ours, above 1 ours is faster")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axes: Any, ratios: dict[str, dict[str, float]], cases: list[str], names: list[str]) -> None:
    """One panel: horizontal bars from 1, in the colour of each implementation."""
    thick = 0.8 / max(len(names), 1)
    for row, case in enumerate(cases):
        for i, name in enumerate(names):
            ratio = ratios.get(case, {}).get(name)
            if ratio:
                place = row - 0.4 + (i + 0.5) * thick
                axes.barh(place, ratio - 1, thick, left=1, color=f"C{i}")
                axes.text(max(ratio, 1) * 1.04, place, f"{ratio:.1f}×", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
