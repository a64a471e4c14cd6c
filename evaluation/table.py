"""The figures of an evaluation as a table for people, and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from data.dataset import Question
from evaluation.alignment import alignments
from evaluation.questions import REPORTED_ONLY, Scores, score_table, scores_by_kind
from evaluation.runner import RIGHT, SWAPPED, Evaluation
from evaluation.task import Answered, Figure, Task

DIGITS = {"%": 1, "points": 1, "nats": 4, "": 3}  # unit -> digits behind the point
HELD_OUT = "held_out"

Figures = dict[str, Figure]


def figures_by_kind(task: Task, answered: Sequence[Answered]) -> dict[str, Figures]:
    """Kind -> the figures of its questions alone; nothing where there is one kind."""
    kinds = sorted({one.asked.kind for one in answered})
    if len(kinds) < 2:
        return {}
    return {
        kind: task.figures([one for one in answered if one.asked.kind == kind]) for kind in kinds
    }


def shown(one: Figure) -> str:
    """Such as "87.5 [84.1, 90.6]"."""
    digits = DIGITS[one.unit]
    return f"{one.value:.{digits}f} [{one.low:.{digits}f}, {one.high:.{digits}f}]"


def as_table(evaluation: Evaluation) -> str:
    """Figures down, conditions across, each with its interval; the main figure by kind; and by how
    much it is better with the right picture."""
    task, answered = evaluation.task, evaluation.answered
    figures = {condition: task.figures(given) for condition, given in answered.items()}
    kinds = {condition: figures_by_kind(task, given) for condition, given in answered.items()}
    names = list(next(iter(figures.values())))
    rows = [[named(name, figures), *(shown(of[name]) for of in figures.values())] for name in names]
    for kind in next(iter(kinds.values())):
        cells = (shown(of[kind][task.main]) for of in kinds.values())
        rows.append([f"  {task.main}, {kind or 'other'}", *cells])
    rows.append(["questions", *(str(len(given)) for given in answered.values())])
    heads = [f"{evaluation.header['task']}, 95 % intervals", *(f"{c} picture" for c in figures)]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in (heads, *rows)
    ]
    lines += [
        f"alignment: {shown(gap)} {gap.unit} between the right picture and a {condition} one"
        for condition, gap in alignments(task, answered).items()
    ]
    return "\n".join(lines)


def named(name: str, figures: Mapping[str, Figures]) -> str:
    """A figure's name with its unit."""
    unit = next(iter(figures.values()))[name].unit
    return f"{name}, {unit}" if unit else name


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Figures of the first condition by name, `intervals` of the same, all of every condition and
    kind under `conditions` and `by_kind`, and `alignment` against every other condition."""
    task, header = evaluation.task, evaluation.header
    figures = {condition: task.figures(given) for condition, given in evaluation.answered.items()}
    first = next(iter(figures.values()))
    return {
        "task": header["task"],
        **{name: rounded(one.value) for name, one in first.items()},
        "intervals": {name: interval(one) for name, one in first.items()},
        "questions": header["questions"],
        "conditions": {name: _all_of(of) for name, of in figures.items()},
        "by_kind": {
            condition: {kind: _all_of(of) for kind, of in figures_by_kind(task, given).items()}
            for condition, given in evaluation.answered.items()
        },
        "alignment": _all_of(alignments(task, evaluation.answered)),
        "checkpoint": header["run"],
        "weights_digest": header["weights_digest"],
        "seconds": round(evaluation.seconds, 1),
    }


def _all_of(figures: Figures) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "value": rounded(one.value),
            "interval": interval(one),
            "unit": one.unit,
            "answers": one.count,
        }
        for name, one in figures.items()
    }


def rounded(value: float) -> float | None:
    """As JSON shows it; it has no NaN and no infinity, which a run that diverged gives."""
    return round(value, 4) if math.isfinite(value) else None


def interval(one: Figure) -> list[float | None]:
    """Both ends."""
    return [rounded(one.low), rounded(one.high)]


# -- the picture world ----------------------------------------------------------------------------


def world_results(evaluation: Evaluation) -> dict[str, Scores]:
    """Scores of every condition and of every further set, by the name of the column."""
    columns = {
        HELD_OUT if condition == RIGHT else condition: given
        for condition, given in evaluation.answered.items()
    }
    return {name: _scores(given) for name, given in (columns | evaluation.further).items()}


def _scores(given: Sequence[Answered]) -> Scores:
    questions = [
        Question(a.asked.id, a.asked.image, a.asked.text, a.asked.labels[0], a.asked.kind)
        for a in given
    ]
    return scores_by_kind(questions, [one.answer for one in given])


def world_intervals(evaluation: Evaluation) -> dict[str, list[float | None]]:
    """The interval of every column's total, and of the alignment: how much further right answers
    come with the right picture than with a swapped one, question by question. A column that has no
    total, as all of its questions are only reported, has none."""
    task = evaluation.task
    found = {
        HELD_OUT if condition == RIGHT else condition: interval(task.figures(given)[task.main])
        for condition, given in (evaluation.answered | evaluation.further).items()
        if any(one.asked.kind not in REPORTED_ONLY for one in given)
    }
    if (
        HELD_OUT in found
        and SWAPPED in found
        and (gap := alignments(task, evaluation.answered).get(SWAPPED))
    ):
        found["alignment"] = interval(gap)
    return found


def world_table(evaluation: Evaluation) -> str:
    """Kinds down, conditions across, percent exact; below it the intervals and the alignment."""
    results, intervals = world_results(evaluation), world_intervals(evaluation)
    lines = [score_table(results)]
    ends = "; ".join(
        f"{name} {low:.1f} to {high:.1f}"
        for name, (low, high) in intervals.items()
        if name in results
    )
    if ends:
        lines.append(f"95 % intervals of all: {ends}")
    if "alignment" in intervals:
        low, high = intervals["alignment"]
        source = f"({evaluation.header['run']}, {evaluation.seconds:.0f} s)"
        points = results[HELD_OUT]["exact"] - results[SWAPPED]["exact"]
        lines.append(
            f"alignment: {points:.1f} points [{low:.1f}, {high:.1f}] between the right"
            f" picture and a swapped one {source}"
        )
    return "\n".join(lines)


def world_json(evaluation: Evaluation) -> dict[str, Any]:
    """Percent exact by the name of the column, and what else the table says."""
    results = world_results(evaluation)
    summary: dict[str, Any] = {name: result["exact"] for name, result in results.items()}
    first = next(iter(results.values()))
    others = next((results[name] for name in evaluation.further), None)
    intervals = world_intervals(evaluation)
    if "alignment" in intervals:
        gap = results[HELD_OUT]["exact"] - results[SWAPPED]["exact"]
        summary["alignment"] = round(gap, 2)
    return summary | {
        "questions": first["questions"],
        "by_kind": first["by_kind"],
        "novel_by_kind": others["by_kind"] if others else {},
        "intervals": intervals,
        "checkpoint": evaluation.header["run"],
        "weights_digest": evaluation.header["weights_digest"],
        "seconds": round(evaluation.seconds, 1),
    }
