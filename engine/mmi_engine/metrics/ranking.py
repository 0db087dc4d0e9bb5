"""Ranked answers of visual dialogue: NDCG, MRR, recall at k, mean rank.

Place in the flow: rows (``options`` with ``relevance`` and/or the right answer / ``ranking`` or ``scores``) → a rank
per option → measures. Source: Das et al., *Visual Dialog* (2017) and its challenge: NDCG over the first k options, k
being how many are relevant at all, gains linear in the relevance.

The released script's history misses the round before the question: that changes what is generated, not how it is
scored, so the variants are equal here.
"""

from __future__ import annotations

import numpy as np

from mmi_engine.data.manifest import json_type
from mmi_engine.errors import RowError
from mmi_engine.metrics import fields
from mmi_engine.metrics.base import Measure, Options, Scores, mean_measure
from mmi_engine.metrics.pairs import Pair

RECALLS = (1, 5, 10)


def ndcg(ranks: np.ndarray, relevance: np.ndarray) -> float:
    """Normalised discounted cumulative gain of one list.

    Args:
        ranks: of every option, 1 is best, ``[k]``; relevance: 0 and above, ``[k]``.

    Returns:
        0 to 1; NaN where no option is relevant.
    """
    count = int(np.count_nonzero(relevance > 0))
    if count == 0:
        return float("nan")
    discount = np.log2(np.arange(2, count + 2))
    found = relevance[np.argsort(ranks, kind="stable")][:count]
    best = np.sort(relevance)[::-1][:count]
    return float((found / discount).sum() / (best / discount).sum())


class Ranking:
    """NDCG where the rows have relevance; MRR, R@k and mean rank where they have the right answer."""

    differs = ""

    def __init__(self, options: Options) -> None:
        self.options = options

    def reference(self, pair: Pair) -> tuple[int, np.ndarray | None, int | None]:
        """Number of options, their relevance, index of the right one; one of the latter two must be there."""
        row = pair.reference
        options = fields.texts(row, "options", "option")
        relevance = None
        if row.get("relevance") is not None:
            relevance = np.array(fields.numbers(row, "relevance", len(options)))
            if (relevance < 0).any():
                raise RowError('"relevance" must not be negative', code="bad_row")
        right = self._right(row, options)
        if relevance is None and right is None:
            raise RowError('neither "relevance" nor the right answer ("answer_index" or "answers")', code="bad_row")
        return len(options), relevance, right

    @staticmethod
    def _right(row: dict, options: list[str]) -> int | None:
        index = row.get("answer_index")
        if index is not None:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(options):
                raise RowError(f'"answer_index" must be a whole number from 0 to {len(options) - 1}', code="bad_row")
            return index
        if row.get("answers") is None and row.get("answer") is None:
            return None
        answer = fields.texts(row, "answers", "answer")[0]
        if answer not in options:
            raise RowError("the right answer is not among the options", code="bad_row")
        return options.index(answer)

    def prediction(self, pair: Pair) -> np.ndarray:
        """Rank of every option, 1 is best, from ``ranking`` (indices or texts, best first), ``ranks`` or ``scores``."""
        row, options = pair.result or {}, pair.reference.get("options") or []
        count = len(options)
        if row.get("ranking") is not None:
            return _from_order(row["ranking"], options)
        if row.get("ranks") is not None:
            ranks = np.array(fields.numbers(row, "ranks", count))
            if sorted(ranks) != list(range(1, count + 1)):
                raise RowError(f'"ranks" must be 1 to {count}, each once', code="bad_row")
            return ranks
        scores = np.array(fields.numbers(row, "scores", count))
        ranks = np.empty(count)
        ranks[np.argsort(-scores, kind="stable")] = np.arange(1, count + 1)
        return ranks

    def score(self, references: list, predictions: list[np.ndarray | None]) -> Scores:
        """See `Metric.score`. A missing list has the right answer last and gains nothing."""
        measures: list[Measure] = []
        if any(relevance is not None for _, relevance, _ in references):
            parts = [
                _ndcg_part(said, relevance) for said, (_, relevance, _) in zip(predictions, references, strict=True)
            ]
            measures.append(mean_measure("NDCG", parts))
        if any(right is not None for *_, right in references):
            ranks = np.array(
                [_rank(said, k, right) for said, (k, _, right) in zip(predictions, references, strict=True)]
            )
            missing = np.array([said is None for said in predictions])
            known = ~np.isnan(ranks)
            share = np.where(known, 1.0 / ranks, np.nan)
            measures.append(mean_measure("MRR", np.where(known & missing, 0.0, share)))
            for k in RECALLS:
                hits = np.where(known, (ranks <= k) & ~missing, np.nan)
                measures.append(mean_measure(f"R@{k}", hits))
            measures.append(mean_measure("mean rank", ranks, higher=False))
        return Scores(measures, float(np.mean([k for k, *_ in references])) if references else 0.0)


def _from_order(order: object, options: list[str]) -> np.ndarray:
    if not isinstance(order, list):
        raise RowError(f'"ranking" must be a list, found {json_type(order)}', code="bad_row")
    if order and all(isinstance(entry, str) for entry in order):
        if len(set(options)) != len(options):
            raise RowError("two options have the same text: rank by index", code="bad_row")
        order = [options.index(entry) if entry in options else -1 for entry in order]
    if sorted(order, key=str) != sorted(range(len(options)), key=str):
        raise RowError(f'"ranking" must hold each of the {len(options)} options once', code="bad_row")
    ranks = np.empty(len(options))
    ranks[np.array(order, dtype=int)] = np.arange(1, len(options) + 1)
    return ranks


def _ndcg_part(said: np.ndarray | None, relevance: np.ndarray | None) -> float:
    if relevance is None:
        return float("nan")
    if said is None:
        return 0.0 if (relevance > 0).any() else float("nan")
    return ndcg(said, relevance)


def _rank(said: np.ndarray | None, options: int, right: int | None) -> float:
    if right is None:
        return float("nan")
    return float(options) if said is None else float(said[right])
