"""`mmi story`: fill in every missing frame and every missing text of stories."""

from __future__ import annotations

from typing import Any

import click

from mmi_cli.options import (
    SETTINGS,
    batch_options,
    image_options,
    input_options,
    manifest_argument,
    message_options,
    model_options,
    resume_options,
    selection_options,
    text_options,
)

EXAMPLE = """
\b
Example (runs as it stands in a clone):
  mmi story examples/story.jsonl --out out/story

\b
A row is a list of frames; what is null or missing is generated, in order:
  {"id": "s1", "frames": [{"text": "Pip is on the beach.", "image": "f0.png"},
                          {"text": "Pip runs."}, {"text": null, "image": null}]}
"""


@click.command("story", context_settings=SETTINGS, epilog=EXAMPLE)
@manifest_argument
@click.option("--out", metavar="DIR", help="Output folder; a run that is there already is resumed.")
@click.option(
    "--free", type=click.IntRange(0, 100), default=0, metavar="N", help="Go on freely for up to N more frames."
)
@model_options
@batch_options
@image_options
@text_options
@input_options
@selection_options
@resume_options
@message_options
def story(**options: Any) -> int:
    """Fill in every missing picture and text of the stories in MANIFEST (JSON lines, - for stdin).

    Each piece is generated from all that came before it in its story. Writes results.jsonl, one PNG per frame,
    errors.jsonl, run.json and a gallery, index.html, into the output folder.
    """
    from mmi_cli.generating import generate
    from mmi_engine.tasks import StoryTask

    return generate(StoryTask(free=options["free"]), options)
