"""What a task of `evaluate.py` is made of: questions, scored answers, and figures of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Asked:
    """One question about one picture."""

    id: str
    """of the question in its file; unique within the task"""
    image: str
    """name of the picture within the folder of pictures"""
    text: str
    labels: tuple[str, ...]
    """the right answers; several where people gave several"""
    kind: str = ""
    """kind of question, for the rows of the table; empty where the task has one kind"""


@dataclass(frozen=True)
class Answered:
    """A question with the answer that was given, under one condition of the picture."""

    asked: Asked
    condition: str
    """which picture was shown: see `evaluation.meter.CONDITIONS`"""
    answer: str
    scores: Mapping[str, float] = field(default_factory=dict)
    """name of a figure -> 0 to 1, of this answer alone"""


@dataclass(frozen=True)
class Figure:
    """A mean over answers with its interval, in the unit of the table (percent, nats or points)."""

    value: float
    low: float
    """of the 95 % interval, from resampling the pictures with replacement (bootstrap)"""
    high: float
    count: int
    """answers that it is over"""


class Task(Protocol):
    """One file of `evaluation/tasks/`. Its name in the table of tasks is what `--task` takes."""

    about: str
    """one line for --help"""
    main: str
    """the figure that the alignment meter compares between pictures"""

    def questions(self, data: Path, limit: int) -> list[Asked]:
        """Read a file of the task's form; at most `limit` questions, 0 for all. Raises
        `PhiSightError` with the line of what cannot be read."""
        ...

    def scored(self, asked: Asked, answer: str) -> dict[str, float]:
        """What this one answer is worth, by the names of the figures."""
        ...

    def figures(self, answered: Sequence[Answered]) -> dict[str, Figure]:
        """The table of all answers of one condition."""
        ...
