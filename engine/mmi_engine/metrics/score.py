"""One run against its references: metrics, intervals, cards, metrics.json.

Place in the flow: `mmi eval RESULTS REFERENCES` calls `evaluate` and `write`. Per metric: read the truth of every item
(a reference that cannot serve ends the evaluation), read what was made (a result that cannot serve makes the item
`unusable`), score, put intervals on it. Items that are missing, failed or unusable count as wrong, or with
``missing="skip"`` are left out; they are listed either way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmi_engine.errors import ItemError, ManifestError, OutputError
from mmi_engine.metrics import registry
from mmi_engine.metrics.base import Measure, Metric, Options, Scores
from mmi_engine.metrics.bootstrap import add_intervals
from mmi_engine.metrics.pairs import SHOWN, Pair, References, Results, pair
from mmi_engine.versions import versions

POLICIES = ("wrong", "skip")
LISTED = 1000  # problem items named in metrics.json


@dataclass
class Card:
    """A score with its name.

    Attributes:
        metric, variant: as on the command line; differs: what the released variant does otherwise.
        run: the results' name; items: scored ones; references: per item.
        missing, failed, unusable: ids with reason; extra: results that no reference asks for.
        policy: what was done with the former three.
        measures, notes, implementation: see `Scores`.
        ids: of the scored items, in order; pairs likewise.
    """

    metric: str
    variant: str
    run: str
    measures: list[Measure]
    items: int
    references: float
    implementation: str
    policy: str
    differs: str = ""
    notes: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list, repr=False)
    resamples: int = 0

    @property
    def headline(self) -> Measure:
        """The metric's first measure."""
        return self.measures[0]

    @property
    def problems(self) -> int:
        """How many items had no usable result."""
        return len(self.missing) + len(self.failed) + len(self.unusable)

    def to_json(self) -> dict[str, Any]:
        """Plain values for metrics.json."""
        measures = {
            m.name: {
                "value": _plain(m.value),
                "low": _plain(m.low),
                "high": _plain(m.high),
                "unit": m.unit,
                "higher_is_better": m.higher,
                "resamples": 0 if m.draws is None else len(m.draws),
                **({"items": m.counted} if m.counted is not None else {}),
                **({"baselines": {name: _plain(value) for name, value in m.baselines.items()}} if m.baselines else {}),
            }
            for m in self.measures
        }
        lists = {name: getattr(self, name) for name in ("missing", "failed", "unusable")}
        return {
            "metric": self.metric, "variant": self.variant, "measures": measures, "items": self.items,
            "references_per_item": self.references, "policy": self.policy,
            "counts": {**{name: len(ids) for name, ids in lists.items()}, "extra": len(self.extra)},
            **{name: dict(list(ids.items())[:LISTED]) for name, ids in lists.items()},
            "extra": self.extra[:LISTED], "implementation": self.implementation, "notes": self.notes,
        }  # fmt: skip


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def evaluate(
    names: Sequence[str],
    references: References,
    results: Results,
    options: Options,
    *,
    policy: str = "wrong",
    resamples: int = 1000,
) -> list[Card]:
    """Score one run.

    Args:
        names: of metrics; several share one reading of the rows.
        references, results: see `pairs.py`.
        options: variant and resources.
        policy: ``wrong`` or ``skip``, for items without a usable result.
        resamples: of the bootstrap; 0 for no intervals.

    Raises:
        ManifestError: references that cannot serve, or not a single usable result.
        UsageError: an unknown metric, or one without what it needs.
    """
    pairs, extra = pair(references, results)
    cards = []
    for name in names:
        card = _card(name, pairs, results.name, options, policy)
        card.extra, card.resamples = extra, resamples
        add_intervals(card.measures, card.items, resamples)
        cards.append(card)
    return cards


