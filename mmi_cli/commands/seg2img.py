"""`mmi seg2img`: pictures from semantic maps."""

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
Example (runs as it stands in a clone):
  mmi seg2img examples/seg2img.jsonl --out out/seg2img

\b
A row is a map (PNG of class numbers, or in the palette's colours) and a caption:
  {"id": "m1", "segmentation": "maps/m1.png", "prompt": "Pip is on the beach."}
Fields of --template: {segmentation}, {prompt}.
"""


@click.command("seg2img", context_settings=SETTINGS, epilog=EXAMPLE)
@manifest_argument
@out_option
@click.option(
    "--palette",
    metavar="NAME|FILE",
    help="toon, voc, a JSON list of [r, g, b], or a palette PNG.  [default: the model's, else voc]",
)
@candidate_options
@template_option
@model_options
@batch_options
@image_options
@input_options
@selection_options
@resume_options
@message_options
def seg2img(**options: Any) -> int:
    """Draw a picture for every semantic map and caption in MANIFEST (JSON lines, CSV, - for stdin).

    Writes ID.png per row, results.jsonl, errors.jsonl, run.json and a gallery with maps beside pictures, index.html.
    """
    from mmi_cli.generating import generate
    from mmi_engine.data.maps import Palette
    from mmi_engine.model_info import family
    from mmi_engine.tasks import Candidates, Seg2ImgTask

    candidates = Candidates(options["candidates"], options["rerank"], options["keep_all"])
    named = options["palette"] or ("toon" if family(options["model"]) == "toon" else "voc")
    return generate(Seg2ImgTask(Palette.find(named), candidates, options["template"]), options)
