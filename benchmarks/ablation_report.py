"""Report of `ablation_toon.py`: figures of runs → report.json, table.md, plot.png, sheet.png.

A table or plot has one row per recipe, the mean over seeds ± their standard deviation, and the difference to the first
recipe of the same kind: mean over seeds that both have of (this − that), with the 95 % interval of Student's t. The
interval is about seeds (weights, data order); test items are the same in all runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SHOWN_ITEMS, SHOWN_STORIES, FRAMES, SIDE = 8, 2, 5, 128
MEASURES = {
    ("seg2img", "mIoU"): "maps: mIoU",
    ("stories", "unstated attributes"): "stories: unstated",
    ("stories", "sun"): "side of the sun",
    ("stories", "hat"): "hat",
    ("stories", "shirt"): "shirt",
    ("stories", "number"): "number",
    ("stories", "character"): "character",
    ("stories", "place"): "place",
    ("vqa", "number"): "questions: number",
    ("vqa", "exact answer"): "questions: all",
    ("captions", "every stated attribute"): "captions: all right",
}
"""(part, measure of the toon suite) → heading."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t for 1 … 9 degrees of freedom."""
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


@dataclass(frozen=True)
class Run:
    """One recipe at one seed: ``parts`` is part → measure → value and interval; ``failed`` says why there are none."""

    recipe: str
    seed: int
    kind: str = ""
    changes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    generation_seconds: float = 0.0
    held_out: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    """``machine``, ``steps`` of sampling (None: the model's own) and ``items`` by part."""
    parts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    failed: str = ""

    def value(self, key: tuple[str, str]) -> float:
        """A measure; NaN where this run has it not."""
        found = self.parts.get(key[0], {}).get(key[1], {}).get("value")
        return math.nan if found is None else float(found)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n − 1) of what is known; NaN where nothing is, or where one value has no spread."""
    known = [v for v in values if not math.isnan(v)]
    mean = float(np.mean(known)) if known else math.nan
    return mean, float(np.std(known, ddof=1)) if len(known) > 1 else math.nan


def difference(runs: Sequence[Run], recipe: str, against: str, key: tuple[str, str]) -> tuple[float, float, int]:
    """Mean of (recipe − against) over seeds that both have, half of its 95 % interval (NaN for one seed), seeds."""
    by_seed = {(run.recipe, run.seed): run.value(key) for run in runs}
    pairs = [
        (value, by_seed.get((against, seed), math.nan)) for (name, seed), value in by_seed.items() if name == recipe
    ]
    apart = [a - b for a, b in pairs if not math.isnan(a - b)]
    if len(apart) < 2:
        return (apart[0] if apart else math.nan), math.nan, len(apart)
    quantile = STUDENT[min(len(apart) - 2, len(STUDENT) - 1)]  # beyond the table its last value, a little too wide
    return float(np.mean(apart)), quantile * float(np.std(apart, ddof=1)) / math.sqrt(len(apart)), len(apart)


def kinds(runs: Sequence[Run], order: Sequence[str]) -> dict[str, list[str]]:
    """Kind → its recipes with figures, in the order of the call; the first is what the others are compared with."""
    found: dict[str, list[str]] = {}
    for name in order:
        kind = next((run.kind for run in runs if run.recipe == name and run.parts), "")
        if kind and name not in found.setdefault(kind, []):
            found[kind].append(name)
    return found


def measured(runs: Sequence[Run], recipes: Sequence[str]) -> list[tuple[str, str]]:
    """The measures that any run of these recipes has."""
    mine = [run for run in runs if run.recipe in recipes]
    return [key for key in MEASURES if any(not math.isnan(run.value(key)) for run in mine)]


def _digits(key: tuple[str, str]) -> int:
    return 3 if key[1] == "mIoU" else 1


def machines(runs: Sequence[Run]) -> str:
    """Names of the devices that the runs were made on."""
    return ", ".join(dict.fromkeys(run.measured["machine"]["name"] for run in runs if run.measured))


def table(runs: Sequence[Run], order: Sequence[str]) -> str:
    """Markdown: a table of values and one of differences for every kind, and what failed."""
    lines = []
    for shown in dict.fromkeys(json.dumps(run.measured) for run in runs if run.parts):
        facts = json.loads(shown)
        items = ", ".join(f"{count} {part}" for part, count in facts.get("items", {}).items())
        name = facts.get("machine", {}).get("name", "")
        lines += [f"{name}; {facts.get('steps') or 'the model’s own'} steps of sampling; {items}.", ""]
    for names in kinds(runs, order).values():
        keys = measured(runs, names)
        head = "| recipe | seeds | " + " | ".join(MEASURES[key] for key in keys) + " | training, s |"
        rule = "|---" * (len(keys) + 3) + "|"
        rows, apart = [], []
        for name in names:
            mine = [run for run in runs if run.recipe == name and run.parts]
            cells = [_pm(*spread([run.value(key) for run in mine]), _digits(key)) for key in keys]
            seconds = spread([run.seconds for run in mine])[0]
            rows.append(f"| `{name}` | {len(mine)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
            if name != names[0]:
                found = [difference(runs, name, names[0], key) for key in keys]
                cells = [_pm(*one[:2], _digits(key), sign="+") for one, key in zip(found, keys, strict=True)]
                apart.append(f"| `{name}` | {max(one[2] for one in found)} | " + " | ".join(cells) + " | |")
        lines += ["Mean ± standard deviation over seeds:", "", head, rule, *rows, ""]
        if apart:
            lines += [
                f"Difference to `{names[0]}` at equal seeds ± half of its 95 % interval:",
                "",
                head,
                rule,
                *apart,
                "",
            ]
    lines += [f"failed: `{run.recipe}`, seed {run.seed}: {run.failed}" for run in runs if run.failed]
    return "\n".join(lines) + "\n"


def _pm(mean: float, half: float, digits: int, sign: str = "") -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def plot(runs: Sequence[Run], order: Sequence[str], path: Path, title: str) -> None:
    """One panel per measure: every seed a point, the mean a bar, what needs no training a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(names, key) for names in kinds(runs, order).values() for key in measured(runs, names)]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    tallest = max(len(names) for names, _ in panels)
    figure = Figure(figsize=(3.1 * columns + 1.6, rows * (0.9 + 0.3 * tallest) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for number, axis in enumerate(grid):
        if number >= len(panels):
            axis.set_visible(False)
            continue
        names, key = panels[number]
        first = number % columns == 0 or panels[number - 1][0] is not names
        _panel(axis, runs, names, key, named=first)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _panel(axis: Any, runs: Sequence[Run], names: list[str], key: tuple[str, str], *, named: bool) -> None:
    for place, name in enumerate(reversed(names)):
        color = COLORS[names.index(name) % len(COLORS)]
        values = [run.value(key) for run in runs if run.recipe == name and not math.isnan(run.value(key))]
        axis.barh([place], [np.mean(values) if values else 0.0], height=0.62, color=color, alpha=0.3)
        axis.plot(values, [place] * len(values), "o", color=color, markersize=4.5)
    some = next((run for run in runs if not math.isnan(run.value(key))), None)
    baselines = some.parts[key[0]][key[1]].get("baselines", {}) if some else {}
    guesses = {name: value for name, value in baselines.items() if name != "copy"}  # a story's first frame, repeated
    known = {name: value for name, value in guesses.items() if value is not None and not math.isnan(value)}
    if known:
        best = max(known, key=lambda name: known[name])
        axis.axvline(known[best], color="#444444", linestyle="--", linewidth=1)
        axis.text(known[best], len(names) - 0.45, best, fontsize=7, color="#444444", ha="center", va="bottom")
    labels = [name.removeprefix("ablation_toon_") for name in reversed(names)] if named else [""] * len(names)
    axis.set_yticks(range(len(names)), labels, fontsize=8)
    axis.set_ylim(-0.6, len(names) - 0.1)
    axis.set_xlim(left=0)
    axis.set_title(MEASURES[key] + ("" if key[1] == "mIoU" else ", %"), fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=7)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def sheet(out: Path, runs: Sequence[Run], names: Sequence[str], manifests: dict[str, Path], path: Path) -> bool:
    """Maps, truth and each recipe's pictures (its first seed); below, stories, their first picture given.

    Returns:
        False where there is nothing to show, and no file.
    """
    from PIL import Image, ImageDraw, ImageFont

    made = {name: _folder(out, runs, name) for name in names}
    rows: list[tuple[str, list[Path | None]]] = []
    if "seg2img" in manifests:
        truth = _rows(manifests["seg2img"], SHOWN_ITEMS)
        rows += [("map", [folder / row["segmentation"] for folder, row in truth])]
        rows += [("truth", [folder / row["meta"]["image"] for folder, row in truth])]
        rows += [(n, [f and f / f"seg2img-{k}-0.png" for k in range(len(truth))]) for n, f in made.items()]
    if "stories" in manifests:
        truth = _rows(manifests["stories"], SHOWN_STORIES)
        true = [[folder / image for image in row["meta"]["images"]] for folder, row in truth]
        rows += [("truth, first given", [image for story in true for image in story])]
        for name, folder in made.items():
            drawn = [
                image if frame == 0 else folder and folder / f"stories-{k}-{frame - 1}.png"
                for k, story in enumerate(true)
                for frame, image in enumerate(story)
            ]
            rows += [(name, drawn)]
    if not rows or not any(made.values()):
        return False
    left, gap = 150, 4
    width = left + max(len(images) for _, images in rows) * (SIDE + gap)
    canvas = Image.new("RGB", (width, len(rows) * (SIDE + gap) + gap), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for line, (name, images) in enumerate(rows):
        top = gap + line * (SIDE + gap)
        pen.text((8, top + SIDE // 2 - 8), name.removeprefix("ablation_toon_").replace(", ", ",\n"), "black", font=font)
        for column, image in enumerate(images):
            if image is not None and image.is_file():
                with Image.open(image) as picture:
                    canvas.paste(picture.convert("RGB").resize((SIDE, SIDE)), (left + column * (SIDE + gap), top))
    canvas.quantize(256, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)
    return True


def _folder(out: Path, runs: Sequence[Run], name: str) -> Path | None:
    """The pictures of a recipe's first seed that has any."""
    seeds = sorted(run.seed for run in runs if run.recipe == name and run.parts)
    found = (out / "pictures" / f"{name}-{seed}" for seed in seeds)
    return next((folder for folder in found if folder.is_dir()), None)


def _rows(manifest: Path, count: int) -> list[tuple[Path, dict[str, Any]]]:
    lines = manifest.read_text(encoding="utf-8").splitlines()[:count]
    return [(manifest.parent, json.loads(line)) for line in lines]


def write_report(out: Path, runs: Sequence[Run], order: Sequence[str], manifests: dict[str, Path]) -> None:
    """All four files into ``out``; plot and sheet only where a run has figures."""
    content = {"runs": [asdict(run) for run in runs]}
    (out / "report.json").write_text(json.dumps(content, indent=1, allow_nan=True) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(runs, order), encoding="utf-8")
    found = kinds(runs, order)
    if any(measured(runs, names) for names in found.values()):
        title = f"Ablations of the embedded model ({machines(runs)}); points: seeds, dashed: best blind guess"
        plot(runs, order, out / "plot.png", title)
    sheet(out, runs, [*found.get("pictures", []), *found.get("both", [])], manifests, out / "sheet.png")
