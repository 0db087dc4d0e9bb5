"""The embedded world's own measures: attributes read back by its oracle and its grammar, against the exact truth.

Place in the flow: the metric ``toon``; references are the manifests of `mmi data make toon` (truth in ``meta``),
results those of any command. Pictures go through `toon.oracle`, sentences through `toon.texts.parse_text`; what cannot
be read is wrong. Every measure stands beside what needs no look: ``chance`` (a uniform guess; of boxes and maps another
item's), ``majority`` (the most frequent true answer, always given), ``blind`` (the best guess without the picture, from
training scenes: by the question's words, by the expression's words, one map for all) and ``copy`` (the given frame
repeated: it keeps what a story keeps).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mmi_engine.errors import ItemError, ManifestError, RowError
from mmi_engine.metrics import fields
from mmi_engine.metrics.base import Measure, Options, Scores, mean_measure
from mmi_engine.metrics.miou import counts, load_labels, miou
from mmi_engine.metrics.pairs import Pair
from mmi_engine.metrics.pictures import Source, made_pictures, targets
from mmi_engine.metrics.rec import THRESHOLD, iou
from mmi_engine.toon import blind, oracle
from mmi_engine.toon.dataset import scenes_of
from mmi_engine.toon.palette import CLASSES
from mmi_engine.toon.score import CHOICES, STATED, UNSTATED, normal_answer, truth
from mmi_engine.toon.sight import UNREADABLE
from mmi_engine.toon.texts import parse_text
from mmi_engine.toon.world import Scene

KINDS = ("frames", "question", "expression", "segmentation", "prompt", "captions")  # the field that tells the task


@dataclass(frozen=True)
class Truth:
    """A reference: its kind (one of KINDS), the true scenes (of a story: those of the compared frames), its row, the
    scene of a story's first frame, the label map of a semantic map."""

    kind: str
    scenes: list[Scene]
    row: dict[str, Any]
    given: Scene | None = None
    labels: np.ndarray | None = None


class Toon:
    """Oracle measures; which ones depends on the task that the references belong to."""

    differs = ""

    def __init__(self, options: Options) -> None:
        self.options = options

    def reference(self, pair: Pair) -> Truth:
        """See `Truth`; raises RowError for rows that the embedded world did not write."""
        row = pair.reference
        kind = next((key for key in KINDS if key in row), None)
        try:
            scenes = scenes_of(row["meta"])
        except (KeyError, TypeError, ValueError) as error:
            remedy = "use the manifests of mmi data make toon"
            raise RowError("no scene of the embedded world in meta", remedy=remedy, code="bad_row") from error
        if kind is None:
            raise RowError("no field that tells the task", remedy="use the manifests of mmi data make toon")
        if kind == "frames":
            return Truth(kind, [scenes[k] for k in targets(pair)], row, scenes[0])
        labels = load_labels(pair.truth, fields.meta(row, "labels")) if kind == "segmentation" else None
        return Truth(kind, scenes, row, labels=labels)

    def prediction(self, pair: Pair) -> Any:
        """Text, box or pictures, by the reference's kind."""
        row, result = pair.reference, pair.result or {}
        if "frames" in row or "segmentation" in row or "prompt" in row:
            return made_pictures(pair)
        if "question" in row:
            return fields.text(result, "answer", "text")
        if "expression" in row:
            return tuple(fields.numbers(result, "box", 4)) if result.get("box") is not None else ()
        return fields.text(result, "caption", "text")

    def score(self, references: list[Truth], predictions: list[Any]) -> Scores:
        """See `Metric.score`."""
        kinds = {truth.kind for truth in references}
        if len(kinds) > 1:
            raise ManifestError(f"--metric toon: rows of several tasks: {', '.join(sorted(kinds))}")
        judge = _JUDGES[kinds.pop()]
        scores = judge(references, predictions, self.options)
        scores.implementation = "toon oracle and grammar"
        return scores


# ---------------------------------------------------------------- attributes


