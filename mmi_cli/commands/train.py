"""`mmi train`: pre-train or fine-tune by a named recipe."""

from __future__ import annotations

import json
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
  mmi train --recipe sft_vqa
  mmi train --recipe sft_vqa --model M --data vqav2=DATA/vqav2/manifest.jsonl --out runs/vqa
  mmi train --recipe toon_vae --out runs/toon_vae
  mmi train --recipe toon_pretrain --out runs/toon data.codec=runs/toon_vae/model
  mmi train --recipe toon_pretrain --out runs/toon --resume

\b
The paper's recipes without --model fine-tune the embedded model for a few minutes (their [toon] profile), on drawn
data unless --data names others. Every number can be set on the command line: optim.lr=1e-4 loop.steps=500
`mmi recipe show NAME` prints a recipe, --dry-run what a run would use and where each value comes from.
"""


@click.command("train", context_settings=SETTINGS, epilog=EXAMPLE)
@click.option("--recipe", "name", metavar="NAME|FILE", help="A shipped recipe or a TOML file.")
@click.option("--out", metavar="DIR", help="Run directory.  [default: runs/NAME-DATE]")
@click.option("--model", metavar="M", help="Model directory to start from (sets model.base).")
@click.option(
    "--data",
    multiple=True,
    metavar="[NAME=]MANIFEST",
    help="JSON lines to train on, for the recipe's set NAME or as a set of their own; may be repeated.",
)
@click.option(
    "--fsdp", is_flag=True, help="Spread weights and moments over the processes (loop.shard=fsdp loop.ema=0.0)."
)
@click.option("--deepspeed", metavar="CONFIG", help="DeepSpeed's JSON file, stages 0 to 2, on CUDA devices.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in the run directory.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the resolved recipe with the origin of each value, tell the memory it needs, and stop.",
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@message_options
def train(
    name: str | None,
    out: str | None,
    model: str | None,
    data: tuple[str, ...],
    fsdp: bool,
    deepspeed: str | None,
    resume: bool,
    dry_run: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train by a recipe. SIGINT or SIGTERM writes a checkpoint first; the same command with --resume goes on.

    Writes the resolved recipe, metrics.jsonl, curves.png, a preview, checkpoints and the trained model into the
    run directory. Runs unchanged under `accelerate launch` and `torchrun`.
    """
    from mmi_engine.train.start import train as run

    if deepspeed is not None:
        _ask_for_deepspeed(deepspeed, fsdp)
    overrides = ("loop.shard=fsdp", "loop.ema=0.0", *overrides) if fsdp else overrides
    directory = Path(out) if out else None
    resolved = _resolved(name, directory if resume else None, model, data, overrides)
    if dry_run:
        console.current().out(resolved.to_json().rstrip("\n"))
        if resolved.recipe.data.source == "manifests":
            _estimate(resolved.recipe)
        return
    if directory is None and (resume or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UsageError(
            "--resume and runs of several processes need --out", remedy="name the run directory: --out DIR"
        )
    directory = directory or Path("runs") / f"{resolved.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if os.environ.get("RANK", "0") != "0":  # under torchrun and accelerate launch one process speaks for all
        console.current().verbosity = -1
    console.current().notice(f"training {resolved.recipe.name} in {directory}")
    if resolved.recipe.data.source == "manifests" and resolved.recipe.measure.task and not resolved.recipe.measurable:
        console.current().notice("nothing is measured before and after: name held-out rows with measure.manifest=FILE")
    with _Reporter(console.current()) as reporter:
        figures = run(resolved, directory, resume=resume, report=reporter)
    _conclude(resolved.recipe, directory, figures)


def _ask_for_deepspeed(config: str, fsdp: bool) -> None:
    """What `accelerate launch` would say in the environment for a DeepSpeed configuration file."""
    if fsdp:
        raise click.UsageError("--fsdp and --deepspeed exclude each other")
    if not Path(config).is_file():
        raise UsageError(f'--deepspeed "{config}": no such file', remedy="name DeepSpeed's JSON configuration")
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": config}


def _resolved(
    name: str | None, resumed_from: Path | None, model: str | None, data: tuple[str, ...], overrides: tuple[str, ...]
) -> Any:
    """The recipe that the command line means, its data found; raises before anything heavy is imported.

    Args:
        name: of the recipe; resumed_from: run directory of ``--resume``; model, data, overrides: as given. Words
        without ``=`` behind ``--data`` are further manifests.
    """
    from mmi_engine.train import layers, sources
    from mmi_engine.train.recipe import find, resolve, resumed

    more = tuple(word for word in overrides if data and "=" not in word)
    extra = tuple(word for word in overrides if word not in more)
    extra = (*extra, f'model.base="{model}"') if model else extra
    if name is None and resumed_from is not None:
        resolved = resumed(resumed_from, extra)
    elif name is None:
        raise click.UsageError("--recipe is missing; `mmi recipe ls` lists the recipes that ship")
    else:
        scaled = model in (None, layers.PROFILE) and layers.has_profile(find(name), find)
        resolved = resolve(name, extra, profile=layers.PROFILE if scaled else "", data=(*data, *more))
    if resolved.recipe.data.source == "manifests":
        sources.locate(resolved.recipe.data)
    return resolved


def _estimate(recipe: Any) -> None:
    """What a step will need in memory, on stderr."""
    from mmi_engine.train.finetune import estimate

    found = estimate(recipe)
    console.current().event("memory", found.sentence(), always=True, **found.to_json())


def _conclude(recipe: Any, directory: Path, figures: dict[str, float]) -> None:
    """The last lines: where the model is, and the benchmark figure before and after."""
    shown = ", ".join(f"{k} {v:g}" for k, v in figures.items() if k not in ("before", "after", "test"))
    console.current().notice(f"done: {directory / 'model'}" + (f" ({shown})" if shown else ""))
    if "after" not in figures:
        return
    measured = json.loads((directory / "measure.json").read_text(encoding="utf-8"))
    first = measured["after"]
    test = f"; test split {figures['test']:.4g} ({measured['test']['items']})" if "test" in measured else ""
    unit = f" {first['unit']}" if first["unit"] else ""
    console.current().event(
        "measured",
        f"{first['name']}: {figures['before']:.4g} before → {figures['after']:.4g}{unit} after, "
        f"{first['items']} validation items{test}",
        always=True,
        **{key: figures[key] for key in ("before", "after", "test") if key in figures},
    )


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
        elif held_out or label != self.stage or time.monotonic() - self.last_line >= console.LOG_EVERY_S:
            self.last_line, self.stage = time.monotonic(), label
            self.console.event("progress", f"{label}: {done} of {total} {text}".rstrip(), **line)
