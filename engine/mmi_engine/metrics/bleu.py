"""BLEU-1 to BLEU-4 of a corpus, as the COCO caption evaluation computes them.

Place in the flow: `captions.py` hands over tokenised captions. Source: Papineni et al., *BLEU* (2002); closest
reference length (the shorter of two equally close ones); the tiny terms keep an n-gram order without any match from
making a zero of everything before it.

The corpus value needs only sums over items, so a resample is a matrix product: statistics are ``[n, 10]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmi_engine.metrics.cider import ORDERS, Grams, grams

TINY, SMALL = 1e-15, 1e-9


def statistics(references: Sequence[Sequence[Sequence[str]]], predictions: Sequence[Sequence[str]]) -> np.ndarray:
    """Per item: clipped matches by order, n-grams by order, length, closest reference length; ``[n, 10]``."""
    table = np.zeros((len(references), 2 * ORDERS + 2))
    for row, item, words in zip(table, references, predictions, strict=True):
        ours = grams(words)
        theirs = [grams(reference) for reference in item]
        for order in range(ORDERS):
            row[order] = _matches(ours, theirs, order)
            row[ORDERS + order] = max(0, len(words) - order)
        row[-2] = len(words)
        row[-1] = min((abs(len(reference) - len(words)), len(reference)) for reference in item)[1]
    return table


def _matches(ours: Grams, theirs: list[Grams], order: int) -> int:
    """N-grams of the prediction, each counted at most as often as in the reference that has most of it."""
    return sum(
        min(count, max(reference[order].get(gram, 0) for reference in theirs)) for gram, count in ours[order].items()
    )


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-1..4 (0 to 1) of summed statistics ``[..., 10]`` → ``[..., 4]``."""
    right, guessed = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    precision = np.cumprod((right + TINY) / (guessed + SMALL), axis=-1)
    values = precision ** (1.0 / np.arange(1, ORDERS + 1))
    ratio = (sums[..., -2] + TINY) / (sums[..., -1] + SMALL)
    penalty = np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))
    return values * penalty[..., None]
