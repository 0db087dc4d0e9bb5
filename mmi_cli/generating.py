"""What all generating commands do with their options: build manifest, engine and run, report, return the exit code.

Place in the flow: `commands/story.py` and its sisters differ in their task and their options; the rest is here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mmi_cli import console, launch
from mmi_engine.errors import Interrupted, StoppedError, UsageError

if TYPE_CHECKING:
    from mmi_engine.data.images import ImageLoader
    from mmi_engine.data.manifest import Manifest
    from mmi_engine.run import RunOptions, Summary
    from mmi_engine.tasks import Task

# options that are fields of generate.settings.Settings; None leaves the model's or the task's default
SETTINGS = (
    "steps",
    "guidance",
    "scheduler",
    "beams",
    "temperature",
    "top_p",
    "max_new_tokens",
    "min_new_tokens",
    "repetition_penalty",
)
ORIGINS = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT: "default",
    ParameterSource.DEFAULT_MAP: "config",
    ParameterSource.PROMPT: "command line",
}


def generate(task: Task, options: dict[str, Any]) -> int:
    """Run a generating command.

    Args:
        task: what the rows ask for.
        options: the command's parameters by name, as the groups in `options.py` define them.

    Returns:
        the process's exit code.
    """
    from mmi_engine.data.images import ImageLoader
    from mmi_engine.data.manifest import Manifest

    if options["out"] == "-" and task.makes_images:
        raise UsageError(
            f"mmi {task.name} makes pictures, which do not fit on stdout", remedy="name a folder: --out DIR"
        )
    given, out = Path(options["manifest"]), options["out"]
    if options.get("draw") and out not in (None, "-") and given.is_dir() and given.resolve() == Path(out).resolve():
        raise UsageError(
            f"--out {out} is the folder of the pictures, where those with boxes would become rows",
            remedy=f"name another, such as --out {given / 'boxes'}",
        )
    launch.check(console.current().warning, streaming=options["out"] == "-")
    if launch.ranks()[0] > 0:
        console.current().progress = False  # one bar is enough; the first process draws it
    manifest = Manifest(options["manifest"], root=options["root"], column=task.column)
    loader = ImageLoader(manifest.root, allow_urls=options["allow_urls"])
    run_options = _run_options(options)
    if options["dry_run"]:
        return _dry_run(task, manifest, loader, run_options, options)
    if options["out"] is None:
        raise UsageError("Missing option '--out'", remedy="name the output folder: --out DIR")
    return _run(task, manifest, loader, run_options, options)


def _run(
    task: Task,
    manifest: Manifest,
    loader: ImageLoader,
    run_options: RunOptions,
    options: dict[str, Any],
) -> int:
    from mmi_engine.run import run
    from mmi_engine.stream import StreamOut

    terminal = console.current()
    reporter = console.RunReporter(terminal, task.name)
    engine = make_engine(options, task.decoding)
    target = StreamOut(sys.stdout.buffer) if options["out"] == "-" else Path(options["out"])
    try:
        summary = run(task, manifest, target, engine, run_options, loader=loader, reporter=reporter)
    except (Interrupted, StoppedError) as stop:
        reporter.end()
        if isinstance(stop, StoppedError):
            terminal.error(stop)
        else:
            terminal.warning(str(stop))
        return stop.exit_code
    finally:
        reporter.end()
    _summarise(summary, target if isinstance(target, Path) else None, run_options)
    return summary.exit_code


def make_engine(options: dict[str, Any], decoding: str) -> Any:
    """The engine that the options describe; nothing is loaded yet."""
    from mmi_engine.choices import Choices
    from mmi_engine.engine import ModelEngine

    named = {name: options[name] for name in SETTINGS if options.get(name) is not None}
    choices = Choices(
        model=options["model"],
        device=options["device"],
        dtype=options["dtype"],
        kernel=options["kernel"],
        threads=options["threads"],
        batch_size=options["batch_size"],
        fast=options.get("fast", False),
        writes="max_new_tokens" in options,
        draws="steps" in options,
        compile=options.get("compile", False),
        cuda_graphs=options.get("cuda_graphs", False),
        batching=options.get("batching", "fixed"),
        llm_bits=int(options["llm_bits"]) if options.get("llm_bits") else None,
        device_map=options.get("device_map"),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        decoding=decoding,
        settings=named,
        origins=_origins(),
    )
    return ModelEngine(choices, console.current().once)


def _origins() -> dict[str, str]:
    """Where each option's value comes from; those left to model and machine are not in it."""
    context = click.get_current_context()
    found = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is not None and value is not None and source != ParameterSource.DEFAULT:
            found[name] = ORIGINS[source]
    return found


def _run_options(options: dict[str, Any]) -> RunOptions:
    from mmi_engine.locks import Part
    from mmi_engine.run import RunOptions

    shard = options["shard"]
    rank, world = launch.ranks()
    return RunOptions(
        seed=options["seed"],
        part=Part(shard.shard, shard.shards, rank, world),
        limit=options["limit"],
        ids=options["ids"],
        overwrite=options["overwrite"],
        retry_errors=options["retry_errors"],
        stop_on_error=options["on_error"] == "stop",
        gallery=not options["no_gallery"],
        origins=_origins(),
    )


def _dry_run(
    task: Task, manifest: Manifest, loader: ImageLoader, run_options: RunOptions, options: dict[str, Any]
) -> int:
    from mmi_engine.check import check
    from mmi_engine.model_info import describe
    from mmi_engine.outdir import Entry
    from mmi_engine.run import select

    terminal = console.current()
    order = [Entry(row.line, row.id, row.error is None) for row in manifest.rows()]
    shown = 0

    def on_error(place: str, error: Any) -> None:
        nonlocal shown
        terminal.item_error(place, error, shown)
        shown += 1

    report = check(manifest, task, loader, lines=select(order, run_options), on_error=on_error)
    info = describe(options["model"])
    need = {dtype: f"{info.memory_bytes(dtype) / 2**20:.0f} MiB" for dtype in ("fp32", "bf16")}
    terminal.event(
        "dry_run",
        f"{report.rows} rows, {report.failed} would fail; {report.images} images read, {report.generated} pieces to "
        f"generate; {options['model']} needs about {need['fp32']} in fp32, {need['bf16']} in bf16",
        rows=report.rows,
        failed=report.failed,
        errors=dict(report.errors),
    )
    return report.exit_code


def _summarise(summary: Summary, out: Path | None, options: RunOptions) -> None:
    terminal = console.current()
    part = options.part
    who = f"process {part.rank + 1} of {part.world}: " if part.world > 1 else ""
    text = f"{who}{summary.done} of {summary.total} done"
    if summary.failed:
        codes = ", ".join(f"{code} {count}" for code, count in sorted(summary.errors.items()))
        text += f", {summary.failed} failed" + (f" ({codes})" if codes else "") + ("; see errors.jsonl" if out else "")
        if not codes:
            text += ", --retry-errors tries again"
    if out is None:
        pass
    elif summary.merged:
        text += f" → {out / 'index.html' if options.gallery else out}"
    else:
        text += f" → {out} (other parts still have items to do)"
    fields = {"done": summary.done, "failed": summary.failed, "total": summary.total, "errors": dict(summary.errors)}
    terminal.event("summary", text, always=bool(summary.failed), **fields)
