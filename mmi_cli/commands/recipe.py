"""`mmi recipe`: the training recipes that ship, to list, read and copy."""

from __future__ import annotations

from pathlib import Path

import click

from mmi_cli import console
from mmi_cli.options import SETTINGS, message_options


@click.group("recipe", context_settings=SETTINGS)
def recipe() -> None:
    """List, show and copy the training recipes."""


@recipe.command("ls", context_settings=SETTINGS, epilog="Example:\n\n  mmi recipe ls")
@message_options
def ls() -> None:
    """Names of the recipes, each with the first line of its header."""
    from mmi_engine.train.recipe import shipped

    rows = []
    for name, path in shipped().items():
        comments = [
            line.lstrip("# ").strip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"
        ]
        rows.append((name, next(filter(None, comments), "")))
    console.current().table(rows)


@recipe.command("show", context_settings=SETTINGS, epilog="Example:\n\n  mmi recipe show toon_pretrain")
@click.argument("name")
@message_options
def show(name: str) -> None:
    """Print a recipe, a shipped one by NAME or a file."""
    from mmi_engine.train.recipe import find

    console.current().out(find(name).read_text(encoding="utf-8").rstrip("\n"))


@recipe.command("copy", context_settings=SETTINGS, epilog="Example:\n\n  mmi recipe copy toon_pretrain mine.toml")
@click.argument("name")
@click.argument("target", default=".")
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@message_options
def copy(name: str, target: str, overwrite: bool) -> None:
    """Copy a recipe to TARGET (a file or folder) to change it; train with --recipe TARGET."""
    from mmi_engine.errors import OutputError, UsageError
    from mmi_engine.train.recipe import find

    source = find(name)
    path = Path(target) / source.name if Path(target).is_dir() else Path(target)
    if path.exists() and not overwrite:
        raise UsageError(f'"{path}" is there already', remedy="choose another name, or --overwrite")
    try:
        path.write_bytes(source.read_bytes())
    except OSError as error:
        raise OutputError(f'cannot write "{path}": {error.strerror}') from error
    console.current().notice(f"wrote {path}")
