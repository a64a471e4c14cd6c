"""Questions with one right answer, such as the picture world's: how many are exactly right?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from config import Config
from data.dataset import load_questions
from data.prepare import DATA_REMEDY
from errors import PhiSightError
from evaluation import forms
from evaluation.intervals import mean_figure
from evaluation.questions import REPORTED_ONLY, normalised
from evaluation.task import Answered, Asked, Figure, Task
from paths import need_file

NOVEL = "novel_pairs"
SUBSETS = ("", NOVEL)  # of the first file, and of the second


class World(Task):
    """The first file's questions; a second file's are those about novel pairs, asked with the right
    picture alone."""

    about = "the run's held-out questions, exactly right or not"
    form = "JSONL of POPE's form with `kind`"
    main = "exact"
    longest = 96

    def default_data(self, config: Config, images: Path) -> list[Path]:
        if not config.held_out_questions:
            raise PhiSightError(
                "--held-out-questions: the run has none; give a file of them, or measure the loss"
                " of its validation conversations with --task loss"
            )
        given = [need_file(config.held_out_questions, "--held-out-questions", DATA_REMEDY)]
        if config.novel_pair_questions:
            novel = config.novel_pair_questions
            given.append(need_file(novel, "--novel-pair-questions", DATA_REMEDY))
        return given

    def questions(self, data: Sequence[Path], limit: int) -> list[Asked]:
        if len(data) > len(SUBSETS):
            raise PhiSightError("--data: give the questions, and one file of novel pairs at most")
        asked = []
        for path, subset in zip(data, SUBSETS):
            questions = load_questions(path)
            for question in questions[:limit] if limit else questions:
                name = f"{subset}/{question.id}" if subset else question.id
                labels, kind = (question.answer,), question.kind
                asked.append(Asked(name, question.image, question.text, labels, kind, subset))
        return forms.unique(asked, data[0])

    def scored(self, asked: Asked, answer: str) -> dict[str, float]:
        return {"exact": float(normalised(answer) == normalised(asked.labels[0]))}

    def figures(self, answered: Sequence[Answered]) -> dict[str, Figure]:
        kinds = {one.asked.kind for one in answered}
        if not kinds <= set(REPORTED_ONLY):  # a table of one such kind alone counts it
            answered = [one for one in answered if one.asked.kind not in REPORTED_ONLY]
        return {"exact": mean_figure(answered, "exact")}
