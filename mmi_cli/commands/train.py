"""`mmi train`: pre-train or fine-tune by a named recipe."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from mmi_cli import console
from mmi_cli.options import SETTINGS, message_options
from mmi_engine.errors import UsageError

EXAMPLE = """
\b
Example:
  mmi train --recipe toon_vae --out runs/toon_vae
  mmi train --recipe toon_pretrain --out runs/toon data.codec=runs/toon_vae/model
  mmi train --recipe toon_pretrain --out runs/toon --resume

\b
Every number of a recipe can be set on the command line: optim.lr=1e-4 loop.steps=500
`mmi recipe show NAME` prints a recipe, --dry-run what a run would use and where each value comes from.
"""


@click.command("train", context_settings=SETTINGS, epilog=EXAMPLE)
@click.option("--recipe", "name", metavar="NAME|FILE", help="A shipped recipe or a TOML file.")
@click.option("--out", metavar="DIR", help="Run directory.  [default: runs/NAME-DATE]")
@click.option("--model", metavar="M", help="Model directory to start from (sets model.base).")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in the run directory.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe with the origin of each value, and stop.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@message_options
def train(
    name: str | None, out: str | None, model: str | None, resume: bool, dry_run: bool, overrides: tuple[str, ...]
) -> None:
    """Train by a recipe. SIGINT or SIGTERM writes a checkpoint first; the same command with --resume goes on.

    Writes the resolved recipe, metrics.jsonl, curves.png, a preview, checkpoints and the trained model into the
    run directory. Runs unchanged under `accelerate launch` and `torchrun`.
    """
    from mmi_engine.train.recipe import resolve, resumed
    from mmi_engine.train.start import train as run

    extra = (*overrides, f'model.base="{model}"') if model else overrides
    directory = Path(out) if out else None
    if resume and directory is not None and name is None:
        resolved = resumed(directory, extra)
    elif name is None:
        raise click.UsageError("--recipe is missing; `mmi recipe ls` lists the recipes that ship")
    else:
        resolved = resolve(name, extra)
    if dry_run:
        console.current().out(resolved.to_json().rstrip("\n"))
        return
    if directory is None and (resume or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UsageError(
            "--resume and runs of several processes need --out", remedy="name the run directory: --out DIR"
        )
    directory = directory or Path("runs") / f"{resolved.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if os.environ.get("RANK", "0") != "0":  # under torchrun and accelerate launch one process speaks for all
        console.current().verbosity = -1
    console.current().notice(f"training {resolved.recipe.name} in {directory}")
    with _Reporter(console.current()) as reporter:
        figures = run(resolved, directory, resume=resume, report=reporter)
    shown = ", ".join(f"{key} {value:g}" for key, value in figures.items())
    console.current().notice(f"done: {directory / 'model'} ({shown})")


class _Reporter:
    """Shows the lines of the training log: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, target: console.Console) -> None:
        self.console, self.last_line, self.stage = target, 0.0, ""
        self.bar: Any = None

    def __enter__(self) -> _Reporter:
        if self.console.live:
            from rich import console as rich_console
            from rich import progress

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
            )
            self.bar = progress.Progress(*columns, console=rich_console.Console(stderr=True), transient=True)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, line: dict[str, Any]) -> None:
        """Take a line of metrics.jsonl, or ``{"stage", "done", "total"}`` while data is prepared."""
        preparing = "stage" in line
        done, total = (line["done"], line["total"]) if preparing else (line["step"], line["steps"])
        label = line.get("stage", "training")
        shown = {k: v for k, v in line.items() if k not in ("step", "steps", "stage", "done", "total", "seconds")}
        text = " ".join(f"{key} {value:.4g}" for key, value in shown.items())
        held_out = any(key.startswith("val_") for key in shown)
        if self.bar is not None:
            if label != self.stage:
                self.task, self.stage = self.bar.add_task(label, total=total), label
            self.bar.update(self.task, completed=done, total=total, description=f"{label} {text}".strip())
        elif held_out or preparing or time.monotonic() - self.last_line >= console.LOG_EVERY_S:
            self.last_line = time.monotonic()
            self.console.event("progress", f"{label}: {done} of {total} {text}".rstrip(), **line)