def _shares(judged: list[dict[str, float]], names: Sequence[str], titles: dict[str, str]) -> list[Measure]:
    """Measures in percent from items' shares by name; a name that an item lacks has no say in it."""
    return [
        mean_measure(titles.get(name, name), [100.0 * item.get(name, math.nan) for item in judged], "%")
        for name in names
        if any(name in item for item in judged)
    ]


def _add_baselines(measures: list[Measure], truths: dict[str, list[Any]], copies: dict[str, float]) -> None:
    for measure in measures:
        values = truths.get(measure.name)
        if measure.name in CHOICES:
            measure.baselines["chance"] = 100.0 / CHOICES[measure.name]
        if values:
            measure.baselines["majority"] = 100.0 * Counter(values).most_common(1)[0][1] / len(values)
        if measure.name in copies:
            measure.baselines["copy"] = 100.0 * copies[measure.name]


def _add_whole(measure: Measure, asked: list[dict[str, Any]]) -> None:
    """Baselines of "every stated attribute": guessing all of them at once, and the most frequent combination."""
    known = [truths for truths in asked if truths]
    if known:
        measure.baselines["chance"] = 100.0 * float(np.mean([math.prod(1 / CHOICES[n] for n in t) for t in known]))
        common = Counter(tuple(sorted(truths.items())) for truths in known).most_common(1)[0][1]
        measure.baselines["majority"] = 100.0 * common / len(known)


def _add_share(measure: Measure, asked: list[dict[str, Any]]) -> None:
    """Baselines of "stated attributes": guessing each, and the most frequent value of each."""
    known = [truths for truths in asked if truths]
    if known:
        values: dict[str, Counter[Any]] = {}
        for truths in known:
            for name, value in truths.items():
                values.setdefault(name, Counter())[value] += 1
        common = {name: found.most_common(1)[0][1] / found.total() for name, found in values.items()}
        for baseline, share in (("chance", {name: 1 / CHOICES[name] for name in common}), ("majority", common)):
            means = [np.mean([share[name] for name in truths]) for truths in known]
            measure.baselines[baseline] = 100.0 * float(np.mean(means))


def _captions(references: list[Truth], predictions: list[str | None], options: Options) -> Scores:
    """Character, place, action and props must be stated and right, and whatever else is stated must be right."""
    judged, true_values = [], {name: [] for name in CHOICES}  # type: ignore[var-annotated]
    for reference, text in zip(references, predictions, strict=True):
        said, true = parse_text(text or ""), truth(reference.scenes[0])
        asked = [name for name in CHOICES if name in STATED or name in said]
        right = {name: float(said.get(name) == true[name]) for name in asked}
        judged.append({**right, "all": float(all(right.values()))})
        for name in asked:
            true_values[name].append(true[name])
    measures = _shares(judged, ("all", *CHOICES), {"all": "every stated attribute"})
    _add_baselines(measures, true_values, {})
    _add_whole(measures[0], [{name: truth(r.scenes[0])[name] for name in STATED} for r in references])
    return Scores(measures)


def _read(source: Source, problems: dict[int, str], item: int) -> dict[str, Any]:
    try:
        return oracle.read(source.load()).attributes()
    except ItemError as error:
        problems[item] = str(error)
        return {}


