"""`mmi ground`: find what an expression describes."""

from __future__ import annotations

from typing import Any

import click

from mmi_cli.options import (
    SETTINGS,
    batch_options,
    input_options,
    manifest_argument,
    message_options,
    model_options,
    out_or_stream,
    resume_options,
    selection_options,
    template_option,
    text_options,
)

EXAMPLE = """
\b
Examples (run as they stand in a clone):
  mmi ground examples/ground.jsonl --out out/ground --draw
  mmi ground examples/images --expression "the sun" --out - | jq -c '[.id, .box]'

\b
A row is a picture and an expression; the box is in pixels of the original, x1 y1 x2 y2:
  {"id": "g1", "image": "a.png", "expression": "the red ball"}
Fields of --template: {image}, {expression}.
"""


@click.command("ground", context_settings=SETTINGS, epilog=EXAMPLE)
@manifest_argument
@out_or_stream
@click.option("--draw", is_flag=True, help="Also write each picture with its box, ID.png.")
@click.option("--expression", metavar="TEXT", help="Looked for in rows that have none; MANIFEST may then be a folder.")
@click.option(
    "--fit",
    type=click.Choice(["squeeze", "pad", "crop"]),
    default="squeeze",
    show_default=True,
    help="How a picture that is not square is shown to the model.",
)
@click.option(
    "--form",
    type=click.Choice(["auto", "question", "released"]),
    default="auto",
    show_default=True,
    help="Prompt; auto takes the one the model knows.",
)
@template_option
@model_options
@batch_options
@text_options
@input_options
@selection_options
@resume_options
@message_options
def ground(**options: Any) -> int:
    """Find the box of each expression in MANIFEST (JSON lines, CSV, - for stdin).

    Writes results.jsonl with a "box" per row, errors.jsonl, run.json and a gallery with the boxes, index.html.
    """
    from mmi_cli.generating import generate
    from mmi_engine.model_info import family
    from mmi_engine.tasks import GroundTask

    chosen = {name: options[name] for name in ("form", "template", "fit", "draw", "expression")}
    return generate(GroundTask(**chosen, family=family(options["model"])), options)
