"""What a task of `evaluate.py` is made of: questions, scored answers, and figures of a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from config import Config
from data.chat import RenderedSample
from data.dataset import Message


@dataclass(frozen=True)
class Asked:
    """One question about one picture."""

    id: str
    """of the question in its file; unique within the task"""
    image: str
    """name of the picture within the folder of pictures; empty for a conversation without one"""
    text: str
    labels: tuple[str, ...]
    """the right answers; several where people gave several"""
    kind: str = ""
    """kind of question, for the rows of the table; empty where the task has one kind"""
    subset: str = ""
    """name of a further set of questions, which are asked with the right picture alone and have
    figures of their own; empty for the questions of the task itself"""
    messages: tuple[Message, ...] = field(default=(), repr=False)
    """a whole conversation with its answers, where a task measures its loss"""
    sample: RenderedSample | None = field(default=None, repr=False, compare=False)
    """the same as ids, where they were made already"""


@dataclass(frozen=True)
class Answered:
    """A question with the answer that was given, under one condition of the picture."""

    asked: Asked
    condition: str
    """which picture was shown: see `evaluation.meter.CONDITIONS`"""
    answer: str
    scores: Mapping[str, float] = field(default_factory=dict)
    """name of a figure -> 0 to 1, of this answer alone; of the loss, nats a token"""


@dataclass(frozen=True)
class Figure:
    """A figure over answers with its interval, in the unit of the table."""

    value: float
    low: float
    """of the 95 % interval, from resampling the pictures with replacement (bootstrap)"""
    high: float
    count: int
    """answers that it is over"""
    unit: str = "%"


class Task(ABC):
    """One file of `evaluation/tasks/`. Its name in the table of tasks is what `--task` takes."""

    about: ClassVar[str]
    """one line for --help and the report"""
    form: ClassVar[str]
    """of its files, for --help"""
    main: ClassVar[str]
    """the figure that the alignment meter compares between pictures; every answer has a score of
    this name"""
    generates: ClassVar[bool] = True
    """whether answers are generated; without, the loss of given answers is measured"""
    longest: ClassVar[int] = 32
    """tokens of an answer, where --max-new-tokens is not given"""

    @abstractmethod
    def default_data(self, config: Config, images: Path) -> list[Path]:
        """The files that are read where none is named. Raises `PhiSightError` with a remedy where
        there are none."""

    @abstractmethod
    def questions(self, data: Sequence[Path], limit: int) -> list[Asked]:
        """Read files of the task's form; the first `limit` questions, 0 for all. Raises
        `PhiSightError` with the place of what cannot be read."""

    @abstractmethod
    def scored(self, asked: Asked, answer: str) -> dict[str, float]:
        """What this one answer is worth, by the names of the figures."""

    @abstractmethod
    def figures(self, answered: Sequence[Answered]) -> dict[str, Figure]:
        """The table of all answers of one condition, or of one kind of them. Raises
        `PhiSightError` where a package is missing."""

    def check(self) -> None:
        """Raise `PhiSightError` for what would make the figures fail after all was asked, such as a
        package that is not there."""
        return None
