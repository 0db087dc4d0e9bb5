"""Caption metrics: CIDEr, BLEU and ROUGE-L on the same tokens.

Place in the flow: rows (``captions`` or ``caption`` / ``caption``) → words (`ptb.py`) → `cider.py`, `bleu.py`,
`rouge.py`. A missing caption is an empty one: it scores 0, and in BLEU its reference length still counts.

The released scripts score only the ids that were predicted, and turned an exception into an empty result: with
``--parity released`` missing and failed items are left out.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from mmi_engine.errors import RowError
from mmi_engine.metrics import fields
from mmi_engine.metrics.base import Measure, Options, Scores, mean_measure
from mmi_engine.metrics.bleu import ORDERS, bleu, statistics
from mmi_engine.metrics.cider import cider
from mmi_engine.metrics.pairs import Pair
from mmi_engine.metrics.ptb import tokenize
from mmi_engine.metrics.rouge import rouge_l

Words = tuple[str, ...]
TOKENIZER = "PTB-style tokeniser"


class _Captions:
    """References as lists of words, predictions as words."""

    differs = "scores only the items that have a result"
    skips_missing = True  # the released variant

    def __init__(self, options: Options) -> None:
        self.options = options

    def reference(self, pair: Pair) -> list[Words]:
        """Its captions, tokenised; a caption without a word is left out.

        Raises:
            RowError: none there, or none with a word in it.
        """
        words = [tokenize(caption) for caption in fields.texts(pair.reference, "captions", "caption")]
        words = [reference for reference in words if reference]
        if not words:
            raise RowError("no reference caption has a word in it", code="bad_row")
        return words

    def prediction(self, pair: Pair) -> Words:
        """The caption, tokenised."""
        return tokenize(fields.text(pair.result or {}, "caption", "text"))

    def _scores(self, measures: list[Measure], references: list[list[Words]], notes: list[str]) -> Scores:
        count = float(np.mean([len(item) for item in references])) if references else 0.0
        return Scores(measures, count, f"mmi, {TOKENIZER}", notes)


class Cider(_Captions):
    """CIDEr-D, 0 to 10; papers print it times 100."""

    def score(self, references: list[list[Words]], predictions: list[Words | None]) -> Scores:
        """See `Metric.score`."""
        notes = []
        if len(references) == 1:
            notes.append("one image alone: every n-gram's idf is 0, so CIDEr is 0 whatever the caption says")
        elif len(references) < 50:
            notes.append(f"the idf comes from {len(references)} images only")
        parts = cider(references, [words or () for words in predictions])
        return self._scores([mean_measure("CIDEr", parts)], references, notes)


class Bleu(_Captions):
    """BLEU-1 to BLEU-4 of the corpus, 0 to 1; the gallery sorts by the items' own smoothed values."""

    def score(self, references: list[list[Words]], predictions: list[Words | None]) -> Scores:
        """See `Metric.score`."""
        table = statistics(references, [words or () for words in predictions])
        values, parts = bleu(table.sum(axis=0)), bleu(table)
        measures = [
            Measure(f"BLEU-{k + 1}", float(values[k]), parts=parts[:, k], resample=partial(_resample, table, k))
            for k in reversed(range(ORDERS))
        ]
        return self._scores(measures, references, [])


def _resample(table: np.ndarray, order: int, weights: np.ndarray) -> np.ndarray:
    return np.asarray(bleu(weights @ table)[:, order])


class RougeL(_Captions):
    """ROUGE-L, 0 to 1."""

    def score(self, references: list[list[Words]], predictions: list[Words | None]) -> Scores:
        """See `Metric.score`."""
        parts = rouge_l(references, [words or () for words in predictions])
        return self._scores([mean_measure("ROUGE-L", parts)], references, [])
