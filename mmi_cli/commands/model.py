"""`mmi model`: import, look into and assemble model directories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmi_cli import console
from mmi_cli.options import SETTINGS, message_options

if TYPE_CHECKING:
    from mmi_engine.weights.estimate import Need

NEW_EXAMPLE = """
\b
Example, parts.toml:
  [vision]
  model = "openai/clip-vit-large-patch14"
  [language]
  model = "Qwen/Qwen2.5-0.5B-Instruct"
  [image]
  model = "stable-diffusion-v1-5/stable-diffusion-v1-5"

\b
  mmi model new parts.toml --out my-model
  mmi train --recipe pretrain --model my-model --data laion2b=pairs.jsonl --out run \\
    data.encoder_px=0 data.decoder_px=0
"""
CARD_EXAMPLE = """
\b
Example:
  mmi model card my-model --run runs/pretrain --license apache-2.0
  hf upload USER/my-model my-model .
"""


@click.group("model", context_settings=SETTINGS)
def model() -> None:
    """Import, look into and assemble model directories."""


@model.command(
    "import",
    context_settings=SETTINGS,
    epilog="Example:\n\n  mmi model import mm_interleaved_pretrain --out 13b --tokenizer lmsys/vicuna-13b-v1.3",
)
@click.argument("source", metavar="SRC")
@click.option("--out", metavar="DIR", required=True, help="The model directory to make.")
@click.option(
    "--dtype",
    type=click.Choice(["stored", "fp32", "bf16", "fp16"]),
    default="stored",
    show_default=True,
    help="Number format of the weights on disk.",
)
@click.option("--tokenizer", metavar="T", help="File, folder or hub id of the tokenizer.  [default: in SRC]")
@click.option(
    "--image-size",
    type=click.Choice(["224", "448"]),
    default="224",
    show_default=True,
    help="Pixels of the pictures it reads; 448 resizes the position table.",
)
@click.option("--config", "config_file", metavar="FILE", help="config.json, where the sizes are not the released ones.")
@click.option(
    "--base",
    "bases",
    metavar="B",
    multiple=True,
    help="Base model for what SRC lacks: a LLaMA, CLIP or diffusion folder, or a hub id; may be repeated.",
)
@click.option(
    "--new-rows",
    type=click.Choice(["mean"]),
    help="Where SRC and the base language model lack the embeddings of the two new tokens, begin them as the mean of "
    "the others.  [default: refuse]",
)
@message_options
def import_(
    source: str,
    out: str,
    dtype: str,
    tokenizer: str | None,
    image_size: str,
    config_file: str | None,
    bases: tuple[str, ...],
    new_rows: str | None,
) -> None:
    """Convert the released checkpoint SRC to a model directory.

    SRC is a folder of .bin or .safetensors shards, one file, or a hub id. Everything is verified before anything is
    written; an import that was interrupted goes on where it stopped when the same command runs again.
    """
    from mmi_engine.weights.requests import import_command

    terminal = console.current()
    with terminal.counting("importing") as progress:
        done = import_command(
            source,
            Path(out),
            dtype=dtype,
            tokenizer=tokenizer,
            image_size=int(image_size),
            config_file=config_file,
            bases=bases,
            new_rows=new_rows,
            progress=progress,
        )
    for name in done.dropped:
        terminal.notice(f"{name} is not needed and was left out")
    for name, how in done.made.items():
        terminal.notice(f"{name}: {how}")
    again = f", {done.resumed} of {done.files} files from before" if done.resumed else ""
    terminal.notice(f"{done.tensors} tensors, {done.bytes / 1e9:.2f} GB → {done.directory}{again}")


@model.command("info", context_settings=SETTINGS, epilog="Example:\n\n  mmi model info toon")
@click.argument("name", metavar="M")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@message_options
def info(name: str, as_json: bool) -> None:
    """Parts, size and memory of the model M (toon, a directory, or a hub id), and on which devices here it fits."""
    from mmi_engine.model_info import describe
    from mmi_engine.weights.estimate import DTYPE_BYTES, devices, fits, need

    found = describe(name)
    needs = {dtype: need(found.config, found.parameters, dtype) for dtype in DTYPE_BYTES}
    here = fits(found.config, found.parameters, devices())
    memory = {dtype: entry.total for dtype, entry in needs.items()}
    terminal = console.current()
    if as_json:
        terminal.json(
            {
                "name": found.name,
                "fingerprint": found.fingerprint,
                "parameters": found.parameters,
                "tensors": found.tensors,
                "bytes": found.bytes,
                "stored": list(found.stored),
                "image_size": found.image_size,
                "parts": found.parts,
                "memory_bytes": memory,
                "needs": {dtype: {**vars(entry), "total": entry.total} for dtype, entry in needs.items()},
                "devices": dict(here),
            }
        )
        return
    rows = [
        ("name", found.name),
        ("size", f"{found.bytes / 2**20:.1f} MiB, {found.tensors} tensors stored as {', '.join(found.stored)}"),
        ("pictures", f"{found.image_size} px"),
        ("sha256", found.fingerprint),
        ("parameters", f"{found.parameters:,}"),
        *((f"  {part}", f"{count:,}") for part, count in found.parts.items()),
    ]
    terminal.table(rows)
    _show_needs(needs)
    terminal.table(here)


def _show_needs(needs: dict[str, Need]) -> None:
    """Memory per dtype as a table."""
    terminal = console.current()
    digits = {"weights": 0, "cache_per_token": 3, "per_image": 1, "per_picture": 1, "working": 0, "total": 0}
    rows = [
        (dtype, *(f"{getattr(entry, name) / 2**20:,.{count}f}" for name, count in digits.items()))
        for dtype, entry in needs.items()
    ]
    head = ("MiB in", "weights", "cache per token", "per image read", "per picture drawn", "step, libraries", "total")
    terminal.out("")
    terminal.table(rows, header=head)
    full = needs["bf16"]
    terminal.out(f"total: one sequence of {full.tokens} tokens with {full.images} images\n")


@model.command("new", context_settings=SETTINGS, epilog=NEW_EXAMPLE)
@click.argument("spec", metavar="CONFIG")
@click.option("--out", metavar="DIR", required=True, help="The model directory to make.")
@message_options
def new(spec: str, out: str) -> None:
    """Assemble a trainable model from a vision trunk, a language model, and a U-Net with its VAE.

    CONFIG is a TOML file that names the parts, folders or hub ids. What lies between them is new and starts as in
    the paper; the parts compute what they computed before. Trunks: CLIP, SigLIP, ViT, DINOv2; language models: Llama,
    Mistral, Qwen 2, Qwen 3; U-Nets: Stable Diffusion 1.x and 2.x.
    """
    from mmi_engine.weights.assemble import assemble_command

    terminal = console.current()
    made = assemble_command(Path(spec), Path(out), terminal.notice)
    count = sum(parameter.numel() for parameter in made.parameters())
    terminal.notice(f"{made.config.name}, {count:,} parameters → {out}")


@model.command("card", context_settings=SETTINGS, epilog=CARD_EXAMPLE)
@click.argument("directory", metavar="DIR")
@click.option("--run", metavar="RUN", help="The training's run directory, for its recipe.")
@click.option("--metrics", metavar="FILE", multiple=True, help="metrics.json of mmi eval, or its folder; repeatable.")
@click.option("--license", "license_", metavar="ID", help="Licence, as the hub names it, e.g. apache-2.0.")
@click.option("--base-model", "bases", metavar="ID", multiple=True, help="Hub id it was made from; repeatable.")
@click.option("--about", metavar="TEXT", help="A sentence or two in your own words.")
@click.option("--overwrite", is_flag=True, help="Replace a README.md that was written or changed by hand.")
@message_options
def card(
    directory: str,
    run: str | None,
    metrics: tuple[str, ...],
    license_: str | None,
    bases: tuple[str, ...],
    about: str | None,
    overwrite: bool,
) -> None:
    """Write the model card (README.md) of the model directory DIR, before it is uploaded.

    A card that this command wrote is written anew; one that was changed by hand is left alone.
    """
    from mmi_engine.weights.card import write_card

    path = write_card(
        Path(directory),
        run=Path(run) if run else None,
        metrics=[Path(name) for name in metrics],
        license_=license_,
        bases=bases,
        about=about,
        overwrite=overwrite,
    )
    console.current().notice(f"→ {path}")
