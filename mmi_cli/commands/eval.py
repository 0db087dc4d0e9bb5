"""`mmi eval`: figures of a model on a suite of test items. The suite that ships is `toon`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mmi_cli import console
from mmi_cli.options import SETTINGS, message_options


@click.command(
    "eval", context_settings=SETTINGS, epilog="Example:\n\n  mmi eval --suite toon --out out/toon --stories 10"
)
@click.option("--suite", type=click.Choice(["toon"]), required=True, help="Which test items.")
@click.option("--model", default="toon", show_default=True, metavar="M", help="'toon' or a model directory.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder of the results.")
@click.option(
    "--stories", type=click.IntRange(1), default=125, show_default=True, help="Stories, four frames drawn each."
)
@click.option("--scenes", type=click.IntRange(1), default=500, show_default=True, help="Scenes to caption and to draw.")
@click.option("--start", type=click.IntRange(0), default=0, show_default=True, help="Index of the first test item.")
@click.option("--batch-size", type=click.IntRange(1), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=None, metavar="N", help="CPU threads [default: cores]")
@message_options
def eval_(
    suite: str, model: str, out: Path, stories: int, scenes: int, start: int, batch_size: int, threads: int | None
) -> int:
    """Generate the suite's test items and read the results back with the oracle.

    Prints every measure with its count, a 95 % interval (frames taken as independent) and the shares of a blind guess
    and of the most frequent answer; computes on the CPU in float32. Writes metrics.json, stories.png (a contact sheet
    of the first stories) and captions.jsonl into the output folder.
    """
    from mmi_engine import versions
    from mmi_engine.model.checkpoint import load_model
    from mmi_engine.model_info import fingerprint, locate
    from mmi_engine.runtime import tune_cpu
    from mmi_engine.toon import measure

    terminal = console.current()
    tune_cpu(threads or versions.physical_cores())
    loaded = load_model(model)
    out.mkdir(parents=True, exist_ok=True)
    figures, made = measure.measure(
        loaded,
        stories=stories,
        scenes=scenes,
        start=start,
        batch_size=batch_size,
        progress=lambda stage, done, total: terminal.notice(f"{stage}: {done}/{total}"),
    )
    card = {
        "suite": suite,
        "model": fingerprint(locate(model)),
        "items": {"stories": stories, "scenes": scenes, "start": start, "split": "test"},
        "figures": {task: {name: f.to_json() for name, f in table.items()} for task, table in figures.items()},
    }
    (out / "metrics.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    with (out / "captions.jsonl").open("w", encoding="utf-8") as stream:
        for index, text in enumerate(made["captions"], start):
            stream.write(json.dumps({"id": f"scene-{index}", "caption": text}) + "\n")
    measure.contact_sheet(made["stories"]).save(out / "stories.png")
    rows = [
        (task, name, f"{f.share:.1%}", f"{f.right}/{f.total}", "{:.1%} … {:.1%}".format(*f.interval()), *_blind(f))
        for task, table in figures.items()
        for name, f in table.items()
    ]
    terminal.table(rows, header=("task", "measure", "right", "count", "95 % interval", "chance", "majority"))
    return 0


def _blind(figure: Any) -> tuple[str, str]:
    """What a uniform guess and the most frequent answer would reach."""
    shares = (figure.chance, figure.majority)
    return tuple("" if share is None else f"{share:.1%}" for share in shares)  # type: ignore[return-value]
