"""Runs side by side: the same metrics, the same items, differences with paired tests.

Place in the flow: `mmi eval A B … --references R` calls `compare`; `plot.py` draws what it returns. The first run is
the baseline. Under ``missing="skip"`` only the items that every run has a usable result for are compared; under
``wrong`` every run answers for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmi_engine.errors import ManifestError, UsageError
from mmi_engine.metrics.base import Options
from mmi_engine.metrics.bootstrap import Difference, paired
from mmi_engine.metrics.pairs import References, Results
from mmi_engine.metrics.score import Card, evaluate


@dataclass(frozen=True)
class Comparison:
    """One metric over all runs.

    Attributes:
        metric: its name; cards: one per run, the baseline first.
        differences: per further run, measure name → difference from the baseline.
    """

    metric: str
    cards: list[Card]
    differences: list[dict[str, Difference]]

    def to_json(self) -> dict[str, Any]:
        """Plain values for metrics.json."""
        return {
            "metric": self.metric,
            "runs": [{"name": card.run, **card.to_json()} for card in self.cards],
            "differences": [
                {
                    name: {**{k: plain(v) for k, v in vars(difference).items()}, "baseline": self.cards[0].run}
                    for name, difference in found.items()
                }
                for found in self.differences
            ],
        }


def plain(value: Any) -> Any:
    """NaN as None: JSON has no other word for it."""
    return None if isinstance(value, float) and value != value else value


def compare(
    names: Sequence[str],
    references: References,
    runs: Sequence[Results],
    options: Options,
    *,
    policy: str = "wrong",
    resamples: int = 1000,
) -> list[Comparison]:
    """Score several runs over the same references, and each of them against the first.

    Raises:
        UsageError: fewer than two runs.
        ManifestError: as `evaluate`; or the runs have no item in common.
    """
    if len(runs) < 2:
        raise UsageError("a comparison needs at least two runs", remedy="name two output directories")
    found = []
    for name in names:
        cards = [_one(name, references, run, options, policy, resamples) for run in runs]
        if any(card.policy == "skip" for card in cards):
            common = set.intersection(*({item.id for item in card.pairs} - card.unusable.keys() for card in cards))
            if not common:
                raise ManifestError(f"--metric {name}: the runs have no usable item in common")
            if any(card.items != len(common) for card in cards):
                shared = references.only(common)
                cards = [_one(name, shared, run, options, policy, resamples) for run in runs]
        differences = [
            {
                measure.name: paired(measure, base, card.items, resamples)
                for measure, base in zip(card.measures, cards[0].measures, strict=True)
            }
            for card in cards[1:]
        ]
        found.append(Comparison(name, cards, differences))
    return found


def _one(
    name: str, references: References, run: Results, options: Options, policy: str, resamples: int
) -> Card:  # fmt: skip
    return evaluate([name], references, run, options, policy=policy, resamples=resamples)[0]