def _prompted(references: list[Truth], predictions: list[list[Source] | None], options: Options) -> Scores:
    """Text to image: the attributes that the prompt states, read off the picture."""
    judged, true_values = [], {name: [] for name in CHOICES}  # type: ignore[var-annotated]
    whole: list[dict[str, Any]] = []
    problems: dict[int, str] = {}
    lost: Counter[str] = Counter()
    for k, (reference, made) in enumerate(zip(references, predictions, strict=True)):
        stated = parse_text(reference.row["prompt"])
        asked = [name for name in CHOICES if name in stated and (name != "props" or stated["props"])]
        said = _read(made[0], problems, k) if made else {}
        true = truth(reference.scenes[0])
        right = {name: float(said.get(name, UNREADABLE) == true[name]) for name in asked}
        lost.update(name for name in asked if said.get(name, UNREADABLE) == UNREADABLE)
        shares = {"stated": float(np.mean(list(right.values()))), "all": float(all(right.values()))} if asked else {}
        judged.append({**right, **shares})
        whole.append({name: true[name] for name in asked})
        for name in asked:
            true_values[name].append(true[name])
        options.progress("oracle", k + 1, len(references))
    titles = {"stated": "stated attributes", "all": "every stated attribute"}
    measures = _shares(judged, ("all", "stated", *CHOICES), titles)
    _add_baselines(measures, true_values, {})
    if measures:
        _add_whole(measures[0], whole)
        _add_share(measures[1], whole)
    return Scores(measures, notes=_unreadable(lost, true_values), problems=problems)


def _unreadable(lost: Counter[str], true_values: dict[str, list[Any]]) -> list[str]:
    shares = [f"{name} {lost[name] / len(values):.0%}" for name, values in true_values.items() if values and lost[name]]
    return [f"unreadable, counted as wrong: {', '.join(shares)}"] if shares else []


def _stories(references: list[Truth], predictions: list[list[Source] | None], options: Options) -> Scores:
    """Generated frames: what their text tells, and what no text tells but the earlier pictures show."""
    names = (*STATED, *UNSTATED)
    judged, copied, true_values = [], [], {name: [] for name in names}  # type: ignore[var-annotated]
    problems: dict[int, str] = {}
    lost: Counter[str] = Counter()
    for k, (reference, made) in enumerate(zip(references, predictions, strict=True)):
        frames, copies = [], []
        for number, scene in enumerate(reference.scenes):
            said = _read(made[number], problems, k) if made else {}
            true = truth(scene)
            lost.update(name for name in names if said.get(name, UNREADABLE) == UNREADABLE)
            frames.append({name: float(said.get(name, UNREADABLE) == true[name]) for name in names})
            given = truth(reference.given or scene)
            copies.append({name: float(given[name] == true[name]) for name in names})
            for name in names:
                true_values[name].append(true[name])
        judged.append(_of_frames(frames))
        copied.append(_of_frames(copies))
        options.progress("oracle", k + 1, len(references))
    order = ("character", "unstated", "place", "action", "props", *UNSTATED, "unstated_all", "all")
    titles = {"unstated": "unstated attributes", "unstated_all": "all unstated of a frame", "all": "all of a frame"}
    measures = _shares(judged, order, titles)
    copies_of = {titles.get(name, name): float(np.mean([item[name] for item in copied])) for name in order}
    _add_baselines(measures, true_values, copies_of)
    kept = next(m for m in measures if m.name == "unstated attributes")
    kept.baselines["chance"] = float(np.mean([100.0 / CHOICES[name] for name in UNSTATED]))
    return Scores(measures, notes=_unreadable(lost, true_values), problems=problems)


def _of_frames(frames: list[dict[str, float]]) -> dict[str, float]:
    """Means over a story's frames, and of the frames where all unstated attributes, or all attributes, are right."""
    shares = {name: float(np.mean([frame[name] for frame in frames])) for name in frames[0]}
    shares["unstated"] = float(np.mean([shares[name] for name in UNSTATED]))
    shares["unstated_all"] = float(np.mean([all(frame[name] for name in UNSTATED) for frame in frames]))
    shares["all"] = float(np.mean([all(frame.values()) for frame in frames]))
    return shares


# ---------------------------------------------------------------- answers, boxes, maps


