"""`mmi caption`: describe pictures."""

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
  mmi caption examples/caption.jsonl --out out/caption
  mmi caption examples/images --style long --out - | jq -r .caption

\b
A row is a picture, perhaps with solved examples before it:
  {"id": "a1", "image": "img/a1.jpg"}
  {"id": "a2", "image": "x.png", "shots": [{"image": "s.png", "caption": "…"}]}
Field of --template: {image}.
"""


@click.command("caption", context_settings=SETTINGS, epilog=EXAMPLE)
@manifest_argument
@out_or_stream
@click.option("--style", type=click.Choice(["short", "long"]), default="short", show_default=True)
@click.option(
    "--form",
    type=click.Choice(["zero-shot", "tuned"]),
    default="zero-shot",
    show_default=True,
    help="Prompt before or after fine-tuning.",
)
@template_option
@model_options
@batch_options
@text_options
@input_options
@selection_options
@resume_options
@message_options
def caption(**options: Any) -> int:
    """Describe the pictures in MANIFEST: JSON lines, a picture or a folder of them, CSV, a list of paths, - for stdin.

    Writes results.jsonl with a "caption" per row, errors.jsonl, run.json and a gallery, index.html.
    """
    from mmi_cli.generating import generate
    from mmi_engine.tasks import CaptionTask

    return generate(CaptionTask(options["style"], options["form"], options["template"]), options)
