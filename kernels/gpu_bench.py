"""Benchmark of the kernel on a CUDA device against the peers that are there; writes JSON, a table and a plot.

    python kernels/gpu_bench.py OUTDIR [--seconds 60] [--peers .peers] [--all | --compile-only]

Place in the flow: `gpu_check.sh` runs it; the figures kept under `kernels/results/` are its JSON. It stops when the
time is up, so the cases stand in the order of their weight: the released model's first, in bf16 and fp32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mmi_kernels import bench_cuda, cuda_build
from mmi_kernels.bench import Case, machine
from mmi_kernels.bench_cuda import Figure, Trouble
from mmi_kernels.cuda_build import MMFS, SAMPLE, Spec

sys.path.insert(0, str(Path(__file__).parent))
import peers

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def unet(side: int, images: int, offsets: str = "near") -> Case:
    name = f"U-Net {side}², {images} images" + ("" if offsets == "near" else ", uniform")
    return Case(name, 1, (64, 32, 16, 8), images, 16, 64, side * side, 8, offsets)


def language(name: str, rows: int, queries: int, images: int) -> Case:
    label = f"{name} {rows}×{queries}, {images} images"
    return Case(label, rows, (32, 16, 8), images, 16, 64, queries, 8, training=queries > 1)


FIRST = (
    unet(64, 1),
    language("prefill", 1, 2048, 1),
    language("decode", 1, 1, 1),
    language("decode", 8, 1, 10),
    unet(32, 1),
    unet(8, 1),
    Case("toon image decoder", 64, (32, 16, 8, 4), 1, 4, 16, 256, 4),
    Case("adapter extractor", 8, (16,), 1, 16, 32, 1344, 4),
)
THEN = (
    unet(64, 4),
    language("prefill", 1, 256, 10),
    unet(64, 1, "uniform"),
    unet(16, 1),
    language("decode", 1, 1, 10),
    Case("adapter injector", 8, (32, 16, 8), 1, 16, 32, 256, 4),
    Case("toon language model", 16, (16, 8, 4), 5, 4, 16, 160, 4),
)
REST = (
    language("decode", 1, 1, 4),
    language("decode", 8, 1, 1),
    language("decode", 8, 1, 4),
    language("prefill", 1, 2048, 10),
    language("prefill", 1, 256, 1),
    *(unet(side, images) for side in (8, 16, 32) for images in (4, 10)),
    unet(64, 10),
)
COMPILED = ("U-Net 64², 1 images",)


def compile_ahead(cases: tuple[Case, ...], dtypes: tuple[torch.dtype, ...]) -> float:
    """Compile every specialisation the cases need, in threads; seconds it took."""
    start = time.monotonic()
    specs = {
        Spec(dtype, dtype, case.dim, case.points, mode, **more)
        for case in cases
        for dtype in dtypes
        for mode in (MMFS, SAMPLE)
        for more in ({}, {"split": True}, {"backward": True})
    }

    def compile_one(spec: Spec) -> None:
        with torch.cuda.device(0):
            cuda_build._kernel(spec, 0)

    compile_one(specs.pop())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(compile_one, specs))
    return time.monotonic() - start


def modules(seconds: float) -> list[dict[str, Any]]:
    """The engine's MMFS module, queries in and output out, with cached values: kernel and torch, wall time included."""
    from mmi_engine.model.config import MMFSConfig
    from mmi_engine.model.mmfs import MMFS as Module

    until, found = time.monotonic() + seconds, []
    llm, decoder = (32, 16, 8), (64, 32, 16, 8)
    for name, width, queries, images, levels, base in (
        ("LLM decode", 5120, 1, 4, llm, 16),
        ("LLM prefill 2048", 5120, 2048, 1, llm, 16),
        ("U-Net 64²", 320, 4096, 1, decoder, 64),
        ("U-Net 8²", 1280, 64, 1, decoder, 8),
    ):
        config = MMFSConfig(heads=16, points=8, width=1024, levels=levels, max_images=50, offset_init=3.0)
        module = Module(config, d_query=width, d_value=1024, d_out=width, base=base).cuda().to(BF16)
        shapes = [(side, side) for side in levels]
        cells = sum(h * w for h, w in shapes)
        query = torch.randn(1, queries, width, device="cuda", dtype=BF16)
        values = module.project_values(torch.randn(1, images, cells, 1024, device="cuda", dtype=BF16)).detach()
        reference = torch.rand(1, queries, 2, device="cuda")
        visible = torch.ones(1, images, dtype=torch.long, device="cuda")

        def call(query: torch.Tensor, values: torch.Tensor, module: Any = module, rest: Any = None) -> torch.Tensor:
            return module(query, rest[0], values, rest[1], rest[2])

        for backend in ("cuda", "torch"):
            if time.monotonic() > until:
                return found
            module.backend = backend
            rest = (reference, shapes, visible)
            leaves = [query.requires_grad_(), values.requires_grad_()]
            pull = torch.randn(1, queries, width, device="cuda", dtype=BF16)
            for step in ("forward", "training")[: 1 + (queries > 1)]:
                measured = bench_cuda.measure(lambda q, v, r=rest: call(q, v, rest=r), leaves, pull, step, "cuda")
                found.append({"module": name, "backend": backend, "step": step, **measured})
                if step == "forward":
                    with torch.no_grad():
                        found[-1] |= bench_cuda.launches(lambda r=rest, q=query, v=values: call(q, v, rest=r))
    return found


