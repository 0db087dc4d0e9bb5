"""Benchmark of the kernel on a CUDA device against the peers that are there; writes JSON, a table and a plot.

    python kernels/gpu_bench.py OUTDIR [--seconds 60] [--peers .peers] [--all | --compile-only]

Place in the flow: `gpu_check.sh` runs it; the figures kept under `kernels/results/` are its JSON. It stops when the
time is up, so the cases stand in the order of their weight: the released model's first, in bf16 and fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mmi_engine import kernel_bench
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
    result: dict[str, Any] = {"machine": machine("cuda")}
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
                result["modules"] = list(kernel_bench.modules("cuda", 10.0))
            except Exception as error:  # the rest is worth having all the same
                result["module_error"] = repr(error)
            save()
    figures = [*result["figures"], *result["modules"]]
    text = kernel_bench.markdown(figures)
    text += "\n".join(
        f"{t['case']}, {t['dtype']}, {t['level']}, {t['name']}: {t['reason']}" for t in result["troubles"]
    )
    (options.out / "bench.md").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    kernel_bench.plot(figures, options.out / "bench.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
