"""Option groups that commands share, each a decorator; parsing and ranges here, meaning in the engine.

Place in the flow: `commands/*.py` stack these on their functions. Every option can also be set as ``MMI_OPTION`` or
``MMI_COMMAND_OPTION`` in the environment (`main.share_environment`); a value on the command line wins.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mmi_cli import console
from mmi_engine.errors import UsageError
from mmi_engine.locks import Part

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}  # of every command

SCHEDULERS = ("ddpm", "ddim", "dpm++", "unipc")
KERNELS = ("auto", "cuda", "torch", "numba")
DTYPES = ("auto", "fp32", "bf16", "fp16")


def stack(*decorators: Decorator[F]) -> Decorator[F]:
    """Apply decorators so that the first one's option comes first in the help."""

    def apply(function: F) -> F:
        return functools.reduce(lambda inner, decorator: decorator(inner), reversed(decorators), function)

    return apply


class DeviceType(click.ParamType):
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See click."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)):
            self.fail(f"{value!r} is no device; use auto, cpu, cuda or cuda:N", param, ctx)
        return str(value)


class BatchSizeType(click.ParamType):
    """``auto`` (None) or a number of at least 1."""

    name = "n|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """See click."""
        if value in (None, "auto"):
            return None
        try:
            number = int(value)
        except ValueError:
            number = 0
        if not 1 <= number <= 4096:
            self.fail(f"{value!r} is no batch size; use auto or a number from 1 to 4096", param, ctx)
        return number


class ShardType(click.ParamType):
    """``I/N`` with I from 1."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Part:
        """See click."""
        if isinstance(value, Part):
            return value
        try:
            return Part.parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class IdsType(click.ParamType):
    """A file with one id per line, as a set."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[str]:
        """See click."""
        if isinstance(value, frozenset):
            return value
        try:
            text = Path(value).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
            self.fail(f"{value!r} cannot be read: {reason}", param, ctx)
        return frozenset(line.rstrip("\r") for line in text.split("\n") if line.strip())


manifest_argument = click.argument("manifest", metavar="MANIFEST")

out_option = click.option("--out", metavar="DIR", help="Output folder; a run that is there already is resumed.")
out_or_stream = click.option(
    "--out", metavar="DIR|-", help="Output folder; a run that is there already is resumed. - streams rows to stdout."
)
template_option = click.option("--template", metavar="TEXT", help="Your own prompt, fields in braces.  [see below]")
candidate_options = stack(
    click.option(
        "--candidates",
        metavar="N",
        type=click.IntRange(1, 1000),
        default=1,
        show_default=True,
        help="Pictures drawn per row; all are kept unless --rerank.",
    ),
    click.option(
        "--rerank", metavar="MODEL|self", help="Keep the best: by a CLIP model directory, or by the model's captioning."
    ),
    click.option("--keep-all", is_flag=True, help="With --rerank: write every candidate, not the best alone."),
)

input_options = stack(
    click.option("--root", metavar="DIR", help="Folder image paths are relative to.  [default: the manifest's]"),
    click.option("--allow-urls", is_flag=True, help="Fetch http(s) images."),
)

model_options = stack(
    click.option("--model", default="toon", show_default=True, metavar="M", help="toon, a directory, or a hub id."),
    click.option("--device", type=DeviceType(), default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Number format."),
    click.option("--kernel", type=click.Choice(KERNELS), default="auto", show_default=True, help="Sampling kernel."),
    click.option(
        "--llm-bits", type=click.Choice(["8", "4"]), help="Quantise the language model's layers (needs bitsandbytes)."
    ),
    click.option(
        "--device-map",
        type=click.Choice(["auto"]),
        help="auto: layers that do not fit go elsewhere.",
    ),
    click.option(
        "--threads",
        metavar="N",
        type=click.IntRange(1, 1024),
        help="CPU threads.  [default: OMP_NUM_THREADS, else the physical cores]",
    ),
)

batch_options = stack(
    click.option(
        "--batch-size",
        type=BatchSizeType(),
        default="auto",
        show_default=True,
        help="Items at a time; auto tries the first item.",
    ),
    click.option("--seed", metavar="S", type=click.IntRange(0), default=0, show_default=True, help="Seed of the run."),
    click.option(
        "--compile",
        is_flag=True,
        help="Compile a token's and a denoising step: minutes at the start, faster steps.",
    ),
    click.option(
        "--cuda-graphs",
        is_flag=True,
        help="CUDA only: record a token's and a denoising step's kernels and replay them.",
    ),
)

image_options = stack(
    click.option(
        "--steps", metavar="N", type=click.IntRange(1, 10_000), help="Denoising steps.  [default: the model's]"
    ),
    click.option(
        "--guidance", metavar="X", type=click.FloatRange(0), help="Guidance scale, 1 for none.  [default: the model's]"
    ),
    click.option("--fast", is_flag=True, help="The model's quick steps and guidance."),
    click.option("--scheduler", type=click.Choice(SCHEDULERS), help="Noise scheduler.  [default: the model's]"),
)

text_options = stack(
    click.option("--beams", metavar="N", type=click.IntRange(1, 64), help="Beams, 1 for none.  [default: the task's]"),
    click.option("--temperature", metavar="X", type=click.FloatRange(0), help="Sampling temperature, 0 for greedy."),
    click.option("--top-p", metavar="X", type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling mass."),
    click.option("--max-new-tokens", metavar="N", type=click.IntRange(1, 100_000), help="Longest generated text."),
    click.option("--min-new-tokens", metavar="N", type=click.IntRange(0, 100_000), help="Shortest generated text."),
    click.option(
        "--repetition-penalty", metavar="X", type=click.FloatRange(0, min_open=True), help="Above 1: repeat less."
    ),
    click.option(
        "--batching",
        type=click.Choice(["fixed", "continuous"]),
        default="fixed",
        show_default=True,
        help="continuous: the next text takes a finished one's place; same tokens, other bytes; needs --beams 1.",
    ),
)

selection_options = stack(
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N rows."),
    click.option("--shard", type=ShardType(), default="1/1", help="Only part I of N, by a hash of the id."),
    click.option("--ids", type=IdsType(), help="Only the rows whose ids the file lists, one a line."),
)

resume_options = stack(
    click.option("--overwrite", is_flag=True, help="Start anew instead of resuming."),
    click.option("--retry-errors", is_flag=True, help="Work on failed rows again."),
    click.option(
        "--on-error",
        type=click.Choice(["skip", "stop"]),
        default="skip",
        show_default=True,
        help="What a failed row does to the run.",
    ),
    click.option("--dry-run", is_flag=True, help="Check the manifest and every image; load no model, write nothing."),
    click.option("--no-gallery", is_flag=True, help="Write no index.html."),
)


def message_options(function: F) -> F:
    """``--progress``, ``--log-format``, ``-q``, ``-v``: set up the console before the command starts."""

    @stack(
        click.option(
            "--progress",
            type=click.Choice(["auto", "off"]),
            default="auto",
            show_default=True,
            help="A bar, where stderr is a terminal.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            help="Messages as text, or a JSON object each.",
        ),
        click.option("-q", "--quiet", is_flag=True, help="Only what stops the run, and a line where items failed."),
        click.option("-v", "--verbose", count=True, help="More on stderr; -vv adds tracebacks."),
    )
    @functools.wraps(function)
    def wrapped(*args: Any, progress: str, log_format: str, quiet: bool, verbose: int, **kwargs: Any) -> Any:
        console.configure(-1 if quiet else min(verbose, 2), log_format == "json", progress == "auto")
        return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]
