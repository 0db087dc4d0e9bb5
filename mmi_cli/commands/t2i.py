"""`mmi t2i`: pictures from text."""

from __future__ import annotations

from typing import Any

import click

from mmi_cli.options import (
    SETTINGS,
    batch_options,
    candidate_options,
    image_options,
    input_options,
    manifest_argument,
    message_options,
    model_options,
    out_option,
    resume_options,
    selection_options,
    template_option,
)

EXAMPLE = """
\b
Examples (run as they stand in a clone):
  mmi t2i examples/t2i.jsonl --out out/t2i
  mmi t2i examples/prompts.txt --out out/best --candidates 4 --rerank self

\b
A row is a prompt; a text file is one prompt a line:
  {"id": "t1", "prompt": "Pip is running on the beach near a red ball."}
Field of --template: {prompt}.
"""


@click.command("t2i", context_settings=SETTINGS, epilog=EXAMPLE)
@manifest_argument
@out_option
@candidate_options
@template_option
@model_options
@batch_options
@image_options
@input_options
@selection_options
@resume_options
@message_options
def t2i(**options: Any) -> int:
    """Draw a picture for every prompt in MANIFEST (JSON lines, CSV, a text file of prompts, - for stdin).

    Writes ID.png per row (ID_0.png, ID_1.png … with --candidates), results.jsonl, errors.jsonl, run.json and a gallery,
    index.html.
    """
    from mmi_cli.generating import generate
    from mmi_engine.tasks import Candidates, T2iTask

    candidates = Candidates(options["candidates"], options["rerank"], options["keep_all"])
    return generate(T2iTask(candidates, options["template"]), options)
