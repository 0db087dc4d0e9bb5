"""`mmi`: a lazy group of commands, and what every ending of a command returns to the shell.

Place in the flow: the entry point. Commands are listed from a table, so `mmi --help` imports none of them and
`mmi COMMAND --help` imports only its own light module; the engine is imported inside the command. Exit codes:
0 done · 1 fatal · 2 usage or unreadable input · 3 finished with failed items · 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click
from click.core import ParameterSource

from mmi_cli import console
from mmi_cli.options import SETTINGS
from mmi_engine import __version__
from mmi_engine.errors import MMIError

# name → (module, attribute, one line of help); the order of `mmi --help`
COMMANDS: dict[str, tuple[str, str, str]] = {
    "caption": ("mmi_cli.commands.caption", "caption", "Describe pictures."),
    "vqa": ("mmi_cli.commands.vqa", "vqa", "Answer questions about pictures; rank options of a dialogue."),
    "ground": ("mmi_cli.commands.ground", "ground", "Find the box of what an expression describes."),
    "t2i": ("mmi_cli.commands.t2i", "t2i", "Draw pictures from text."),
    "seg2img": ("mmi_cli.commands.seg2img", "seg2img", "Draw pictures from semantic maps."),
    "story": ("mmi_cli.commands.story", "story", "Fill in the missing pictures and texts of stories."),
    "train": ("mmi_cli.commands.train", "train", "Pre-train or fine-tune by a named recipe."),
    "eval": ("mmi_cli.commands.eval", "eval_", "Score finished results, compare runs, run benchmarks."),
    "data": ("mmi_cli.commands.data", "data", "Import, validate and make data."),
    "model": ("mmi_cli.commands.model", "model", "Import, look into and assemble model directories."),
    "recipe": ("mmi_cli.commands.recipe", "recipe", "List, show and copy the training recipes."),
    "bench": ("mmi_cli.commands.bench", "bench", "Measure sampling kernels and generation."),
    "verify": ("mmi_cli.commands.verify", "verify", "Check the numbers of this installation."),
    "doctor": ("mmi_cli.commands.doctor", "doctor", "Look over versions, devices, kernels and memory."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called.

    Args:
        table: name → (module, attribute, help line).
    """

    def __init__(self, *args: Any, table: dict[str, tuple[str, str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in self.table:
            return None
        module, attribute, _ = self.table[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        share_environment(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a guess at what a mistyped name meant."""
        guesses = difflib.get_close_matches(args[0], self.table, n=1) if args[0] not in self.table else []
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if not guesses or "Did you mean" in error.message:
                raise
            raise click.UsageError(f"{error.message} Did you mean '{guesses[0]}'?", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Help lines from the table, without an import."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in self.table.items()])


def share_environment(command: click.Command) -> None:
    """Let every option be set as MMI_COMMAND_OPTION, and as MMI_OPTION for all commands together."""
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        share_environment(inner)
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name and parameter.envvar is None:
            longest = max(parameter.opts, key=len)
            option = longest.lstrip("-").upper().replace("-", "_")
            name = (command.name or "").upper().replace("-", "_")
            parameter.envvar = [f"MMI_{name}_{option}", f"MMI_{option}"]


def with_variable(error: click.ClickException) -> click.ClickException:
    """The error of a bad value, with the environment variable that it comes from, if from one."""
    if not isinstance(error, click.BadParameter) or error.ctx is None or error.param is None:
        return error
    if error.ctx.get_parameter_source(error.param.name or "") is not ParameterSource.ENVIRONMENT:
        return error
    names = error.param.envvar or []
    used = [name for name in ([names] if isinstance(names, str) else names) if os.environ.get(name)]
    told = f"{error.message} It comes from the environment: {used[0]}." if used else error.message
    return click.BadParameter(told, error.ctx, error.param)


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={**SETTINGS, "auto_envvar_prefix": "MMI"},
    epilog="\b\nTry: mmi story examples/story.jsonl --out out/\nEvery command: mmi COMMAND --help",
)
@click.version_option(__version__, "--version", prog_name="mmi")
def cli() -> None:
    """Interleaved image-text generation: describe, answer, find, draw, tell stories; train, measure, verify.

    Without a download: the embedded toon model is the default everywhere.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mmi` and return the exit code; messages go to stderr.

    Args:
        arguments: command line without the program's name; default `sys.argv`.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # remarks of libraries to their callers, not to our users
    console.configure(0, False, True)
    try:
        result = cli.main(args=None if arguments is None else list(arguments), prog_name="mmi", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        return 130
    except click.ClickException as error:
        with_variable(error).show()
        return error.exit_code
    except BrokenPipeError:  # the reader of stdout has gone, as in `mmi … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MMIError as error:
        console.current().error(error)
        return error.exit_code
    except KeyboardInterrupt:
        console.current().warning("quit; the same command resumes")
        return 130
    except Exception as error:
        console.current().error(error)
        return 1
