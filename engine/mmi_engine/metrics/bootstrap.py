"""Intervals and paired tests by resampling items.

Place in the flow: between a metric's measures and its card. The same seed and number of items give the same resamples,
so two runs over the same references are resampled in step: that is what makes a comparison paired. Source: Efron and
Tibshirani, *An Introduction to the Bootstrap* (1993), percentile intervals; Koehn, *Statistical Significance Tests*
(2004) for the paired form; sign flips after Fisher's randomisation test.

Shapes: n items, R resamples, weights ``[R, n]`` (how often each item is drawn).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mmi_engine.metrics.base import Measure

CHUNK = 4_000_000  # weights held at a time
LEVEL = (2.5, 97.5)


def weights(n: int, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Weights ``[≤ R, n]`` float64 in chunks, R rows in all."""
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // max(1, n))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        yield np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(rows)]).astype(np.float64)


def add_intervals(measures: list[Measure], n: int, resamples: int = 1000, seed: int = 0) -> None:
    """Fill in `low`, `high` and `draws` of every measure.

    Measures that are means are resampled together. With fewer
    than two items, or where a measure is NaN, there is no interval; a share of 0 or 100 % gets Wilson's.
    """
    live = [m for m in measures if n > 1 and resamples > 0 and not np.isnan(m.value)]
    means = [m for m in live if m.resample is None and m.parts is not None]
    others = [m for m in live if m.resample is not None]
    draws: dict[int, list[np.ndarray]] = {id(m): [] for m in live}
    if means:
        table = np.stack([m.parts for m in means if m.parts is not None], axis=1)  # [n, M]
        known = ~np.isnan(table)
        filled = np.where(known, table, 0.0)
    for chunk in weights(n, resamples, seed):
        if means:
            counts = chunk @ known
            with np.errstate(invalid="ignore", divide="ignore"):
                values = np.where(counts > 0, (chunk @ filled) / counts, np.nan)
            for column, measure in enumerate(means):
                draws[id(measure)].append(values[:, column])
        for measure in others:
            if measure.resample is not None:
                draws[id(measure)].append(measure.resample(chunk))
    for measure in live:
        if draws[id(measure)]:
            measure.draws = np.concatenate(draws[id(measure)])
            measure.low, measure.high = interval(measure)
            if measure.unit == "%" and measure.parts is not None and measure.value in (0.0, 100.0):
                measure.low, measure.high = wilson(measure.value, int((~np.isnan(measure.parts)).sum()))


def wilson(percent: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share in percent: where all items agree, resampling cannot show the doubt that is left."""
    p, w = percent / 100.0, z * z / n
    middle, half = (p + w / 2) / (1 + w), z / (1 + w) * float(np.sqrt(p * (1 - p) / n + w / (4 * n)))
    return 100.0 * max(0.0, middle - half), 100.0 * min(1.0, middle + half)


def interval(measure: Measure) -> tuple[float, float]:
    """95 % percentile interval of a measure's draws."""
    draws = measure.draws[~np.isnan(measure.draws)] if measure.draws is not None else np.array([])
    if len(draws) < 2:
        return float("nan"), float("nan")
    low, high = np.percentile(draws, LEVEL)
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Run minus baseline of one measure.

    Attributes:
        value: the difference; low, high: its 95 % interval; p: two-sided, of no difference; test: how p was found.
        items: how many items both runs were compared on.
    """

    value: float
    low: float
    high: float
    p: float
    test: str
    items: int


def paired(run: Measure, base: Measure, n: int, resamples: int = 1000, seed: int = 0) -> Difference:
    """Compare one measure of two runs over the same items, whose draws come from the same weights.

    Means are tested by flipping the signs of the items' differences at random; anything else by the share of paired
    resamples whose difference, moved to centre on zero, is at least as large as the one observed.
    """
    value = run.value - base.value
    low = high = p = float("nan")
    if run.draws is not None and base.draws is not None:
        count = min(len(run.draws), len(base.draws))
        draws = run.draws[:count] - base.draws[:count]
        draws = draws[~np.isnan(draws)]
        if len(draws) > 1:
            low, high = (float(x) for x in np.percentile(draws, LEVEL))
            p = float((1 + np.sum(np.abs(draws - draws.mean()) >= abs(value) - 1e-12)) / (1 + len(draws)))
    test = "paired bootstrap"
    if run.resample is None and run.parts is not None and base.parts is not None and resamples > 0:
        p, test = sign_flips(run.parts - base.parts, resamples, seed), "sign flips"
    return Difference(value, low, high, p, test, n)


def sign_flips(differences: np.ndarray, flips: int = 1000, seed: int = 0) -> float:
    """Two-sided p of the hypothesis that items' differences are symmetric about zero; 1 where all are zero.

    With at most ten differing items all sign patterns are counted, otherwise `flips` random ones.
    """
    known = differences[~np.isnan(differences)]
    known = known[known != 0.0]
    if len(known) == 0:
        return 1.0
    observed = abs(known.sum())
    if len(known) <= 10:
        patterns = np.array(np.meshgrid(*[[-1.0, 1.0]] * len(known))).reshape(len(known), -1)
        return float(np.mean(np.abs(known @ patterns) >= observed - 1e-12 * max(1.0, observed)))
    rng = np.random.default_rng(seed)
    reached, size = 0, max(1, CHUNK // len(known))
    for start in range(0, flips, size):
        signs = 2.0 * rng.integers(0, 2, (min(size, flips - start), len(known)), dtype=np.int8) - 1.0
        reached += int(np.sum(np.abs(signs @ known) >= observed - 1e-12 * max(1.0, observed)))
    return (1 + reached) / (1 + flips)
