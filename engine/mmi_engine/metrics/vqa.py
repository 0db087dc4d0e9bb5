"""VQA accuracy, exact match and VizWiz.

Place in the flow: rows (``answers`` / ``answer``) → normalised strings → a share per item. Source: Antol et al., *VQA*
(2015), and the rules of its evaluation: an answer is right to min(1, matches / 3), averaged over the leave-one-out
subsets of the references, after both sides went through the same normalisation (punctuation, number words, articles,
contractions).
"""

from __future__ import annotations

import re

import numpy as np

from mmi_engine.errors import RowError
from mmi_engine.metrics import fields
from mmi_engine.metrics.base import Measure, Options, Scores, mean_measure
from mmi_engine.metrics.pairs import Pair

ENOUGH = 4  # with fewer references even a perfect answer stays below 100
UNANSWERABLE = frozenset({"unanswerable", "unsuitable", "unsuitable image"})

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(k) for k, word in enumerate(_DIGITS.split(" "))}
_NUMBERS["none"] = "0"
_ARTICLES = frozenset({"a", "an", "the"})

# Words that lose apostrophes in people's writing; every way to drop some of them is mapped back to the full form.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _spellings(word: str) -> list[str]:
    """The word with at least one apostrophe missing, in every combination."""
    pieces = word.split("'")
    gaps = len(pieces) - 1
    found = []
    for kept in range(2**gaps - 1):
        joined = pieces[0]
        for gap, piece in enumerate(pieces[1:]):
            joined += ("'" if kept >> gap & 1 else "") + piece
        found.append(joined)
    return found


CONTRACTIONS = {short: word for word in _CONTRACTED.split() for short in _spellings(word)}