def _card(name: str, pairs: list[Pair], run: str, options: Options, policy: str) -> Card:
    metric = registry.make(name, options)
    name = registry.canonical(name)
    if options.released and getattr(metric, "skips_missing", False):
        policy = "skip"
    truths = _truths(name, metric, pairs)
    made: list[Any] = []
    problems: dict[int, str] = {}
    for index, item in enumerate(pairs):
        value = None
        if item.problem is None:
            try:
                value = metric.prediction(item)
            except ItemError as error:
                problems[index] = f"{item.result_place}: {error}"
        made.append(value)
    without = {k for k, item in enumerate(pairs) if item.problem is not None} | problems.keys()
    _anything(name, pairs, without, problems, policy)
    scores, kept = _score(metric, truths, made, without if policy == "skip" else set())
    problems |= {index: f"{pairs[index].result_place}: {why}" for index, why in scores.problems.items()}
    _anything(name, pairs, without | problems.keys(), problems, policy)
    if policy == "skip" and scores.problems:
        scores, kept = _score(metric, truths, made, without | problems.keys())
    card = Card(
        metric=name, variant=options.variant, run=run, measures=scores.measures, items=len(kept),
        references=scores.references, implementation=scores.implementation, policy=policy, differs=metric.differs,
        notes=scores.notes, pairs=[pairs[k] for k in kept],
    )  # fmt: skip
    card.unusable = {pairs[index].id: problems[index] for index in sorted(problems)}
    for item in pairs:
        if item.problem == "missing":
            card.missing[item.id] = item.problem
        elif item.problem is not None:
            card.failed[item.id] = item.problem
    return card


def _truths(name: str, metric: Metric, pairs: list[Pair]) -> list[Any]:
    truths, broken = [], []
    for item in pairs:
        try:
            truths.append(metric.reference(item))
        except ItemError as error:
            broken.append(f"{item.place}: {error}")
    if broken:
        more = f" (and {len(broken) - SHOWN} more)" if len(broken) > SHOWN else ""
        raise ManifestError(f"--metric {name}: " + "; ".join(broken[:SHOWN]) + more)
    return truths


def _score(metric: Metric, truths: list[Any], made: list[Any], leave: set[int]) -> tuple[Scores, list[int]]:
    kept = [k for k in range(len(truths)) if k not in leave]
    scores = metric.score([truths[k] for k in kept], [made[k] for k in kept])
    return replace(scores, problems={kept[k]: why for k, why in scores.problems.items()}), kept


def _anything(name: str, pairs: list[Pair], without: set[int], problems: dict[int, str], policy: str) -> None:
    """Raises ManifestError where nothing is left to score, or where every single result is unusable: that is no bad
    model but another metric's results. A run of which all items failed scores as such."""
    if len(without) < len(pairs) or (pairs and not problems and policy == "wrong"):
        return
    first = next(iter(problems.values()), None) or next((p.problem for p in pairs if p.problem), "no items")
    raise ManifestError(f"--metric {name}: none of {len(pairs)} items has a usable result; the first: {first}")


def write(cards: list[Card], out: Path, about: dict[str, Any]) -> Path:
    """Add cards to ``metrics.json`` of a folder; a metric and variant that is there already is replaced.

    Args:
        about: what else belongs beside the numbers (names and fingerprints of the inputs).
    """
    path = out / "metrics.json"
    try:
        content = json.loads(path.read_bytes())
        content = content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        content = {}
    before = content.get("scores")
    scores: dict[str, Any] = before if isinstance(before, dict) else {}
    for card in cards:
        key = card.metric if card.variant == "default" else f"{card.metric}/{card.variant}"
        scores[key] = {**card.to_json(), **about}
    return write_json(path, content | {"scores": scores, "versions": versions()})


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a document; see `write_text`."""
    return write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a file under a temporary name, then rename.

    Raises:
        OutputError: the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".partial")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        remedy = "name a folder that can be written: --out DIR"
        raise OutputError(f'cannot write "{path}": {error.strerror or error}', remedy=remedy) from error
    return path
