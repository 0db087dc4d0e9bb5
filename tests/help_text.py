"""The help of every command as one page of Markdown. Run as a script it prints docs/help.md (`make docs`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Help of every command

Generated from the program (`make docs`); a test keeps it in step.
"""


def pages(command: click.Command, words: tuple[str, ...], parent: click.Context | None) -> Iterator[tuple[str, str]]:
    """(name, help text) of a command and all below it."""
    width = {"terminal_width": 100, "max_content_width": 100}
    context = click.Context(command, info_name=words[-1], parent=parent, help_option_names=["-h", "--help"], **width)
    yield " ".join(words), command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from pages(inner, (*words, name), context)


def page() -> str:
    """The whole page."""
    from mmi_cli.main import cli

    parts = [HEAD]
    for name, text in pages(cli, ("mmi",), None):
        parts.append(f"\n## {name}\n\n```text\n{text.rstrip()}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / name) for name in (".", "engine", "kernels")]
    sys.stdout.write(page())