def table(figures: list[Figure], troubles: list[Trouble]) -> str:
    """Text: one line per figure, with the speed relative to the fastest peer of its case."""
    lines = [
        f"{'case':<28} {'dtype':<9}{'level':<10}{'step':<9}{'implementation':<17}{'ms':>9}{'±':>6}{'wall':>9}"
        f"{'MiB':>8}{'share':>7}{'error':>9}  mmi is"
    ]
    for figure in figures:
        same = [
            f
            for f in figures
            if (f.case, f.dtype, f.level, f.step) == (figure.case, figure.dtype, figure.level, figure.step)
        ]
        mine = next((f.median_ms for f in same if f.name == "mmi"), None)
        ratio = f"{figure.median_ms / mine:.2f}×" if mine and figure.name != "mmi" else ""
        lines.append(
            f"{figure.case:<28} {figure.dtype:<9}{figure.level:<10}{figure.step:<9}{figure.name:<17}"
            f"{figure.median_ms:>9.3f}{figure.spread:>6.0%}{figure.wall_ms:>9.3f}{figure.peak_mib:>8.0f}"
            f"{figure.bandwidth_share:>7.0%}{figure.error:>9.0e}  {ratio}"
        )
    lines += [f"{t.case:<28} {t.dtype:<9}{t.level:<10}{'':<9}{t.name:<17} {t.reason[:150]}" for t in troubles]
    return "\n".join(lines) + "\n"


def plot(figures: list[Figure], path: Path) -> None:
    """Speed of the kernel relative to every other implementation, op level, bars per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [f for f in figures if f.level == "op" and f.dtype == "bfloat16"]
    cases = list(dict.fromkeys((f.case, f.step) for f in chosen))
    names = [name for name in dict.fromkeys(f.name for f in chosen) if name != "mmi"]
    if not cases:
        return
    figure, axes = pyplot.subplots(figsize=(11, 0.34 * len(cases) * max(1, len(names)) / 2 + 2))
    for i, name in enumerate(names):
        for j, (case, step) in enumerate(cases):
            times = {f.name: f.median_ms for f in chosen if (f.case, f.step) == (case, step)}
            if name in times and "mmi" in times:
                label = name if j == 0 else None
                axes.barh(
                    j + i * 0.8 / len(names), times[name] / times["mmi"], 0.8 / len(names), color=f"C{i}", label=label
                )
    axes.set_yticks(range(len(cases)), [f"{case}, {step}" for case, step in cases])
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time relative to the kernel (bf16, op level; above 1 the kernel is faster)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def driver() -> str:
    """Version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="stop measuring after this time")
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    parser.add_argument("--all", action="store_true", help="all shapes, in all three dtypes")
    parser.add_argument("--compile-only", action="store_true", help="fill CuPy's cache and stop")
    options = parser.parse_args()
    if options.compile_only:
        compile_ahead(FIRST + THEN, (BF16, FP32))
        return 0
    until = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    samplers = dict(peers.find(options.peers))
    compiling = compile_ahead(FIRST + THEN, (BF16, FP32))
    triton = {"msda-triton": samplers.pop("msda-triton")} if "msda-triton" in samplers else {}
    rounds: list[tuple[tuple[Case, ...], tuple[torch.dtype, ...], tuple[str, ...], dict, tuple[str, ...]]] = [
        (FIRST, (BF16, FP32), ("op", "attention"), samplers, ()),
        (THEN, (BF16, FP32), ("op",), samplers, ()),
        (FIRST[:3], (FP32,), ("op",), triton, ()),
        (FIRST[:1], (BF16,), ("op",), {}, COMPILED),
        (FIRST, (FP16,), ("op",), samplers, ()),
    ]
    if options.all:
        rounds.append((REST, (BF16, FP32, FP16), ("op", "attention"), samplers, COMPILED))
        rounds.append((THEN, (BF16, FP32, FP16), ("attention",), samplers, ()))
    found: list[Figure | Trouble] = []
    result: dict[str, Any] = {"machine": machine("cuda") | {"driver": driver(), "cuda": torch.version.cuda}}
    import cupy

    result["machine"]["cupy"] = cupy.__version__
    result["copy_gb_per_s"] = bench_cuda.copy_bandwidth("cuda") / 1e9
    result["compiled_ahead_s"] = compiling
    result["modules"] = []

    def save() -> None:
        result.update(bench_cuda.rows(found))
        (options.out / "bench.json").write_text(json.dumps(result, indent=1), encoding="utf-8")

    for i, (cases, dtypes, levels, others, compiled) in enumerate(rounds):
        for row in bench_cuda.run(cases, dtypes, levels, others, until=until, compiled=compiled):
            found.append(row)
        save()
        if i == 0 and time.monotonic() < until:
            try:
                result["modules"] = modules(10.0)
            except Exception as error:  # the rest is worth having all the same
                result["modules"] = [{"error": repr(error)}]
            save()
    figures = [row for row in found if isinstance(row, Figure)]
    text = table(figures, [row for row in found if isinstance(row, Trouble)])
    text += "\n".join(json.dumps(row) for row in result["modules"]) + "\n"
    (options.out / "bench.txt").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    plot(figures, options.out / "bench.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
