"""Texts and pictures with and without `--cuda-graphs`: time per token and per denoising step, and whether they agree.

    python benchmarks/graphs.py --out graphs.json [--models toon,medium] [--makes text,image] [--tokens 32] [--steps 20]
    python benchmarks/graphs.py --compile --device cpu --models toon [--threads 1 --clock processor]   # texts

On a CUDA device in bf16: the embedded model, and a random one of 245 million weights (`model_memory.py`'s "medium").
Both forms in turns in one process, the first run of each left out (it compiles and records). Prints a table, writes
device, versions and figures as JSON. With `--device cpu` the steps over buffers are called, not recorded: for trying
this script out. With `--compile` texts alone, and instead of being recorded the step is compiled as the option of that
name does it, on any device, and also compared with the library's own forward pass ("library_ms"), which
`generate/step.py` replaces on a CPU; "first_s", seconds of a case's first run, tells what compiling took. The JSON is
written anew after every case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("benchmarks", ".", "engine", "kernels")]

import torch  # noqa: E402

from mmi_engine import generate_bench  # noqa: E402
from mmi_engine.generate.compiled import CompiledToken  # noqa: E402
from mmi_engine.generate.graphs import Graphs  # noqa: E402
from mmi_engine.generate.reuse import Reuse  # noqa: E402
from mmi_engine.kernel_bench import device_of  # noqa: E402
from mmi_engine.versions import versions  # noqa: E402


def cases(tokens: int, steps: int) -> list[generate_bench.Case]:
    """Texts of one and eight rows after 0, 1 and 4 pictures, pictures of one and eight rows."""
    case = generate_bench.Case
    found = [
        case("text", "images", "text", images=images, tokens=tokens, batch=rows, items=rows)
        for rows in (1, 8)
        for images in (0, 1, 4)
    ]
    return found + [case("picture", "images", "image", steps=steps, batch=rows, items=rows) for rows in (1, 8)]


def load(name: str, device: str, threads: int | None) -> Any:
    """The embedded model, or a random one."""
    if name == "toon":
        return generate_bench.load(name, device, threads)
    from model_memory import make

    with tempfile.TemporaryDirectory() as folder:
        make(name, Path(folder) / name)
        return generate_bench.load(str(Path(folder) / name), device, threads)


def measure(
    model: Any, case: generate_bench.Case, repeats: int, compiled: Callable[..., Any] | None, ticks: Callable[[], float]
) -> dict[str, Any]:
    """Milliseconds per token or step of both forms, their ratio, and what differs between what they made."""
    graphs = Graphs(model.device, compiled)
    per = case.tokens - 1 if case.make == "text" else case.steps
    other = "compiled" if compiled else "graphs"
    seconds: dict[str, list[float]] = {"plain": [], **({"library": []} if compiled else {}), other: []}
    made: dict[str, Any] = {}
    first = 0.0
    for number in range(1 + repeats):
        for form in seconds:
            model.graphs = graphs if form == other else None
            model.language.lean = form != "library"
            taken, stages, made[form] = generate_bench.once(model, case, Reuse(), ticks)
            if number:
                seconds[form].append(stages["text" if case.make == "text" else "denoise"] / per)
            elif form == other:
                first = taken
    model.graphs, model.language.lean = None, True
    times = {f"{form}_ms": 1000 * statistics.median(taken) for form, taken in seconds.items()}
    return {
        "makes": case.make,
        "batch": case.batch,
        "images": case.images,
        **times,
        "ratio": times["plain_ms"] / times[f"{other}_ms"],
        "recordings": graphs.made,
        "first_s": first,
        "differ": generate_bench.apart(made["plain"], made[other]),
    }


def say(line: str) -> None:
    """To stdout at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """See module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="toon,medium")
    parser.add_argument("--makes", default="text,image")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    makes = ["text"] if options.compile else options.makes.split(",")
    other = "compiled" if options.compile else "graphs"
    ticks = {"wall": time.perf_counter, "processor": time.process_time}[options.clock]
    device, start = device_of(options.device), time.perf_counter()
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
    say(f"{name}, torch {torch.__version__}")
    say(f"{'model':8} {'makes':6} {'batch':>5} {'images':>6} {'plain ms':>9} {other + ' ms':>11} {'ratio':>6}  differ")
    figures: list[dict[str, Any]] = []
    result = {"device": name, "torch": torch.__version__, "versions": versions(), "clock": options.clock}
    result["figures"] = figures
    for model_name in options.models.split(","):
        model = load(model_name, device, options.threads)
        compiled = CompiledToken("inductor") if options.compile else None
        # Compiles the kernels, so that the first case's figures hold none of that.
        generate_bench.once(model, replace(cases(2, 1)[0], make="story", images=1), Reuse(), time.perf_counter)
        for case in cases(options.tokens, options.steps):
            if case.make not in makes:
                continue
            found = {"model": model_name, **measure(model, case, options.repeats, compiled, ticks)}
            figures.append(found)
            row = "{model:8} {makes:6} {batch:5} {images:6} {plain_ms:9.3f} {faster:11.3f} {ratio:6.2f}  {differ}"
            say(row.format(**found, faster=found[f"{other}_ms"]))
            result["seconds"] = time.perf_counter() - start
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    say(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
