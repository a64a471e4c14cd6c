"""POPE (arXiv 2305.10355): is something in the picture, yes or no? A model that sees what is not
there says yes too often."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from config import Config
from data.record_keys import BadRecord
from data.world.forms import forms_beside
from evaluation import forms
from evaluation.intervals import Sums, figure, mean, ratio
from evaluation.task import Answered, Asked, Figure, Task

NEGATIVE = frozenset({"No", "not", "no"})  # as they are written here: POPE's script folds no case
AFFIRMATIVE = frozenset({"Yes", "yes"})


def words_of(answer: str) -> list[str]:
    """The words of the first sentence, without commas: what POPE's script looks at."""
    return answer.strip().partition(".")[0].replace(",", "").split(" ")


def says_no(answer: str) -> bool:
    """Whether POPE's script takes an answer for "no". Any other is a "yes" to it, also one that is
    neither, such as "A dog" or nothing at all."""
    return not NEGATIVE.isdisjoint(words_of(answer))


def is_neither(answer: str) -> bool:
    """Whether an answer has no word that says yes or no: such a "yes" was not said."""
    return not says_no(answer) and AFFIRMATIVE.isdisjoint(words_of(answer))


def _counts(one: Answered) -> tuple[float, ...]:
    """True and false positives, false negatives, and one: positive is "yes"."""
    wanted, said = one.asked.labels[0] == "yes", not says_no(one.answer)
    return float(wanted and said), float(said and not wanted), float(wanted and not said), 1.0


def _precision(sums: Sums) -> Sums:
    return ratio(sums[:, 0], sums[:, 0] + sums[:, 1])


def _recall(sums: Sums) -> Sums:
    return ratio(sums[:, 0], sums[:, 0] + sums[:, 2])


def _f1(sums: Sums) -> Sums:
    return ratio(2 * sums[:, 0], 2 * sums[:, 0] + sums[:, 1] + sums[:, 2])


class Pope(Task):
    """One question a line: `question_id`, `image`, `text`, `label` ("yes" or "no")."""

    about = "is it in the picture, yes or no"
    form = "POPE's own"
    main = "accuracy"

    def default_data(self, config: Config, images: Path) -> list[Path]:
        return [forms_beside(images) / "pope_random.json"]

    def questions(self, data: Sequence[Path], limit: int) -> list[Asked]:
        asked: list[Asked] = []
        for path in data:
            asked += [_asked(where, record) for where, record in forms.records_of(path)]
        return forms.first(forms.unique(asked, data[0]), limit)

    def scored(self, asked: Asked, answer: str) -> dict[str, float]:
        return {"accuracy": float(says_no(answer) == (asked.labels[0] == "no"))}

    def figures(self, answered: Sequence[Answered]) -> dict[str, Figure]:
        return {
            "accuracy": figure(answered, lambda one: (one.scores["accuracy"], 1.0), mean),
            "precision": figure(answered, _counts, _precision),
            "recall": figure(answered, _counts, _recall),
            "f1": figure(answered, _counts, _f1),
            "yes_share": figure(answered, lambda one: (not says_no(one.answer), 1.0), mean),
            "neither_share": figure(answered, lambda one: (is_neither(one.answer), 1.0), mean),
        }


def _asked(where: str, record: forms.Record) -> Asked:
    with forms.at(where):
        label = forms.text(record, "label").casefold()
        if label not in ("yes", "no"):
            raise BadRecord(f"`label` is {label[:40]!r}, not yes or no")
        return Asked(
            forms.identity(record, "question_id", "id"),
            forms.image(record),
            forms.text(record, "text", "question"),
            (label,),
            forms.kind(record),
        )
