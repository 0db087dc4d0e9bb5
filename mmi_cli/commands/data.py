"""`mmi data`: import other people's data sets, validate manifests, make the built-in data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmi_cli import console
from mmi_cli.options import SETTINGS, input_options, manifest_argument, message_options
from mmi_engine.data.importers.formats import FORMATS

KINDS = ("auto", "caption", "vqa", "ground", "t2i", "seg2img", "story")


@click.group("data", context_settings=SETTINGS)
def data() -> None:
    """Import other people's data sets, validate manifests, make the built-in data."""


@data.command("check", context_settings=SETTINGS, epilog="Example:\n\n  mmi data check examples/story.jsonl")
@manifest_argument
@click.option("--task", type=click.Choice(KINDS), default="auto", show_default=True, help="Whose rows they must be.")
@input_options
@message_options
def check(manifest: str, task: str, root: str | None, allow_urls: bool) -> int:
    """Validate MANIFEST: every row and every image.

    No model is loaded. The exit code is 3 when some rows would fail.
    """
    from mmi_engine.check import check as check_manifest
    from mmi_engine.check import task_named
    from mmi_engine.data.images import ImageLoader
    from mmi_engine.data.manifest import Manifest

    column = {"caption": "image", "t2i": "prompt", "auto": "image"}.get(task)
    source = Manifest(manifest, root=root, column=column)
    loader = ImageLoader(source.root, allow_urls=allow_urls)
    terminal = console.current()
    shown = 0

    def on_error(place: str, error: object) -> None:
        nonlocal shown
        terminal.item_error(place, error, shown)  # type: ignore[arg-type]
        shown += 1

    wanted = None if task == "auto" else task_named(task)
    report = check_manifest(source, wanted, loader, on_error=on_error)
    codes = "".join(f", {code} {count}" for code, count in sorted(report.errors.items()))
    terminal.event(
        "check",
        f"{report.rows} rows, {report.failed} with errors{codes}; {report.images} images read",
        always=bool(report.failed),
        rows=report.rows,
        failed=report.failed,
        images=report.images,
        errors=dict(report.errors),
    )
    return report.exit_code


LISTED = "\b\nFormats:\n" + "\n".join(f"  {name:<12}{text}" for name, (_, _, text) in FORMATS.items())
IMPORT_EXAMPLE = f"""
{LISTED}

\b
Examples:
  mmi data import folder examples/images --out out/imported
  mmi data import coco captions_val2014.json --images val2014 --out data/coco
  mmi data import vqa questions.json --annotations answers.json --images val2014 --out data/vqa
"""


@data.command("import", context_settings=SETTINGS, epilog=IMPORT_EXAMPLE)
@click.argument("format", metavar="FORMAT", type=click.Choice(list(FORMATS)))
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder for the manifest.")
@click.option(
    "--images", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the pictures.  [default: SRC's]"
)
@click.option("--annotations", metavar="FILE", type=click.Path(path_type=Path), help="The answers, or the references.")
@click.option("--split", metavar="NAME", help="Only this split, where the format knows splits.")
@click.option("--boxes", type=click.Choice(["xywh", "xyxy"]), help="How boxes are written.  [default: the format's]")
@click.option("--given", metavar="N", type=click.IntRange(0), help="Stories: only the first N pictures are given.")
@click.option("--copy", is_flag=True, help="Copy the pictures too; default is to name them where they are.")
@click.option("--keep-missing", is_flag=True, help="Keep rows whose pictures are not there.")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="At most N rows.")
@click.option("--trust-pickle", is_flag=True, help="Open pickles, which may run code.")
@message_options
def import_(format: str, source: Path, out: Path, **options: Any) -> int:
    """Turn SRC, a data set in FORMAT, into a manifest.

    Writes manifest.jsonl into --out, and tells what was dropped and why.
    """
    from mmi_engine.data.importers.base import MANIFEST, ImportOptions, run_import
    from mmi_engine.data.importers.formats import reader

    terminal = console.current()
    with terminal.counting("importing") as progress:
        chosen = ImportOptions(**options)
        report = run_import(reader(format), format, source, out, chosen, lambda rows: progress(rows, rows))
    dropped = "".join(f", {reason} {count}" for reason, count in sorted(report.dropped.items()))
    terminal.event(
        "import",
        f"{report.rows} rows, {sum(report.dropped.values())} dropped{dropped} → {out / MANIFEST}",
        rows=report.rows,
        images=report.images,
        dropped=dict(report.dropped),
    )
    return 0


@data.group("make", context_settings=SETTINGS)
def make() -> None:
    """Make built-in data."""


@make.command(
    "toon", context_settings=SETTINGS, epilog="Example:\n\n  mmi data make toon --out toon --split test --count 20"
)
@click.option("--out", required=True, metavar="DIR", help="Folder for the manifests and pictures.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Stories, and single scenes.")
@click.option("--start", type=click.IntRange(0), default=0, show_default=True, help="Index of the first.")
@message_options
def toon(out: str, split: str, count: int, start: int) -> None:
    """Draw scenes and stories of the embedded world, with exact truth, as manifests for every task."""
    from mmi_engine.toon.dataset import make_dataset
    from mmi_engine.train.toon_documents import NAME, write_documents

    terminal = console.current()
    with terminal.counting("drawing") as progress:
        made = make_dataset(Path(out), split, count, start, progress=progress)
        made[NAME] = write_documents(Path(out), split, count, progress, start)
    rows = ", ".join(f"{name} {number}" for name, number in made.items())
    terminal.event("made", f"wrote {out}: {rows} rows", rows=made)
