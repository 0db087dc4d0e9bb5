"""A benchmark figure of a model directory: held-out rows through the command itself, scored as `mmi eval` scores them.

Place in the flow: ``finetune.py`` measures the base before training and the result after it, with nothing shared with
the training code, so the figure is the one that a user of the two model directories would find.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmi_engine.errors import ConfigError
from mmi_engine.train.sections import MeasureConfig


def measure(
    model: Path | str,
    config: MeasureConfig,
    manifest: Path,
    out: Path,
    threads: int | None = None,
    encoder: str = "",
) -> dict[str, Any]:
    """Generate for the first ``items`` rows and score them.

    Args:
        model: a model directory, or ``toon``.
        config: task, metric and options.
        manifest: held-out rows with their truth.
        out: folder of the results; what is there already is not made again.
        threads: of the CPU.
        encoder: model whose encoder serves the encoder distances; empty means ``model``, which changes with training.

    Returns:
        ``name``, ``value``, ``low``, ``high`` of the measure, ``items``, and all ``measures``.
    """
    from mmi_engine.metrics import pairs, produce, score
    from mmi_engine.metrics.base import Options
    from mmi_engine.metrics.suite import Goal, Part

    goals = (Goal(config.metric),)
    part = Part(manifest.stem, config.task, goals, ask=dict(config.ask), decoding=dict(config.settings))
    task, _ = produce.task_of(part, str(model))
    choices: dict[str, Any] = {"model": str(model)}
    if threads:
        choices["threads"] = threads
    produce.produce(part, task, manifest, out, choices, limit=config.items)
    references = pairs.read_references(manifest)
    references = references.only(row.id for row in references.rows[: config.items])
    cards = score.evaluate([config.metric], references, pairs.read_results(out), Options(model=encoder or str(model)))
    first = _chosen(cards[0], config)
    return {
        "name": f"{cards[0].metric} {first.name}",
        "value": float(first.value),
        "low": float(first.low),
        "high": float(first.high),
        "unit": first.unit,
        "items": cards[0].items,
        "measures": {m.name: float(m.value) for m in cards[0].measures},
    }


def _chosen(card: Any, config: MeasureConfig) -> Any:
    """The measure that the recipe names; raises ConfigError where the metric has no such one."""
    if not config.measure:
        return card.headline
    found = next((measure for measure in card.measures if measure.name == config.measure), None)
    if found is None:
        names = ", ".join(measure.name for measure in card.measures)
        raise ConfigError(
            f"measure.measure: {config.metric} has no {config.measure!r}", remedy=f"its measures: {names}"
        )
    return found
