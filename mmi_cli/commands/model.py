"""`mmi model`: look into model directories."""

from __future__ import annotations

import click

from mmi_cli import console
from mmi_cli.options import SETTINGS, message_options


@click.group("model", context_settings=SETTINGS)
def model() -> None:
    """Look into model directories."""


@model.command("info", context_settings=SETTINGS, epilog="Example:\n\n  mmi model info toon")
@click.argument("name", metavar="M")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@message_options
def info(name: str, as_json: bool) -> None:
    """Parts, size, and memory estimate per dtype of the model M (toon, or a directory)."""
    from mmi_engine.model_info import DTYPE_BYTES, describe

    found = describe(name)
    memory = {dtype: found.memory_bytes(dtype) for dtype in DTYPE_BYTES}
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
        *((f"memory {dtype}", f"about {size / 2**20:,.0f} MiB") for dtype, size in memory.items()),
    ]
    terminal.table(rows)
