"""CIDEr-D, BLEU and ROUGE-L share their tokens; this is CIDEr-D.

Place in the flow: `captions.py` hands over tokenised captions. Source: Vedantam, Zitnick, Parikh, *CIDEr: Consensus-
based Image Description Evaluation* (2015), and the numbers of the COCO caption evaluation: n-grams up to 4, idf over
the images of the reference set, clipped counts, a Gaussian on the difference of length (σ 6), times 10. The length is
there the number of bigrams, which differs from the number of words where a caption has a single word or none.

Counts become sparse numbers per image instead of dictionaries of tuples, so that forty thousand captions with five
references each take seconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDERS = 4
SIGMA = 6.0

Grams = list[dict[str, int]]  # by order: n-gram (words joined by a space) → count


def grams(words: Sequence[str]) -> Grams:
    """Counts of the n-grams of every order 1..4."""
    counts = []
    joined = words
    for order in range(1, ORDERS + 1):
        if order > 1:
            joined = [f"{head} {word}" for head, word in zip(joined, words[order - 1 :], strict=False)]
        counts.append(dict(Counter(joined)))
    return counts


def cider(references: Sequence[Sequence[Sequence[str]]], predictions: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of every item, ``[n]`` (0 to 10).

    Args:
        references: per item its reference captions as words.
        predictions: per item its caption as words; [] scores 0.
    """
    cooked = [[grams(words) for words in item] for item in references]
    frequency: Counter[str] = Counter()
    for item in cooked:
        frequency.update({gram for reference in item for order in reference for gram in order})
    total = math.log(len(references)) if references else 0.0
    idf = {gram: total - math.log(count) for gram, count in frequency.items()}
    scores = [_item(grams(words), item, idf, total) for words, item in zip(predictions, cooked, strict=True)]
    return np.array(scores, dtype=np.float64)


def _item(prediction: Grams, references: list[Grams], idf: dict[str, float], unseen: float) -> float:
    """Mean over references and orders of the clipped cosine, with the length penalty."""
    vectors = [{gram: count * idf.get(gram, unseen) for gram, count in order.items()} for order in prediction]
    norms = [math.sqrt(sum(weight * weight for weight in vector.values())) for vector in vectors]
    bigrams = sum(prediction[1].values())
    score = 0.0
    for reference in references:
        delta = bigrams - sum(reference[1].values())
        penalty = math.exp(-(delta * delta) / (2 * SIGMA * SIGMA))
        for vector, norm, order in zip(vectors, norms, reference, strict=True):
            if norm == 0.0:
                continue
            dot = square = 0.0
            for gram, count in order.items():
                weight = count * idf[gram]
                square += weight * weight
                if gram in vector:
                    dot += min(vector[gram], weight) * weight
            if square > 0.0:
                score += penalty * dot / (norm * math.sqrt(square))
    return 10.0 * score / (ORDERS * len(references))
