"""What a metric is, and what it hands back.

Place in the flow: `pairs.py` brings references and results together, a `Metric` turns them into `Measure`s,
`bootstrap.py` puts intervals on those and `score.py` makes the card. A metric knows nothing of files but the pictures
that rows name; which item is missing or failed is decided before it is called.

Shapes: n items; parts ``[n]``; weights ``[R, n]``, how often each item is drawn in each of R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from mmi_engine.metrics.pairs import Pair

Resample = Callable[[np.ndarray], np.ndarray]  # weights [R, n] → values [R]
Progress = Callable[[str, int, int], None]  # what, done, in all


@dataclass
class Measure:
    """One number of a metric.

    Attributes:
        name: as printed, e.g. ``BLEU-4``.
        value: over all items, in its usual unit.
        unit: ``"%"``, ``"px"``, ``"dB"`` or empty.
        higher: whether more is better.
        parts: value of each item ``[n]`` where the measure is their mean (NaN: no say in it), else None; also what the
            gallery of the worst sorts by.
        resample: the measure over resamples; None for the weighted mean of `parts`.
        low, high: 95 % interval, filled in later; draws ``[R]`` behind it.
        baselines: what would be reached without looking (chance, majority, …), in the measure's unit.
    """

    name: str
    value: float
    unit: str = ""
    higher: bool = True
    parts: np.ndarray | None = None
    resample: Resample | None = None
    low: float = float("nan")
    high: float = float("nan")
    draws: np.ndarray | None = field(default=None, repr=False)
    baselines: dict[str, float] = field(default_factory=dict)

    @property
    def counted(self) -> int | None:
        """How many items have a say in it; None where items have no value of their own."""
        return None if self.parts is None else int(np.count_nonzero(~np.isnan(self.parts)))


def mean_measure(name: str, parts: Any, unit: str = "", higher: bool = True) -> Measure:
    """A measure that is the mean of its items, NaN ones left out (NaN when there is none)."""
    array = np.asarray(parts, dtype=np.float64)
    known = array[~np.isnan(array)]
    return Measure(name, float(known.mean()) if len(known) else float("nan"), unit, higher, array)


@dataclass
class Scores:
    """What a metric found.

    Attributes:
        measures: the first one is the metric's headline.
        references: references per item, for the card (mean).
        implementation: what computed it, with versions of libraries and fingerprints of weights.
        notes: remarks that belong beside the number.
        problems: index of an item → why its result turned out to be unusable (a picture that does not decode).
    """

    measures: list[Measure]
    references: float = 1.0
    implementation: str = "mmi"
    notes: list[str] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """Choices that metrics share.

    Attributes:
        variant: ``default`` or ``released``.
        inception: file of FID's Inception weights, or a folder with it; clip: a CLIP model directory; segmenter: a
            OneFormer (or other semantic segmentation) directory, or ``toon`` for the embedded world's oracle.
        model: whose encoder serves the encoder distances, ``toon`` or a model directory.
        device: ``cpu`` or ``cuda[:N]``; batch_size: pictures at a time.
        cache: folder of features by file hash; None for none.
        progress: told how far a slow metric has come.
    """

    variant: str = "default"
    inception: Path | None = None
    clip: Path | None = None
    segmenter: str | None = None
    model: str = "toon"
    device: str = "cpu"
    batch_size: int = 32
    cache: Path | None = None
    progress: Progress = lambda what, done, total: None

    @property
    def released(self) -> bool:
        """Whether the released scripts' behaviour is asked for."""
        return self.variant == "released"


class Metric(Protocol):
    """A family of measures computed together; made from `Options`.

    Attributes:
        differs: what the ``released`` variant does otherwise; empty where both are the same.
    """

    differs: str

    def reference(self, pair: Pair) -> Any:
        """The truth of an item; raises RowError where the reference row cannot serve (fatal)."""
        ...

    def prediction(self, pair: Pair) -> Any:
        """What was made; raises ItemError where the result row cannot serve (the item then counts as wrong)."""
        ...

    def score(self, references: list[Any], predictions: list[Any]) -> Scores:
        """Measures over all items; a prediction of None counts as wrong."""
        ...
