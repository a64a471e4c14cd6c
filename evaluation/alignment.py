"""The alignment meter of a task: how much better are answers with the right picture than without?

The difference is taken question by question, between answers to the same question, so that its
interval is the one of the difference, and narrower than those of both figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evaluation.intervals import figure
from evaluation.questions import REPORTED_ONLY
from evaluation.runner import RIGHT
from evaluation.task import Answered, Figure, Task
from evaluation.tasks.loss import TOKENS


def alignments(task: Task, answered: Mapping[str, Sequence[Answered]]) -> dict[str, Figure]:
    """Condition -> the figure of `alignment` against it, for all that were asked under beside the
    right picture; nothing where that was not shown."""
    if len(answered) < 2 or RIGHT not in answered:
        return {}
    main = task.figures(answered[RIGHT])[task.main]
    return {
        condition: alignment(task, main, answered[RIGHT], given)
        for condition, given in answered.items()
        if condition != RIGHT
    }


def alignment(
    task: Task, main: Figure, right: Sequence[Answered], other: Sequence[Answered]
) -> Figure:
    """By how much the task's main figure is better with the right picture, where it is `main`, than
    with the other one: percent become points; of a loss it is how much less it is."""
    if main.count < len(right):  # as the figure leaves them out, its difference does
        right = [one for one in right if one.asked.kind not in REPORTED_ONLY]
    score = {one.asked.id: one.scores[task.main] for one in other}
    sign = 1.0 if task.generates else -1.0

    def sums(one: Answered) -> tuple[float, float]:
        weight = one.scores.get(TOKENS, 1.0)  # a loss is a mean over tokens
        return sign * weight * (one.scores[task.main] - score[one.asked.id]), weight

    is_percent = main.unit == "%"
    return figure(
        right, sums, scale=100.0 if is_percent else 1.0, unit="points" if is_percent else main.unit
    )
