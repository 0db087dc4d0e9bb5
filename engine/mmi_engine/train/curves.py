"""``metrics.jsonl`` of a run and the picture of it, ``curves.png``.

One JSON object per line: ``step`` and whatever was measured there; held-out figures begin with ``val_``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

UNPLOTTED = ("step", "seconds", "eta_s")


class MetricsFile:
    """Appends lines to ``directory/metrics.jsonl``; does nothing when not ``enabled`` (other processes)."""

    def __init__(self, directory: Path, *, enabled: bool = True) -> None:
        self.path, self.enabled = directory / "metrics.jsonl", enabled
        self.file: TextIO | None = None

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and flush it."""
        if not self.enabled:
            return
        if self.file is None:
            self.file = self.path.open("a", encoding="utf-8")
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def cut(self, step: int) -> None:
        """Drop the lines after ``step``, and a last line that was cut short: a resumed run writes them again."""
        if not self.enabled or not self.path.exists():
            return
        kept = [line for line in read(self.path) if line["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)

    def plot(self) -> None:
        """Write ``curves.png`` beside the file."""
        if self.enabled and self.path.exists():
            plot(read(self.path), self.path.with_name("curves.png"))

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self.file is not None:
            self.file.close()
            self.file = None


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; an incomplete last line (a run that was killed) is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """One small panel per measured quantity over the step, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({key for line in lines for key in line if key not in UNPLOTTED})
    if not names:
        return
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, number + 1)
        points = [(line["step"], line[name]) for line in lines if name in line]
        values = [value for _, value in points]
        axes.plot([step for step, _ in points], values, linewidth=1.2, marker="." if len(points) < 30 else "")
        if name != "lr" and values and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
