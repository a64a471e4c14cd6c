"""Whether a ratio is worse than the committed one by more than its band."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.suite.table import HIGHER, MEASURES, Measure

SAME, WORSE, BETTER, NEW = (
    "as committed",
    "WORSE",
    "better: commit it by --update",
    "not committed yet: --update",
)
ENOUGH_RUNS, DEVIATIONS = 3, 3


@dataclass(frozen=True)
class Found:
    """What the turns of a measure gave."""

    ours: float
    """median, in the measure's unit"""
    reference: float
    ratio: float
    """median of the ratios of each turn of ours to the turn of the reference that came after it:
    what slows the machine for a while slows both"""
    spread: float
    """median absolute deviation of those ratios from their median, as a share of it"""
    turns: int
    seconds: float
    """that all turns of its group took, of both sides"""
    runs: int = 1
    """of the whole suite; of several, `spread` is that of their ratios"""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def found(ours: Sequence[float], reference: Sequence[float], seconds: float) -> Found:
    """The figures of a measure by the turns of its sides, in their order."""
    ratios = [one / other for one, other in zip(ours, reference, strict=True)]
    ratio = statistics.median(ratios)
    return Found(
        ours=statistics.median(ours),
        reference=statistics.median(reference),
        ratio=ratio,
        spread=statistics.median(abs(each / ratio - 1) for each in ratios),
        turns=len(ratios),
        seconds=seconds,
    )


def repeated(runs: Sequence[Mapping[str, Found]]) -> dict[str, Found]:
    """The figures of several runs of the suite: medians, and the spread of the runs' ratios."""
    return {
        name: dataclasses.replace(
            found([run[name].ratio for run in runs], [1.0] * len(runs), 0.0),
            ours=statistics.median(run[name].ours for run in runs),
            reference=statistics.median(run[name].reference for run in runs),
            seconds=sum(run[name].seconds for run in runs),
            turns=sum(run[name].turns for run in runs),
            runs=len(runs),
        )
        for name in runs[0]
    }


def band_of(measure: Measure, one: Found, before: float | None) -> float:
    """The band to commit: by the spread of the runs' ratios where there are enough of them, else as
    it was committed before; never less than the measure's own."""
    if one.runs >= ENOUGH_RUNS:
        return max(measure.band, DEVIATIONS * one.spread)
    return max(measure.band, before or 0.0)


def gain(measure: Measure, ratio: float, committed: float) -> float:
    """How many times better a ratio is than the committed one; under 1 it is worse."""
    return ratio / committed if measure.better == HIGHER else committed / ratio


def verdict(measure: Measure, ratio: float, committed: float | None) -> str:
    """One of the four, by the measure's direction and band.

    The band is the same either way: what is 1 + band times better, or worse, is past it.
    """
    if committed is None:
        return NEW
    times, past = gain(measure, ratio, committed), 1 + measure.band
    return WORSE if times < 1 / past else BETTER if times > past else SAME


def verdicts(
    ratios: Mapping[str, float],
    committed: Mapping[str, float],
    measures: Mapping[str, Measure] = MEASURES,
) -> dict[str, str]:
    """Name -> verdict of all that was measured."""
    return {name: verdict(measures[name], r, committed.get(name)) for name, r in ratios.items()}


def notes(
    ratios: Mapping[str, float],
    committed: Mapping[str, float],
    asked: Sequence[str],
    measures: Mapping[str, Measure] = MEASURES,
) -> list[str]:
    """What a person is told of names that stand on one side only."""
    unknown = sorted(set(committed) - set(measures))
    missing = [name for name in asked if name not in ratios]
    return [
        f"{name}: committed, but the suite has no such measure: --update" for name in unknown
    ] + [f"{name}: was asked for and not measured" for name in missing]


def table(
    measured: Mapping[str, Found],
    committed: Mapping[str, float],
    measures: Mapping[str, Measure] = MEASURES,
) -> str:
    """What a person reads: a line for each measure."""
    said = verdicts({name: one.ratio for name, one in measured.items()}, committed, measures)
    lines = [
        f"{'measure':14}{'unit':11}{'better':>7}{'ours':>10}{'reference':>11}{'ratio':>8}"
        f"{'spread':>8}{'committed':>11}{'band':>7}{'seconds':>9}  verdict"
    ]
    for name, one in measured.items():
        measure, known = measures[name], committed.get(name)
        lines.append(
            f"{name:14}{measure.unit:11}{measure.better:>7}{one.ours:>10.4g}{one.reference:>11.4g}"
            f"{one.ratio:>8.3f}{one.spread:>8.1%}{'-' if known is None else f'{known:.3f}':>11}"
            f"{measure.band:>7.0%}{one.seconds:>9.1f}  {said[name]}"
        )
    return "\n".join(lines)
