"""ROUGE-L of captions, as the COCO caption evaluation computes it.

Place in the flow: `captions.py` hands over tokenised captions. Source: Lin, *ROUGE* (2004): F-measure of the longest
common subsequence with β 1.2, precision and recall each the best over the references.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BETA2 = 1.2**2


def rouge_l(references: Sequence[Sequence[Sequence[str]]], predictions: Sequence[Sequence[str]]) -> np.ndarray:
    """ROUGE-L of every item, ``[n]`` (0 to 1); 0 for an empty caption."""
    return np.array([_item(item, words) for item, words in zip(references, predictions, strict=True)])


def _item(references: Sequence[Sequence[str]], words: Sequence[str]) -> float:
    if not words:
        return 0.0
    common = [(longest_common(reference, words), len(reference)) for reference in references if reference]
    precision = max((length / len(words) for length, _ in common), default=0.0)
    recall = max((length / size for length, size in common), default=0.0)
    if precision == 0.0 or recall == 0.0:
        return 0.0
    return (1 + BETA2) * precision * recall / (recall + BETA2 * precision)


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bit-parallel rows (Hyyrö 2004): one addition per word of `b`."""
    places: dict[str, int] = {}
    for index, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << index
    mask = (1 << len(a)) - 1
    row = mask
    for word in b:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & mask
    return len(a) - row.bit_count()
