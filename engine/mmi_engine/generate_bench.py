"""Benchmark of generation: every case in three forms, outputs compared, stages timed.

Place in the flow: `mmi bench generate` comes here. A case is a few documents that `generate.interleave` completes, by
the same code as the commands, with the same weights in the same process:

    kept     as the commands do it
    again    computed again where the released engine does so (`generate.reuse.LITERAL`), same algebra and kernels
    literal  again, and MMFS as the released engine writes it, sampling by `grid_sample` (`generate.literal`)

The keys of a text's own tokens are kept in all three.

A figure has sweep, x (what varies) and value, form, seconds (median), unit ("tokens", "images" or "items") and
per_second, and stages: the share of the time of each stage. Texts have two: sweeps "text" and "texts" are the whole,
"token" and "tokens of eight" the time after the prompts were read.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmi_engine.errors import OutputError, UsageError
from mmi_engine.generate.interleave import Document, Maker
from mmi_engine.generate.literal import literal
from mmi_engine.generate.reuse import LITERAL, Reuse
from mmi_engine.generate.settings import Settings
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.pieces import Piece
from mmi_engine.toon.draw import render
from mmi_engine.toon.world import sample_story
from mmi_engine.weights.store import write_text

Figure = dict[str, Any]
FORMS = {"kept": Reuse(), "again": LITERAL, "literal": LITERAL}
STAGES = {
    "encode": "encode",
    "_read": "read",
    "_request": "read",
    "_write": "text",
    "_denoise": "denoise",
    "_decode": "decode",
}
"""Methods of `Maker` and what their time is called; what is left over is called "rest"."""
TOKENS_OF = {"text": "token", "texts": "tokens of eight"}  # sweeps whose tokens have figures of their own
SENTENCE = "Pip runs to the lake near a red ball."
STORIES_EACH = 2  # of five pictures each; no case has more than eight
LEVELS_APART = 2  # pictures of two forms may differ by this many of 255 levels: sums are taken in another order


@dataclass(frozen=True)
class Case:
    """Documents of one shape: text of at least ``words`` tokens, ``images`` pictures, then what is to be made.

    Attributes:
        sweep, x: the curve this is a point of and what varies along it, an attribute's name.
        make: "text" (``tokens`` long), "image" (after ``steps`` denoising steps), or "story": ``frames`` further
            pictures, with a given text before each.
        context: how many of the pictures before it the U-Net looks at; 0: the model's own number.
    """

    sweep: str
    x: str
    make: str
    images: int = 1
    words: int = 0
    tokens: int = 0
    steps: int = 2
    batch: int = 1
    items: int = 1
    frames: int = 1
    context: int = 0

    @property
    def unit(self) -> str:
        """What is counted per second."""
        return (
            "items"
            if self.sweep in ("batch", "answers", "items", "story")
            else {"text": "tokens"}.get(self.make, "images")
        )

    @property
    def amount(self) -> int:
        """How many units one run makes."""
        return self.items * {"tokens": self.tokens, "images": 1, "items": 1}[self.unit]


def cases(quick: bool) -> list[Case]:
    """The shipped cases; ``quick``: fewer tokens and steps."""
    tokens, steps = (6, 2) if quick else (32, 10)
    found = [Case("text", "images", "text", images=n, tokens=tokens) for n in (1, 4, 8)]
    found += [Case("texts", "images", "text", images=n, tokens=tokens, batch=8, items=8) for n in (1, 4, 8)]
    found += [Case("text", "words", "text", words=n, tokens=tokens) for n in (64, 512)]
    found += [Case("picture", "images", "image", images=n, steps=steps) for n in (1, 4, 8)]
    found += [Case("picture", "steps", "image", steps=n * steps) for n in (1, 4)]
    found += [Case("picture", "context", "image", images=4, steps=steps, context=n) for n in (1, 2, 4)]
    found += [Case("batch", "batch", "image", steps=steps, batch=n, items=8) for n in (1, 8)]
    found += [Case("answers", "batch", "text", tokens=12, batch=n, items=8 if quick else 32) for n in (1, 8)]
    found += [Case("items", "items", "text", tokens=tokens, batch=4, items=n) for n in (4, 8, 16)]
    found += [Case("story", "frames", "story", steps=steps, frames=n) for n in (2, 4)]
    return found


def choose(todo: Sequence[Case], names: str) -> list[Case]:
    """The cases with these names.

    Args:
        todo: see `cases`.
        names: what a figure's "sweep" says, of one or more with commas between; empty: all.

    Raises:
        UsageError: there is no such case.
    """
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    known = dict.fromkeys(case.sweep for case in todo)
    known |= dict.fromkeys(TOKENS_OF[sweep] for sweep in known if sweep in TOKENS_OF)
    unknown = sorted(wanted - set(known))
    if unknown:
        raise UsageError(f"there is no case {unknown[0]!r}", remedy=f"choose from {', '.join(known)}")
    return [case for case in todo if not wanted or wanted & {case.sweep, TOKENS_OF.get(case.sweep)}]


def load(name: str, device: str, threads: int | None) -> MMInterleaved:
    """The model in the form that is measured: float32 on a CPU, bfloat16 on CUDA, the kernel chosen by itself.

    Args:
        name: ``toon`` or a directory.
        device: as `kernel_bench.device_of` returns it.
        threads: of a CPU; default `versions.default_threads`.

    Raises:
        ModelError: there is no such model.
    """
    from mmi_engine.model.checkpoint import load_model
    from mmi_engine.model_info import locate
    from mmi_engine.runtime import tune_cpu
    from mmi_engine.versions import default_threads

    tune_cpu(threads or default_threads())
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return load_model(locate(name), device=device, dtype=dtype).eval()


class TimedMaker(Maker):
    """A `Maker` that adds up the time of its stages, in seconds of ``clock``."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]  # time of stages within the one at work
        self.clock: Callable[[], float] = time.perf_counter
        for method, stage in STAGES.items():
            setattr(self, method, self._timed(getattr(self, method), stage))

    def _timed(self, method: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = self.now()
            self._inner.append(0.0)
            result = method(*arguments, **named)
            taken = self.now() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + taken - self._inner.pop()
            self._inner[-1] += taken
            return result

        return call

    def now(self) -> float:
        """The clock, after the device has finished."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return self.clock()


def run(
    model: MMInterleaved,
    todo: Sequence[Case],
    *,
    repeats: int = 1,
    clock: str = "wall",
    on_case: Callable[[str], None] = lambda name: None,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run every case in all forms. Returns {"complete", "machine", "model", "clock", "peak_bytes", "figures",
    "troubles"}.

    Args:
        model: with its tokenizer, in evaluation.
        todo: see `cases`.
        repeats: of each form, in turns; the figure is their median.
        clock: "wall", or "processor": this process's own time, for a CPU that others use too.
        on_case: called with the name of each case before it is run.
        on_result: called after each case with what is known so far, "complete" only after the last.

    Raises:
        TextTooLongError: a case does not fit into the model's context.
    """
    from mmi_engine.versions import versions
    from mmi_kernels.bench import machine

    ticks = {"wall": time.perf_counter, "processor": time.process_time}[clock]
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    figures: list[Figure] = []
    troubles: list[dict[str, str]] = []
    about = {
        "machine": machine(model.device) | {"versions": versions()},
        "model": model.config.name,
        "clock": clock,
    }
    result: dict[str, Any] = {}
    once(model, replace(todo[0], make="story", tokens=1, steps=1), Reuse(), ticks)  # compiles kernels
    for number, case in enumerate(todo, 1):
        on_case(f"{case.sweep}, {getattr(case, case.x)} {case.x}")
        runs: dict[str, list[tuple[float, dict[str, float], list[Piece]]]] = {form: [] for form in FORMS}
        for _ in range(repeats):
            for form, reuse in FORMS.items():
                with literal(model) if form == "literal" else nullcontext():
                    runs[form].append(once(model, case, reuse, ticks))
        figures += [_figure(case, form, results) for form, results in runs.items()]
        if case.sweep in TOKENS_OF:
            figures += [_token_figure(case, form, results) for form, results in runs.items()]
        for form in list(FORMS)[1:]:
            difference = apart(runs["kept"][0][2], runs[form][0][2])
            if difference:
                where = {"sweep": case.sweep, "x": case.x, "value": str(getattr(case, case.x))}
                troubles.append({**where, "reason": f"{form}: {difference}"})
        known = {"peak_bytes": _peak(model.device), "figures": figures, "troubles": troubles}
        result = {"complete": number == len(todo)} | about | known
        on_result(result)
    return result


def _peak(device: torch.device) -> int:
    """Most memory held since the start of the run (CUDA) or of the process (CPU)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def once(
    model: MMInterleaved, case: Case, reuse: Reuse, ticks: Callable[[], float]
) -> tuple[float, dict[str, float], list[Piece]]:
    """Seconds, seconds per stage, and all pieces that were made."""
    settings = Settings(steps=case.steps, max_new_tokens=max(case.tokens, 1), min_new_tokens=case.tokens)
    documents = [Document(_pieces(model, case, number), number, 0) for number in range(case.items)]
    maker = TimedMaker(model, settings, case.batch, reuse=reuse)
    maker.clock = ticks
    if case.context:
        decoder = replace(model.config.image_decoder, context_images=case.context)
        maker.config = replace(model.config, image_decoder=decoder)
    start = maker.now()
    while maker.round(documents):
        pass
    seconds = maker.now() - start
    given = len(_pieces(model, case, 0))
    return seconds, maker.seconds, [piece for document in documents for piece in document.pieces[:given]]


def _pieces(model: MMInterleaved, case: Case, number: int) -> list[Piece]:
    """Document ``number`` of a case; no two pictures are the same."""
    text = SENTENCE
    while len(model.tokenizer.encode(text)) < case.words:
        text += f" {SENTENCE}"
    side = model.config.vision.image_size
    # Of the built-in world: behind pictures of noise the smallest rounding grows with every picture that is read again.
    stories = [sample_story(STORIES_EACH * number + n, "test").scenes for n in range(STORIES_EACH)]
    scenes = [scene for story in stories for scene in story]
    drawn = [render(scene).convert("RGB").resize((side, side)) for scene in scenes[: case.images]]
    pieces = [Piece("text", text), *[Piece("image", picture) for picture in drawn]]
    if case.make == "story":
        return [*pieces, *[piece for _ in range(case.frames) for piece in (Piece("text", SENTENCE), Piece("image"))]]
    return [*pieces, Piece("text" if case.make == "text" else "image")]


def apart(kept: Sequence[Piece], again: Sequence[Piece]) -> str:
    """What differs between two results; empty where tokens agree and pictures within ``LEVELS_APART`` levels."""
    for one, other in zip(kept, again, strict=True):
        if one.kind == "text" and one.value != other.value:
            return f"another text: {one.value!r} and {other.value!r}"
        if one.kind == "image":
            gap = int(np.abs(np.asarray(one.value, int) - np.asarray(other.value, int)).max())
            if gap > LEVELS_APART:
                return f"pictures are {gap} of 255 levels apart"
    return ""


def _figure(case: Case, form: str, results: Sequence[tuple[float, dict[str, float], list[Piece]]]) -> Figure:
    seconds = statistics.median(taken for taken, _, _ in results)
    total = sum(taken for taken, _, _ in results)
    names = dict.fromkeys(stage for _, stages, _ in results for stage in stages)
    shares = {name: sum(stages.get(name, 0.0) for _, stages, _ in results) / total for name in names}
    where = {"sweep": case.sweep, "x": case.x, "value": getattr(case, case.x), "form": form, "repeats": len(results)}
    rate = {"seconds": seconds, "unit": case.unit, "per_second": case.amount / seconds}
    return where | rate | {"stages": shares | {"rest": 1 - sum(shares.values())}}


def _token_figure(case: Case, form: str, results: Sequence[tuple[float, dict[str, float], list[Piece]]]) -> Figure:
    """Of the tokens after the first, which reading the prompt gives."""
    seconds = statistics.median(stages["text"] for _, stages, _ in results)
    where = {
        "sweep": TOKENS_OF[case.sweep],
        "x": case.x,
        "value": getattr(case, case.x),
        "form": form,
        "repeats": len(results),
    }
    rate = {"seconds": seconds, "unit": "tokens", "per_second": case.items * (case.tokens - 1) / seconds}
    return where | rate | {"stages": {"text": 1.0}}


def alike(figures: Sequence[Figure]) -> list[dict[str, Figure]]:
    """Form → figure of every case."""
    found: dict[tuple[str, str, int], dict[str, Figure]] = {}
    for figure in figures:
        found.setdefault((figure["sweep"], figure["x"], figure["value"]), {})[figure["form"]] = figure
    return list(found.values())


def table(figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    """Rows of text, the first a header; in brackets the time of a form over that of "kept"."""
    rows: list[tuple[str, ...]] = [("case", "varies", "value", *FORMS, "per second", "stages, kept")]
    for forms in alike(figures):
        kept = forms["kept"]
        shares = sorted(kept["stages"].items(), key=lambda item: -item[1])
        stages = ", ".join(f"{name} {share:.0%}" for name, share in shares[:3] if share >= 0.01)
        rates = [f"{kept['per_second']:.3g}"]
        for form in list(FORMS)[1:]:
            rates.append(f"{forms[form]['per_second']:.3g} ({forms[form]['seconds'] / kept['seconds']:.2f}×)")
        rows.append((kept["sweep"], kept["x"], str(kept["value"]), *rates, kept["unit"], stages))
    return rows


def write(result: dict[str, Any], out: Path | None, picture: Path | None) -> None:
    """JSON and plot into files, where asked for, the JSON as a whole or not at all. Raises OutputError."""
    try:
        if out is not None:
            write_text(out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        if picture is not None:
            plot(result, picture)
    except (OSError, ValueError) as error:
        raise OutputError(f"the figures cannot be written: {error}", remedy="choose another file") from error


def plot(result: dict[str, Any], path: Path) -> None:
    """Seconds over what varies, one panel per curve, all forms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[tuple[str, str], list[dict[str, Figure]]] = {}
    for forms in alike(result["figures"]):
        curves.setdefault((forms["kept"]["sweep"], forms["kept"]["x"]), []).append(forms)
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(3.2 * columns, 3 * rows), squeeze=False)
    for axes in panels.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, ((sweep, x), points) in zip(panels.flat, curves.items(), strict=False):
        for form in FORMS:
            axes.plot([p[form]["value"] for p in points], [p[form]["seconds"] for p in points], "o-", label=form)
        axes.set_title(sweep, fontsize=10)
        axes.set_xlabel(x)
        axes.set_ylim(bottom=0)
    panels[0][0].set_ylabel(f"seconds ({result['clock']})")
    panels[0][0].legend(frameon=False)
    figure.suptitle(f"{result['model']} on {result['machine']['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
