"""`mmi bench`: how fast the sampling kernels and generation are on this machine, checked as they are timed."""

from __future__ import annotations

from pathlib import Path

import click

from mmi_cli import console
from mmi_cli.options import SETTINGS, DeviceType, message_options


@click.group("bench", context_settings=SETTINGS)
def bench() -> None:
    """Measure parts of this installation."""


@bench.command(
    "kernel", context_settings=SETTINGS, epilog="Example:\n\n  mmi bench kernel --seconds 30 --out kernel.json"
)
@click.option("--device", type=DeviceType(), default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--level",
    "levels",
    type=click.Choice(["op", "attention", "module"]),
    multiple=True,
    help="What to time; may be repeated.  [default: all the device has]",
)
@click.option("--case", "pattern", default="", metavar="TEXT", help="Only cases whose name contains TEXT.")
@click.option("--seconds", type=click.FloatRange(0), default=60.0, show_default=True, help="About how long to measure.")
@click.option(
    "--clock",
    type=click.Choice(["wall", "processor"]),
    default="wall",
    show_default=True,
    help="processor: this process's own time, for a CPU that others use too (with OMP_NUM_THREADS=1).",
)
@click.option("--large", is_flag=True, help="On a CPU also the largest shapes: minutes, and up to 14 GiB of memory.")
@click.option("--compiled", is_flag=True, help="Also time torch under torch.compile (needs a C++ compiler; slow).")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout instead of the table.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the JSON here.")
@click.option(
    "--plot", "picture", type=click.Path(path_type=Path), metavar="FILE", help="Write a plot (PNG, SVG, PDF)."
)
@message_options
def kernel(
    device: str,
    levels: tuple[str, ...],
    pattern: str,
    seconds: float,
    clock: str,
    large: bool,
    compiled: bool,
    as_json: bool,
    out: Path | None,
    picture: Path | None,
) -> int:
    """Verify the sampling kernels against float64, then time them.

    On a CPU numba against torch (grid_sample), on a CUDA device the CUDA kernel against torch, in float32 and bf16.
    "op" takes finished locations and weights, "attention" makes them from projected queries, "module" is a whole
    MMFS layer. Ratios in brackets are times over the kernel's: above 1 the kernel is faster. Read those, not the
    milliseconds, on a busy machine. A kernel that computes something else is not timed, and the exit code is 1.
    """
    from mmi_engine import kernel_bench

    terminal = console.current()
    result = kernel_bench.run(
        kernel_bench.device_of(device),
        seconds=seconds,
        compiled=compiled,
        levels=levels,
        pattern=pattern,
        clock=clock,
        large=large,
        on_case=terminal.notice,
    )
    if as_json:
        terminal.json(result)
    else:
        terminal.out(f"{result['machine']['device']}, torch {result['machine']['torch']}")
        header, *rows = kernel_bench.table(result["figures"])
        terminal.table(rows, header=header)
    for trouble in result["troubles"]:
        terminal.warning(f"{trouble['case']}, {trouble['dtype']}, {trouble['name']}: {trouble['reason']}")
    kernel_bench.write(result, out, picture)
    return 1 if result["troubles"] else 0


@bench.command(
    "generate", context_settings=SETTINGS, epilog="Example:\n\n  mmi bench generate --quick --out speed.json"
)
@click.option("--model", default="toon", show_default=True, metavar="M", help="toon or a model directory.")
@click.option("--device", type=DeviceType(), default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="CPU threads.  [default: OMP_NUM_THREADS, else the physical cores]",
)
@click.option("--quick", is_flag=True, help="Fewer tokens and denoising steps, one repetition.")
@click.option("--only", default="", metavar="NAMES", help="Only these cases, as the table names them: story,token.")
@click.option(
    "--clock",
    type=click.Choice(["wall", "processor"]),
    default="wall",
    show_default=True,
    help="processor: this process's own time, for a CPU that others use too (with --threads 1).",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout instead of the table.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the JSON here, after every case.")
@click.option(
    "--plot", "picture", type=click.Path(path_type=Path), metavar="FILE", help="Write a plot (PNG, SVG, PDF)."
)
@message_options
def generate(
    model: str,
    device: str,
    threads: int | None,
    quick: bool,
    only: str,
    clock: str,
    as_json: bool,
    out: Path | None,
    picture: Path | None,
) -> int:
    """Time generation as the commands do it, and as the released engine does it.

    Text after 1, 4 and 8 pictures and after short and long texts, pictures after 1, 4 and 8, more steps, more pictures
    seen by the U-Net, batches of eight, more items, stories. Each is made three times with the same weights: "kept", as
    the commands do it; "again", with pictures encoded, MMFS values projected and contexts read again wherever the
    released engine does so; "literal", that with the released engine's arithmetic of MMFS as well. In brackets the time
    over that of "kept". Where they make different texts or pictures, a warning says so and the exit code is 1.
    """
    from mmi_engine import generate_bench, kernel_bench

    terminal = console.current()
    todo = generate_bench.choose(generate_bench.cases(quick), only)
    loaded = generate_bench.load(model, kernel_bench.device_of(device), threads)
    result = generate_bench.run(
        loaded,
        todo,
        repeats=1 if quick else 3,
        clock=clock,
        on_case=terminal.notice,
        on_result=lambda known: generate_bench.write(known, out, None),
    )
    if as_json:
        terminal.json(result)
    else:
        peak = result["peak_bytes"] / 2**20
        terminal.out(f"{result['model']} on {result['machine']['device']}, at most {peak:.0f} MiB")
        header, *rows = generate_bench.table(result["figures"])
        terminal.table(rows, header=header)
    for trouble in result["troubles"]:
        terminal.warning(f"{trouble['sweep']}, {trouble['value']} {trouble['x']}: {trouble['reason']}")
    generate_bench.write(result, None, picture)
    return 1 if result["troubles"] else 0
