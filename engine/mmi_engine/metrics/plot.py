"""A picture per metric: every run's measures with their intervals.

Place in the flow: `mmi eval A B … --out DIR` writes ``DIR/METRIC.png``. One panel
per measure, a point per run, the bar is the 95 % interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmi_engine.metrics.score import Card

COLORS = ("#4c566a", "#b4531f", "#2e7d6b", "#7a4fa3", "#a3262a", "#3b6ea5")


def plot(cards: Sequence[Card], path: Path) -> Path:
    """Draw one metric of several runs and save it as PNG.

    Args:
        cards: one per run, of the same metric.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [measure.name for measure in cards[0].measures]
    figure = Figure(figsize=(7.2, 0.8 + len(names) * (0.55 + 0.28 * len(cards))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for row, (name, axis) in enumerate(zip(names, axes, strict=True)):
        for k, card in enumerate(cards):
            measure = card.measures[row]
            y, color = len(cards) - 1 - k, COLORS[k % len(COLORS)]
            if np.isfinite(measure.low):
                axis.plot([measure.low, measure.high], [y, y], color=color, linewidth=6, alpha=0.35)
            if np.isfinite(measure.value):
                axis.plot([measure.value], [y], "o", color=color, markersize=7)
        axis.set_yticks(range(len(cards)), [label(card.run) for card in reversed(cards)])
        axis.set_ylim(-0.6, len(cards) - 0.4)
        measure = cards[0].measures[row]
        arrow = "higher is better" if measure.higher else "lower is better"
        axis.set_title(f"{name}{f' ({measure.unit})' if measure.unit else ''}, {arrow}", loc="left", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(left=False)
    figure.suptitle(
        f"{cards[0].metric}, {cards[0].variant}: {cards[0].items} items, bars are 95 % intervals", fontsize=10
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def label(run: str) -> str:
    """The last part of a run's path, short enough for an axis; dollar signs would be read as formulas."""
    text = Path(run.rstrip("/")).name or run
    return (text if len(text) <= 28 else text[:27] + "…").replace("$", r"\$")
