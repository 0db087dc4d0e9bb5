"""Boxes, ranked answers, resampling: known answers, closed forms, properties."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmi_engine.metrics import bootstrap, ranking, rec
from mmi_engine.metrics.base import Measure, Options, mean_measure


def test_half_overlap_is_a_hit_only_in_the_released_variant():
    a, b = (0.0, 0.0, 300.0, 300.0), (100.0, 0.0, 400.0, 300.0)
    assert rec.iou(a, b) == 0.5 == rec.iou(b, a)
    assert rec.Rec(Options()).score([a], [b]).measures[0].value == 0.0
    assert rec.Rec(Options(variant="released")).score([a], [b]).measures[0].value == 100.0
    assert rec.iou(a, (5, 5, 5, 9)) == rec.iou((9, 9, 1, 1), a) == 0.0
    assert rec.Rec(Options()).score([a, a], [None, a]).measures[0].value == 50.0


def test_quantised_boxes():
    assert rec.quantise((0, 0, 640, 480), (640, 480)) == (0, 0, 999 * 0.64, 999 * 0.48)
    box = rec.quantise((10.4, 20.2, 110.9, 220.3), (640, 480))
    assert np.allclose(box, (10.4, 20.2, 110.9, 220.3), atol=0.5) and box[0] == 16 * 0.64


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [([1, 2, 3, 4, 5], 0.913222459), ([5, 4, 3, 2, 1], 0.109501065), ([2, 1, 3, 4, 5], 0.785114425)],
)
def test_ndcg(ranks, expected):
    relevance = np.array([1, 0.5, 0, 0.25, 0])
    assert ranking.ndcg(np.array(ranks), relevance) == pytest.approx(expected, abs=1e-9)


def test_ndcg_of_the_best_order_is_one_and_without_relevance_undefined():
    relevance = np.array([0.2, 0.9, 0, 0.9])
    assert ranking.ndcg(np.array([3, 1, 4, 2]), relevance) == pytest.approx(1.0)
    assert math.isnan(ranking.ndcg(np.arange(1, 4), np.zeros(3)))


def test_ranks_and_missing_lists():
    references = [(4, None, 2), (4, np.array([0, 0, 1.0, 0]), 2), (4, None, 0)]
    predictions = [np.array([2, 3, 1, 4]), np.array([1, 2, 4, 3]), None]
    measures = {m.name: m.value for m in ranking.Ranking(Options()).score(references, predictions).measures}
    assert measures["MRR"] == pytest.approx((1 + 1 / 4 + 0) / 3)
    assert measures["R@1"] == pytest.approx(1 / 3) and measures["R@5"] == pytest.approx(2 / 3)
    assert measures["mean rank"] == pytest.approx((1 + 4 + 4) / 3)
    assert measures["NDCG"] == 0.0  # its k is 1, and the relevant option came last


def test_interval_of_a_mean_is_that_of_the_normal():
    parts = np.random.default_rng(0).normal(5.0, 2.0, 400)
    measure = mean_measure("x", parts)
    bootstrap.add_intervals([measure], 400, 2000)
    half = 1.96 * parts.std() / 20
    assert np.allclose([measure.low, measure.high], [parts.mean() - half, parts.mean() + half], atol=0.03)


def test_means_with_gaps_and_other_measures_share_weights():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    plain = mean_measure("plain", values)
    again = Measure("again", 3.0, resample=lambda w: (w[:, [0, 2, 3]] @ [1.0, 3, 5]) / w[:, [0, 2, 3]].sum(1))
    bootstrap.add_intervals([plain, again], 4, 50)
    assert plain.value == 3.0 and len(again.draws) == len(plain.draws) == 50
    assert np.allclose(plain.draws, again.draws, equal_nan=True)


def test_no_interval_without_enough_items():
    measure = mean_measure("x", [1.0])
    bootstrap.add_intervals([measure], 1, 100)
    assert math.isnan(measure.low) and measure.draws is None


def test_sign_flips_counts_all_patterns_of_few_items():
    assert bootstrap.sign_flips(np.array([1.0, 1, 1, 1])) == pytest.approx(2 / 16)
    assert bootstrap.sign_flips(np.array([0.0, 0.0])) == 1.0
    assert bootstrap.sign_flips(np.array([1.0, -1, np.nan])) == 1.0
    assert bootstrap.sign_flips(np.full(200, 0.5), 999) == pytest.approx(1 / 1000)


def test_false_alarms_of_the_paired_tests_are_as_rare_as_promised():
    rng = np.random.default_rng(0)
    alarms = [0, 0]
    for _ in range(200):
        a, b = (mean_measure("x", rng.normal(size=40)) for _ in range(2))
        bootstrap.add_intervals([a, b], 40, 200)
        alarms[0] += bootstrap.paired(a, b, 40, 200).p < 0.05
        for m, parts in ((a, a.parts), (b, b.parts)):
            m.resample = lambda w, parts=parts: w @ parts / 40
        alarms[1] += bootstrap.paired(a, b, 40, 200).p < 0.05
    assert all(2 <= count <= 22 for count in alarms)


def test_a_real_difference_is_found_and_bounded():
    rng = np.random.default_rng(1)
    base = rng.normal(size=300)
    a, b = mean_measure("x", base + 0.3 + 0.1 * rng.normal(size=300)), mean_measure("x", base)
    bootstrap.add_intervals([a, b], 300, 500)
    found = bootstrap.paired(a, b, 300, 500)
    assert found.p < 0.01 and 0.25 < found.low < found.value < found.high < 0.35
