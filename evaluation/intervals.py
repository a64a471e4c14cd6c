"""Intervals of figures by the bootstrap (Efron 1979): how far would a figure move if as many other
pictures had been asked about?

Pictures are drawn with replacement, and with a picture all of its questions: questions about one
picture are right and wrong together, so that drawing them one by one would make an interval too
narrow. The interval is the percentile interval: of `RESAMPLES` figures, from the 2.5th percentile
to the 97.5th. The draws come from a fixed seed: equal answers have equal intervals.

Every figure here is a function of sums over answers: a mean is a sum over a count, precision is
true positives over all that were called positive. So a resample is one row of how often each
picture was drawn, and all of them together are one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy
from numpy.typing import NDArray

from evaluation.task import Answered, Figure

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
CELLS = 2**22  # numbers of the matrix of draws that are held at once

Sums = NDArray[numpy.float64]
Statistic = Callable[[Sums], Sums]
"""(resamples, columns) sums over the answers -> (resamples,) figures"""


def ratio(over: Sums, under: Sums) -> Sums:
    """Element by element; 0 where nothing is divided by nothing, as precision is where nothing was
    called positive."""
    return numpy.divide(over, under, out=numpy.zeros_like(over), where=under != 0)


def mean(sums: Sums) -> Sums:
    """Of the first column, where the second holds ones; see `Statistic`."""
    return ratio(sums[:, 0], sums[:, 1])


def cluster_sums(values: Sums, clusters: Sequence[str]) -> Sums:
    """Sums of the rows of (answers, columns) that belong to one cluster: (clusters, columns), in
    the order in which the clusters first stand."""
    places: dict[str, int] = {}
    rows = [places.setdefault(cluster, len(places)) for cluster in clusters]
    sums = numpy.zeros((len(places), values.shape[1]))
    numpy.add.at(sums, rows, values)
    return sums


def resampled(sums: Sums, resamples: int = RESAMPLES, seed: int = SEED) -> Sums:
    """Totals of (clusters, columns) sums for clusters drawn with replacement, as many as there are:
    (resamples, columns)."""
    count = len(sums)
    generator = numpy.random.default_rng(seed)
    totals = []
    done = 0
    while done < resamples:
        some = min(resamples - done, max(1, CELLS // count))
        drawn = generator.integers(count, size=(some, count))
        drawn += count * numpy.arange(some)[:, None]  # one place for each picture of each resample
        times = numpy.bincount(drawn.ravel(), minlength=some * count).reshape(some, count)
        totals.append(times.astype(float) @ sums)
        done += some
    return numpy.concatenate(totals)


def percentiles(figures: Sums) -> tuple[float, float]:
    """Both ends of the interval of a figure, from its resamples."""
    outside = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile(figures, (outside, 1 - outside))
    return float(low), float(high)


def cluster_of(answered: Answered) -> str:
    """What is drawn together: all questions about one picture; a conversation without one alone."""
    return f"image {answered.asked.image}" if answered.asked.image else f"id {answered.asked.id}"


def figure(
    answered: Sequence[Answered],
    columns: Callable[[Answered], Sequence[float]],
    statistic: Statistic = mean,
    scale: float = 100.0,
    unit: str = "%",
) -> Figure:
    """A figure with its interval.

    Args:
        columns: the numbers of one answer that are summed up.
        statistic: what is made of the sums; see `Statistic`.
        scale: what the statistic is multiplied by.
    """
    if not answered:
        return Figure(0.0, 0.0, 0.0, 0, unit)
    values = numpy.array([columns(one) for one in answered], dtype=float)
    sums = cluster_sums(values, [cluster_of(one) for one in answered])
    value = scale * float(statistic(values.sum(0, keepdims=True))[0])
    low, high = percentiles(scale * statistic(resampled(sums)))
    return Figure(value, low, high, len(answered), unit)


def mean_figure(answered: Sequence[Answered], name: str) -> Figure:
    """The mean of one score in percent."""
    return figure(answered, lambda one: (one.scores[name], 1.0))