def normalise(answer: str) -> str:
    """An answer as the VQA evaluation compares it.

    A punctuation mark becomes a space, or nothing where one touches a space or a number has a comma; a period goes
    unless a digit follows; number words up to ten become digits; articles go; contractions get their apostrophes.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    joined = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        if mark in text:
            out = out.replace(mark, "" if joined or f"{mark} " in text or f" {mark}" in text else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", out).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, references: list[str]) -> float:
    """Mean over the leave-one-out subsets of min(1, matches / 3), on strings as they are; 0 to 1.

    Of m references that match among n, leaving one of them out leaves m - 1, leaving another out leaves m.
    """
    total, matches = len(references), references.count(answer)
    without = min(1.0, (matches - 1) / 3) * matches + min(1.0, matches / 3) * (total - matches)
    return without / total


class Vqa:
    """VQA accuracy in percent."""

    differs = "answers are normalised only where the references disagree"

    def __init__(self, options: Options) -> None:
        self.options = options

    def reference(self, pair: Pair) -> list[str]:
        """All human answers.

        Raises:
            RowError: fewer than two; leave-one-out would leave none.
        """
        answers = fields.texts(pair.reference, "answers", "answer")
        if len(answers) < 2:
            raise RowError(
                "one answer alone cannot be left out of itself: VQA accuracy needs several (usually ten)",
                remedy="use --metric exact for data sets with one answer",
                code="bad_row",
            )
        return answers

    def prediction(self, pair: Pair) -> str:
        """The answer."""
        return fields.text(pair.result or {}, "answer", "text")

    def score(self, references: list[list[str]], predictions: list[str | None]) -> Scores:
        """See `Metric.score`."""
        parts = [100.0 * self._item(said, true) for said, true in zip(predictions, references, strict=True)]
        scores = Scores([mean_measure("VQA accuracy", parts, "%")], _mean_length(references), "mmi")
        few = sum(len(item) < ENOUGH for item in references)
        if few:
            scores.notes.append(f"{few} items have fewer than {ENOUGH} answers: they cannot reach 100 %")
        return scores

    def _item(self, said: str | None, true: list[str]) -> float:
        if said is None:
            return 0.0
        if self.options.released and len(set(true)) == 1:
            return accuracy(said.strip(), [answer.strip() for answer in true])
        return accuracy(normalise(said), [normalise(answer) for answer in true])


class VizWiz(Vqa):
    """VQA accuracy on VizWiz, and the average precision of saying that a question is answerable."""

    differs = "the references are not normalised"

    def reference(self, pair: Pair) -> tuple[list[str], bool | None]:  # type: ignore[override]
        """All human answers, and whether the question is answerable (None where the row does not say)."""
        flag = fields.meta(pair.reference, "answerable")
        if flag is not None and flag not in (0, 1):
            raise RowError('"answerable" must be 0 or 1', code="bad_row")
        return super().reference(pair), None if flag is None else bool(flag)

    def prediction(self, pair: Pair) -> tuple[str, float]:  # type: ignore[override]
        """The answer, and how answerable the model holds the question: the row's own number, else 1, or 0 when it
        answered that it is not."""
        row = pair.result or {}
        answer = super().prediction(pair)
        confidence = row.get("answerable")
        if confidence is None:
            confidence = float(normalise(answer) not in UNANSWERABLE)
        if not isinstance(confidence, (int, float)) or not 0.0 <= confidence <= 1.0:
            raise RowError('"answerable" must be a number from 0 to 1', code="bad_row")
        return answer, float(confidence)

    def score(self, references: list, predictions: list) -> Scores:
        """See `Metric.score`."""
        answers = [None if said is None else said[0] for said in predictions]
        scores = super().score([true for true, _ in references], answers)
        known = np.array([flag is not None for _, flag in references])
        if known.any():
            flags = np.array([bool(flag) for _, flag in references], dtype=float)
            sure = np.array([0.0 if said is None else said[1] for said in predictions])
            scores.measures.append(_answerability(flags, sure, known))
        else:
            scores.notes.append('no reference says "answerable": average precision left out')
        return scores

    def _item(self, said: str | None, true: list[str]) -> float:
        if said is not None and self.options.released:
            return accuracy(normalise(said), true)
        return super()._item(said, true)


def _answerability(flags: np.ndarray, sure: np.ndarray, known: np.ndarray) -> Measure:
    def resample(weights: np.ndarray) -> np.ndarray:
        return np.array([100.0 * average_precision(flags, sure, row * known) for row in weights])

    value = 100.0 * average_precision(flags, sure, known.astype(float))
    return Measure("answerability AP", value, "%", resample=resample)


def average_precision(flags: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    """Area under the precision-recall steps, equal scores taken together; NaN without a positive.

    Args:
        flags: 0 or 1, ``[n]``; scores: higher is surer, ``[n]``; weights: how often each item counts, ``[n]``.
    """
    order = np.argsort(-scores, kind="stable")
    right, drawn = np.cumsum((flags * weights)[order]), np.cumsum(weights[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    right, drawn = right[last], drawn[last]
    if right[-1] <= 0:
        return float("nan")
    precision = np.divide(right, drawn, out=np.zeros_like(right), where=drawn > 0)
    return float(np.sum(np.diff(right, prepend=0.0) * precision) / right[-1])


class Exact:
    """Share of answers equal to one of the references, in percent, after the same normalisation."""

    differs = ""

    def __init__(self, options: Options) -> None:
        self.options = options

    def reference(self, pair: Pair) -> list[str]:
        """The accepted answers, normalised."""
        return [normalise(answer) for answer in fields.texts(pair.reference, "answers", "answer")]

    def prediction(self, pair: Pair) -> str:
        """The answer, normalised."""
        return normalise(fields.text(pair.result or {}, "answer", "text"))

    def score(self, references: list[list[str]], predictions: list[str | None]) -> Scores:
        """See `Metric.score`."""
        parts = [100.0 * (said in true) for said, true in zip(predictions, references, strict=True)]
        return Scores([mean_measure("exact match", parts, "%")], _mean_length(references), "mmi")


def _mean_length(references: list[list[str]]) -> float:
    return float(np.mean([len(item) for item in references])) if references else 0.0
