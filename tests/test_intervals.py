"""Intervals: against scipy's bootstrap, and what drawing whole pictures means."""

from __future__ import annotations

import numpy
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import intervals
from evaluation.intervals import RESAMPLES, cluster_sums, figure, mean_figure, ratio, resampled
from evaluation.task import Answered, Asked

SCORES = st.lists(st.floats(0, 1), min_size=8, max_size=60)


def answers(scores: list[float], images: list[str]) -> list[Answered]:
    return [
        Answered(Asked(str(i), image, "?", ("yes",)), "right", "yes", {"good": score})
        for i, (score, image) in enumerate(zip(scores, images, strict=True))
    ]


@settings(max_examples=25, deadline=None)
@given(SCORES)
def test_the_interval_of_a_mean_is_scipys_where_every_picture_has_one_question(scores):
    found = mean_figure(answers(scores, [str(i) for i in range(len(scores))]), "good")
    reference = scipy.stats.bootstrap(
        (numpy.array(scores),),
        numpy.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=numpy.random.default_rng(1),
    ).confidence_interval
    assert found.value == pytest.approx(100 * numpy.mean(scores))
    # Both are estimates from 2,000 draws: the ends vary by about a twentieth of the width.
    slack = 100 * 6 * numpy.std(scores) / numpy.sqrt(len(scores)) / numpy.sqrt(RESAMPLES) * 4 + 1e-9
    assert found.low == pytest.approx(100 * reference.low, abs=slack)
    assert found.high == pytest.approx(100 * reference.high, abs=slack)


@settings(max_examples=25, deadline=None)
@given(SCORES, st.integers(2, 5))
def test_asking_the_same_of_a_picture_several_times_makes_no_interval_narrower(scores, times):
    images = [str(i) for i in range(len(scores))]
    once = mean_figure(answers(scores, images), "good")
    often = mean_figure(answers(scores * times, images * times), "good")
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert often.count == times * once.count


def test_questions_without_a_picture_are_drawn_one_by_one():
    scores = [0.0, 1.0] * 10
    alone = mean_figure(answers(scores, [""] * 20), "good")
    apart = mean_figure(answers(scores, [str(i) for i in range(20)]), "good")
    assert alone == apart and alone.low < 50 < alone.high


@given(st.lists(st.tuples(st.floats(-9, 9), st.sampled_from("abc")), min_size=1, max_size=20))
def test_the_sums_of_all_pictures_are_the_sums_of_all_answers(pairs):
    values = numpy.array([[value, 1.0] for value, _ in pairs])
    sums = cluster_sums(values, [name for _, name in pairs])
    assert len(sums) == len({name for _, name in pairs})
    assert sums.sum(0) == pytest.approx(values.sum(0))
    for row, name in zip(sums, dict.fromkeys(name for _, name in pairs)):
        assert row[0] == pytest.approx(sum(value for value, of in pairs if of == name), abs=1e-9)


def test_a_resample_has_as_many_pictures_and_needs_no_more_memory_at_once(monkeypatch):
    sums = numpy.random.default_rng(0).random((30, 3))
    sums[:, 2] = 1
    whole = resampled(sums)
    assert whole.shape == (RESAMPLES, 3) and (whole[:, 2] == 30).all()
    assert len(numpy.unique(whole[:, 0])) > RESAMPLES / 2
    monkeypatch.setattr(intervals, "CELLS", 100)
    # The same draws; a product of other sizes may add in another order on some processors.
    assert numpy.allclose(resampled(sums), whole, rtol=1e-12, atol=0)


def test_a_ratio_of_nothing_is_nothing():
    assert ratio(numpy.array([0.0, 1.0]), numpy.array([0.0, 4.0])).tolist() == [0, 0.25]
    assert figure([], lambda one: (1.0, 1.0)).count == 0


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """200 sets of 60 pictures with 4 questions each, all of which a picture gets right or wrong:
    drawn question by question, the interval would cover the truth in about 68 % of them."""
    generator = numpy.random.default_rng(5)
    covered = 0
    for _ in range(200):
        right = (generator.random(60) < 0.7).astype(float)
        images = [str(i) for i in range(60) for _ in range(4)]
        found = mean_figure(answers(numpy.repeat(right, 4).tolist(), images), "good")
        covered += found.low <= 70 <= found.high
    assert 0.88 < covered / 200 < 0.99
