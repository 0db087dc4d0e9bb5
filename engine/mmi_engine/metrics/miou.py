"""Mean IoU of label maps, or of pictures read back by a segmenter.

Place in the flow: true maps (``labels``, ``meta.labels`` or ``segmentation``: class ids in a grey or palette PNG, 0 is
unlabelled) and made ones (``labels`` of the result row, else its picture through `segmenter.py`) → intersections and
unions per item and class → one mean over classes. Counts are summed over all items first, so a resample is a matrix
product.

The default is the mean over the classes present in the truth, label 0 ignored. The released script takes the mean over
all 150 classes, those that are absent counting 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mmi_engine.data.images import ImageLoader
from mmi_engine.data.manifest import shorten
from mmi_engine.errors import ImageError, ItemError, RowError
from mmi_engine.metrics.base import Measure, Options, Scores, mean_measure
from mmi_engine.metrics.fields import meta
from mmi_engine.metrics.pairs import Pair
from mmi_engine.metrics.pictures import Source, made_pictures

ALL_CLASSES = 150  # of ADE20K's scene parsing, ids 1 to 150


def load_labels(loader: ImageLoader, name: Any) -> np.ndarray:
    """Class ids ``[h, w]`` of a PNG whose pixels are ids (grey of 8 or 16 bits, or palette).

    Raises:
        ImageError: not there, not readable, or a colour picture.
    """
    if not isinstance(name, str):
        raise RowError("a label map must be named by its path", code="bad_row")
    image = loader.load_raw(name)
    if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
        raise ImageError(
            f'"{shorten(name)}" is a colour picture ({image.mode}), not a map of class ids',
            remedy='give class ids as a grey or palette PNG under "labels"',
            code="bad_map",
        )
    return np.asarray(image).astype(np.int64)


def counts(true: np.ndarray, said: np.ndarray | None, classes: int) -> np.ndarray:
    """Intersection, predicted and true pixels per class, ``[3, classes + 1]``, where the truth is labelled.

    Args:
        true: ids, 0 ignored; said: ids of the same shape, None for nothing; ids above ``classes`` in it match nothing.
    """
    known = true > 0
    truth = true[known]
    guess = np.zeros_like(truth) if said is None else np.where(said[known] <= classes, said[known], 0)
    table = np.zeros((3, classes + 1))
    table[0] = np.bincount(truth[truth == guess], minlength=classes + 1)
    table[1] = np.bincount(guess, minlength=classes + 1)
    table[2] = np.bincount(truth, minlength=classes + 1)
    table[:, 0] = 0
    return table


def miou(table: np.ndarray, over_all: int | None = None) -> np.ndarray:
    """Mean IoU of summed counts ``[..., 3, classes + 1]`` → ``[...]``; 0 to 1, NaN where no class is present.

    Args:
        over_all: mean over this many classes, the absent ones 0; None: over the classes present in the truth.
    """
    both, said, true = table[..., 0, 1:], table[..., 1, 1:], table[..., 2, 1:]
    union = said + true - both
    ratio = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    if over_all is not None:
        return np.asarray(ratio.sum(-1) / over_all)
    present = true > 0
    number = present.sum(-1)
    return np.where(number > 0, (ratio * present).sum(-1) / np.maximum(number, 1), np.nan)


class MIoU:
    """Mean IoU; pixel accuracy beside it."""

    differs = "mean over all 150 classes, absent ones count 0"

    def __init__(self, options: Options) -> None:
        self.options = options
        self._segmenter: Any = None

    def reference(self, pair: Pair) -> np.ndarray:
        """The true map."""
        name = meta(pair.reference, "labels") or pair.reference.get("segmentation")
        if name is None:
            raise RowError('no true map: "labels", "meta.labels" or "segmentation"', code="bad_row")
        return load_labels(pair.truth, name)

    def prediction(self, pair: Pair) -> np.ndarray | Source:
        """The made map; a picture where there is a segmenter to read it.

        Raises:
            ImageError: a map of another size than the true one.
        """
        name = (pair.result or {}).get("labels")
        if name is None:
            if self.options.segmenter is None:
                raise RowError(
                    'no "labels" in the result, and no segmenter to read its picture',
                    remedy="name one: --segmenter DIR (OneFormer), or toon for the built-in world",
                    code="bad_row",
                )
            return made_pictures(pair)[0]
        said, true = load_labels(pair.made, name), self.reference(pair)
        if said.shape != true.shape:
            raise ImageError(
                f"map of {said.shape[1]} × {said.shape[0]} px, the true one has {true.shape[1]} × {true.shape[0]}",
                remedy="write the map in the size of the true one (nearest neighbour)",
                code="wrong_size",
            )
        return said

    def score(self, references: list[np.ndarray], predictions: list[np.ndarray | Source | None]) -> Scores:
        """See `Metric.score`. For a missing map every labelled pixel is wrong."""
        classes = max([int(true.max(initial=0)) for true in references], default=0)
        tables, problems = [], {}
        for k, (true, said) in enumerate(zip(references, predictions, strict=True)):
            labels: np.ndarray | None = None
            try:
                labels = self._read(said, true) if isinstance(said, Source) else said
            except ItemError as error:
                problems[k] = str(error)
            tables.append(counts(true, labels, classes))
            self.options.progress("maps", k + 1, len(references))
        table = np.stack(tables) if tables else np.zeros((0, 3, classes + 1))  # [n, 3, classes + 1]
        over_all = max(ALL_CLASSES, classes) if self.options.released else None
        value = float(miou(table.sum(0), over_all))
        main = Measure("mIoU", value, parts=miou(table, over_all), resample=partial(_resample, table, over_all))
        right, labelled = table[:, 0].sum(1), table[:, 2].sum(1)
        accuracy = np.divide(100.0 * right, labelled, out=np.full(len(table), np.nan), where=labelled > 0)
        scores = Scores([main, mean_measure("pixel accuracy", accuracy, "%")], problems=problems)
        if self._segmenter is not None:
            scores.implementation = f"segmenter {self._segmenter.name}, {self._segmenter.fingerprint[:12]}"
        present = int((table[:, 2, 1:].sum(0) > 0).sum()) if len(table) else 0
        scores.notes = [f"{present} classes are present in the truth"] if self.options.released else []
        return scores

    def _read(self, source: Source, true: np.ndarray) -> np.ndarray:
        if self._segmenter is None:
            from mmi_engine.metrics.segmenter import make

            self._segmenter = make(str(self.options.segmenter), self.options.device)
        return np.asarray(self._segmenter.read(source.load(), true.shape))


def _resample(table: np.ndarray, over_all: int | None, weights: np.ndarray) -> np.ndarray:
    sums = (weights @ table.reshape(len(table), -1)).reshape(len(weights), *table.shape[1:])
    return miou(sums, over_all)
