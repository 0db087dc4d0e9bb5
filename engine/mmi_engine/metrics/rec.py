"""Accuracy of referring-expression comprehension: boxes that overlap the true one.

Place in the flow: rows (``box`` / ``box``, pixels xyxy) → IoU per item. Source: the usual rule of RefCOCO, a hit where
IoU > 0.5. The released script takes ≥ 0.5, compares with the reference box after the same quantisation to thousandths
of the picture as the model's own writing, and makes of an answer without a box a box of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmi_engine.errors import RowError
from mmi_engine.metrics import fields
from mmi_engine.metrics.base import Options, Scores, mean_measure
from mmi_engine.metrics.pairs import Pair

Box = tuple[float, float, float, float]
THRESHOLD = 0.5
GRID = 1000  # steps of a coordinate in the model's writing


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes xyxy (any unit); 0 where one is empty or turned inside out."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, c[2] - c[0]) * max(0.0, c[3] - c[1]) for c in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0.0


def quantise(box: Box, size: tuple[int, int]) -> Box:
    """A box as the model writes it: whole thousandths of width and height, 000 to 999, back in pixels."""
    steps = [min(GRID - 1, max(0, round(v * GRID / size[k % 2]))) for k, v in enumerate(box)]
    x1, y1, x2, y2 = (step * size[k % 2] / GRID for k, step in enumerate(steps))
    return x1, y1, x2, y2


class Rec:
    """REC accuracy in percent; the mean IoU beside it."""

    differs = "a hit is IoU ≥ 0.5; the reference box is quantised to thousandths like the answer"

    def __init__(self, options: Options) -> None:
        self.options = options

    def reference(self, pair: Pair) -> Box:
        """The true box, pixels xyxy.

        Raises:
            RowError: none, not four numbers, or empty; for the released variant also a picture without a size.
        """
        x1, y1, x2, y2 = fields.numbers(pair.reference, "box", 4)
        if x2 <= x1 or y2 <= y1:
            raise RowError('"box" is empty', remedy="write x1, y1, x2, y2 in pixels, x2 > x1 and y2 > y1")
        box = (x1, y1, x2, y2)
        return quantise(box, self._size(pair)) if self.options.released else box

    def _size(self, pair: Pair) -> tuple[int, int]:
        width, height = (fields.meta(pair.reference, key) for key in ("width", "height"))
        if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
            return width, height
        return pair.truth.load(pair.reference.get("image")).size

    def prediction(self, pair: Pair) -> Box | None:
        """The box; None where the model wrote none (a miss, not a failure)."""
        row = pair.result or {}
        if "box" not in row:
            raise RowError('no "box"', code="bad_row")
        if row["box"] is None:
            return None
        x1, y1, x2, y2 = fields.numbers(row, "box", 4)
        return x1, y1, x2, y2

    def score(self, references: list[Box], predictions: list[Box | None]) -> Scores:
        """See `Metric.score`."""
        overlap = np.array(
            [iou(said, true) if said else 0.0 for said, true in zip(predictions, references, strict=True)]
        )
        hits = overlap >= THRESHOLD if self.options.released else overlap > THRESHOLD
        measures = [mean_measure("REC accuracy", 100.0 * hits, "%"), mean_measure("mean IoU", overlap)]
        measures[0].parts = 100.0 * hits
        return Scores(measures)