def _answers(references: list[Truth], predictions: list[str | None], options: Options) -> Scores:
    """Exact answers, by kind of question."""
    guesses, options_of = blind.answers(), blind.choices()
    chances: dict[str, list[float]] = {}
    judged, blinds, true_values = [], [], {"all": []}  # type: ignore[var-annotated]
    for reference, text in zip(references, predictions, strict=True):
        row = reference.row
        kind, true = str(row["meta"].get("kind", "all")), normal_answer(row["answers"][0])
        right = float(text is not None and normal_answer(text) == true)
        guess = float(blind.answer(row["question"], guesses) == true)
        judged.append({"all": right, kind: right})
        blinds.append({"all": guess, kind: guess})
        for name in {"all", kind}:
            true_values.setdefault(name, []).append(true)
            chances.setdefault(name, []).append(1 / options_of.get(blind.pattern(row["question"]), 2))
    order = ["all", *sorted(name for name in true_values if name != "all")]
    measures = _shares(judged, order, {"all": "exact answer"})
    shares = {name: float(np.nanmean([item.get(name, math.nan) for item in blinds])) for name in order}
    for measure, name in zip(measures, order, strict=True):
        measure.baselines["majority"] = 100.0 * Counter(true_values[name]).most_common(1)[0][1] / len(true_values[name])
        measure.baselines["blind"] = 100.0 * shares[name]
        measure.baselines["chance"] = 100.0 * float(np.mean(chances[name]))
    return Scores(measures)


def _boxes(references: list[Truth], predictions: list[tuple[float, ...] | None], options: Options) -> Scores:
    """Boxes with IoU over 0.5."""
    guesses = blind.boxes()
    overlap, guessed = [], []
    for reference, box in zip(references, predictions, strict=True):
        true = reference.row["box"]
        overlap.append(iou(box, true) if box else 0.0)
        guessed.append(iou(blind.box(reference.row["expression"], guesses), true))
    hits = mean_measure("IoU > 0.5", 100.0 * (np.array(overlap) > THRESHOLD), "%")
    mean = mean_measure("mean IoU", overlap)
    shifted = [iou(references[k - len(references) // 2].row["box"], r.row["box"]) for k, r in enumerate(references)]
    hits.baselines["chance"] = 100.0 * float(np.mean(np.array(shifted) > THRESHOLD))
    mean.baselines["chance"] = float(np.mean(shifted))
    hits.baselines["blind"] = 100.0 * float(np.mean(np.array(guessed) > THRESHOLD))
    mean.baselines["blind"] = float(np.mean(guessed))
    lost = sum(box == () for box in predictions)
    return Scores([hits, mean], notes=[f"{lost} answers hold no box, counted as wrong"] if lost else [])


def _maps(references: list[Truth], predictions: list[list[Source] | None], options: Options) -> Scores:
    """Mean IoU of the maps that the oracle reads off pictures, classes present in the truth, class 0 left out."""
    classes = len(CLASSES) - 1
    constant = blind.semantic_map()
    tables, guesses, shifted = [], [], []
    problems: dict[int, str] = {}
    for k, (reference, made) in enumerate(zip(references, predictions, strict=True)):
        true = reference.labels if reference.labels is not None else np.zeros((1, 1), int)
        said = None
        try:
            said = oracle.read_map(made[0].load()).astype(np.int64) if made else None
        except ItemError as error:
            problems[k] = str(error)
        tables.append(counts(true, said, classes))
        guesses.append(counts(true, constant, classes))
        before = references[k - 1].labels
        shifted.append(counts(true, before if before is not None and before.shape == true.shape else None, classes))
        options.progress("oracle", k + 1, len(references))
    table = np.stack(tables)
    measure = Measure("mIoU", float(miou(table.sum(0))), parts=miou(table), resample=partial(_of_maps, table))
    measure.baselines["chance"] = float(miou(np.stack(shifted).sum(0)))
    measure.baselines["blind"] = float(miou(np.stack(guesses).sum(0)))
    return Scores([measure], problems=problems)


def _of_maps(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return miou((weights @ table.reshape(len(table), -1)).reshape(len(weights), *table.shape[1:]))


_JUDGES: dict[str, Callable[[list[Truth], list[Any], Options], Scores]] = {
    "frames": _stories,
    "question": _answers,
    "expression": _boxes,
    "segmentation": _maps,
    "prompt": _prompted,
    "captions": _captions,
}
