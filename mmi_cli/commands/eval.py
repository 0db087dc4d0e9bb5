"""`mmi eval`: scores of finished results, comparisons of runs, benchmark suites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmi_cli.options import SETTINGS, DeviceType, message_options, stack

EPILOG = """\b
Examples:
  mmi eval out/captions references.jsonl --metric cider
  mmi eval runs/a runs/b --references references.jsonl --metric vqa --out compared
  mmi eval --suite toon --out out/toon --stories 10
"""
ROLES = ("wrong", "skip")

score_options = stack(
    click.option("--metric", "metrics", multiple=True, metavar="M", help="One or several; see the list below.  [auto]"),
    click.option("--references", metavar="R", help="The truth; all other arguments are then runs to compare."),
    click.option("--parity", type=click.Choice(["released"]), help="Score as the released scripts do."),
    click.option("--missing", type=click.Choice(ROLES), default="wrong", show_default=True,
                 help="What items without a usable result count as."),
    click.option("--resamples", type=click.IntRange(0), default=1000, show_default=True, help="Of the bootstrap."),
    click.option("--root", metavar="DIR", help="Folder image paths of the references are relative to."),
    click.option("--allow-urls", is_flag=True, help="Fetch http(s) images."),
    click.option("--worst", type=click.IntRange(0), default=20, show_default=True, help="Items in the gallery."),
)  # fmt: skip

network_options = stack(
    click.option("--inception", metavar="FILE", help="Inception weights, for fid, fid64, kid."),
    click.option("--clip", metavar="DIR", help="CLIP model directory, for clip-i, clip-t."),
    click.option("--segmenter", metavar="DIR", help="OneFormer directory or toon, for miou of pictures."),
    click.option("--device", type=DeviceType(), default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--batch-size", type=click.IntRange(1), metavar="N", help="Pictures or items at a time."),
    click.option("--cache", metavar="DIR", help="Features by file hash.  [default: the user's cache folder]"),
    click.option("--no-cache", is_flag=True, help="Compute every feature anew."),
)

suite_options = stack(
    click.option("--suite", metavar="NAME", help="toon, a benchmark, paper for all of those; ls lists them."),
    click.option("--data", metavar="DIR", help="Folder of the suites' NAME.jsonl or NAME/manifest.jsonl."),
    click.option("--model", default="toon", show_default=True, metavar="M", help="toon, or a model directory."),
    click.option("--tasks", metavar="T,…", help="Only these tasks of the toon suite."),
    click.option(
        "--stories", type=click.IntRange(1), default=125, show_default=True, help="Toon stories, 4 drawn each."
    ),
    click.option("--scenes", type=click.IntRange(1), default=500, show_default=True, help="Toon items per other task."),
    click.option("--start", type=click.IntRange(0), default=0, show_default=True, help="Index of the first toon item."),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N rows of a benchmark."),
    click.option(
        "--steps", type=click.IntRange(1), metavar="N", help="Denoising steps.  [default: the suite's or model's]"
    ),
    click.option("--tuned", is_flag=True, help="Prompts of a fine-tuned model, where they differ."),
    click.option(
        "--threads",
        type=click.IntRange(1),
        metavar="N",
        help="CPU threads.  [default: OMP_NUM_THREADS, else the physical cores]",
    ),
)


class _Command(click.Command):
    """Adds the table of metrics to the help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from mmi_engine.metrics.names import HELP

        with formatter.section("Metrics"):
            formatter.write_dl(list(HELP.items()))
        super().format_epilog(ctx, formatter)


@click.command("eval", cls=_Command, context_settings=SETTINGS, epilog=EPILOG)
@click.argument("paths", nargs=-1, metavar="[RESULTS REFERENCES | RUN…]")
@score_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of metrics.json, plots and gallery.  [default: RESULTS]",
)
@network_options
@suite_options
@message_options
def eval_(**options: Any) -> int:
    """Score finished RESULTS (an output directory, or JSON lines) against REFERENCES (a manifest with the truth).

    No generator is loaded. Every number comes with its card: metric, variant, items, missing ones, references per item,
    versions, bootstrap 95 % interval; all of it lands in metrics.json. Items without a usable result count as wrong and
    are listed; the exit code is then 3. With --references all arguments are runs, compared in pairs with the first.
    With --suite a model generates first: toon runs everywhere, the benchmarks on the data that you have.
    """
    from mmi_cli import evaluating

    return evaluating.run(options)
