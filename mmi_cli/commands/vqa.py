"""`mmi vqa`: answer questions about pictures."""

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
  mmi vqa examples/vqa.jsonl --out out/vqa
  mmi vqa examples/images --question "Where is Pip?" --out - | jq -r .answer

\b
Rows: a question; several pictures and solved examples; a dialogue with options to rank:
  {"id": "q1", "image": "a.png", "question": "What colour is the ball?"}
  {"id": "q2", "images": ["x.png", "y.png"], "question": "…",
   "shots": [{"image": "s.png", "question": "…", "answer": "…"}]}
  {"id": "d1", "image": "a.png", "caption": "…", "history": [{"question": "…", "answer": "…"}],
   "question": "…", "options": ["…", "…"]}
Fields of --template: {image}, {question}, {caption}.
"""


@click.command("vqa", context_settings=SETTINGS, epilog=EXAMPLE)
@manifest_argument
@out_or_stream
@click.option(
    "--form",
    type=click.Choice(["long", "short", "vizwiz"]),
    default="long",
    show_default=True,
    help="Prompt; vizwiz allows 'Unanswerable'.",
)
@click.option("--question", metavar="TEXT", help="Asked of rows that have none; MANIFEST may then be a folder.")
@template_option
@model_options
@batch_options
@text_options
@input_options
@selection_options
@resume_options
@message_options
def vqa(**options: Any) -> int:
    """Answer the questions in MANIFEST (JSON lines, CSV, - for stdin).

    A row with "options" ranks them by summed log-probability; "history" and "caption" make it a dialogue. Writes
    results.jsonl with an "answer" per row, errors.jsonl, run.json and a gallery, index.html.
    """
    from mmi_cli.generating import generate
    from mmi_engine.model_info import family
    from mmi_engine.tasks import VqaTask

    task = VqaTask(options["form"], options["template"], options["question"], family(options["model"]))
    return generate(task, options)
