"""Evaluations made by hand, for what shows or compares them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from evaluation.meter import ALL_CONDITIONS
from evaluation.runner import Evaluation
from evaluation.task import Answered, Asked
from evaluation.tasks import TASKS

HEADER: dict[str, Any] = {
    "run": "runs/mine/checkpoint-000010",
    "step": 10,
    "weights_digest": "ab" * 32,
    "max_new_tokens": 32,
    "instruction": "",
}


def evaluation(name: str, answered: Iterable[Answered], **header: Any) -> Evaluation:
    """Of answers in their order; those of a further set stand apart, as a runner has them."""
    own: dict[str, list[Answered]] = {}
    further: dict[str, list[Answered]] = {}
    for one in answered:
        table, column = (further, one.asked.subset) if one.asked.subset else (own, one.condition)
        table.setdefault(column, []).append(one)
    return Evaluation(TASKS[name], HEADER | {"task": name} | header, own, further, 1.0)


def answer(
    name: str, number: int, said: str, *labels: str, kind: str = "", condition: str = "right",
    image: str = "", text: str = "What is it?", subset: str = "",
) -> Answered:  # fmt: skip
    """The answer to question `number` of a task, scored by it."""
    image = image or f"{number}.png"
    asked = Asked(str(number), image, text, labels, kind, subset)
    return Answered(asked, condition, said, TASKS[name].scored(asked, said))


def alike(name: str, said: str, *labels: str, **more: Any) -> list[Answered]:
    """Six questions of two kinds under all conditions: right for the picture, wrong without."""
    return [
        answer(
            name, number, said if condition != "right" or number % 3 == 0 else labels[0], *labels,
            kind=f"{more.get('kind', 'kind')}{number % 2}", condition=condition,
            **{key: value for key, value in more.items() if key != "kind"},
        )
        for condition in ALL_CONDITIONS
        for number in range(6)
    ]  # fmt: skip


def losses(*by_condition: tuple[str, list[tuple[float, float]]]) -> list[Answered]:
    """(nats a token, tokens) of conversations, by condition."""
    return [
        Answered(
            Asked(str(number), f"{number}.png", "Describe it.", ("a star",)),
            condition,
            "",
            {"loss": loss, "tokens": tokens},
        )
        for condition, given in by_condition
        for number, (loss, tokens) in enumerate(given)
    ]
