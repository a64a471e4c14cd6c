"""Descriptions of pictures, compared with those that people gave: BLEU-4, ROUGE-L and CIDEr-D."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy

from config import Config
from data.world.forms import forms_beside
from documents import OBJECT, TEXT, require
from errors import PhiSightError
from evaluation import forms
from evaluation.captions import Cider, rouge_l, words
from evaluation.intervals import Sums, figure, mean_figure
from evaluation.task import Answered, Asked, Figure, Task

QUESTION = "Describe the picture in detail."  # where a file has none, as COCO's
ORDERS = 4  # words of BLEU's longest n-gram


class Caption(Task):
    """One description a picture."""

    about = "descriptions, beside several that people gave"
    form = "COCO captions, or JSONL; needs sacrebleu"
    main = "rouge_l"
    longest = 96

    def default_data(self, config: Config, images: Path) -> list[Path]:
        return [forms_beside(images) / "captions.json"]

    def questions(self, data: Sequence[Path], limit: int) -> list[Asked]:
        asked: list[Asked] = []
        for path in data:
            found = forms.read_file(path)
            asked += _of_coco(path, found) if isinstance(found, dict) else _of_lines(found)
        return forms.first(forms.unique(asked, data[0]), limit)

    def scored(self, asked: Asked, answer: str) -> dict[str, float]:
        return {"rouge_l": rouge_l(words(answer), [words(label) for label in asked.labels])}

    def check(self) -> None:
        if importlib.util.find_spec("sacrebleu") is None:
            raise PhiSightError(
                "--task caption: needs the package sacrebleu for BLEU (requirements-extras.txt);"
                " install it"
            )

    def figures(self, answered: Sequence[Answered]) -> dict[str, Figure]:
        self.check()
        references = [[words(label) for label in one.asked.labels] for one in answered]
        cider = Cider(references)
        scores = {
            id(one): cider.score(words(one.answer), of_one)
            for one, of_one in zip(answered, references, strict=True)
        }
        counts = {id(one): _bleu_counts(one) for one in answered}
        return {
            "bleu_4": figure(answered, lambda one: counts[id(one)], _bleu, 1.0, "points"),
            "rouge_l": mean_figure(answered, "rouge_l"),
            "cider": figure(
                answered, lambda one: (scores[id(one)], 1.0), scale=100.0, unit="points"
            ),
        }


# -- BLEU -----------------------------------------------------------------------------------------


def _bleu_counts(one: Answered) -> list[float]:
    """What corpus BLEU sums up over answers: n-grams that agree and n-grams, by their length, and
    the lengths of the answer and of the reference that is nearest to it."""
    from sacrebleu.metrics.bleu import BLEU

    found = BLEU(effective_order=True).sentence_score(one.answer, list(one.asked.labels))
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def _bleu(sums: Sums) -> Sums:
    """Corpus BLEU-4, 0 to 100, as sacrebleu computes it by default."""
    from sacrebleu.metrics.bleu import BLEU

    return numpy.array(
        [
            BLEU.compute_bleu(
                correct=row[:ORDERS],
                total=row[ORDERS : 2 * ORDERS],
                sys_len=row[-2],
                ref_len=row[-1],
                smooth_method="exp",
            ).score
            for row in sums.astype(int).tolist()
        ]
    )


# -- the forms ------------------------------------------------------------------------------------


def _of_coco(path: Path, whole: forms.Record) -> list[Asked]:
    """{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""
    with forms.at(path.name):
        require(whole, {"images": [OBJECT], "annotations": [OBJECT]})
    captions: dict[str, list[str]] = {}
    for number, record in enumerate(whole["annotations"], 1):
        with forms.at(f"{path.name} annotation {number}"):
            name = forms.identity(record, "image_id")
            captions.setdefault(name, []).append(forms.text(record, "caption"))
    asked = []
    for number, record in enumerate(whole["images"], 1):
        with forms.at(f"{path.name} image {number}"):
            require(record, {"file_name": TEXT})
            name = forms.identity(record, "id")
            if name not in captions:
                raise PhiSightError(f"the image {name[:60]} has no caption")
            picture = forms.image(record, "file_name")
            asked.append(Asked(name, picture, QUESTION, tuple(captions[name])))
    return asked


def _of_lines(records: Sequence[tuple[str, forms.Record]]) -> list[Asked]:
    """`image`, `captions`, and if wanted `id` and `text`, the question."""
    asked = []
    for where, record in records:
        with forms.at(where):
            picture = forms.image(record)
            named = "question_id" in record or "id" in record
            name = forms.identity(record, "question_id", "id") if named else picture
            question = forms.text(record, "text") if "text" in record else QUESTION
            asked.append(Asked(name, picture, question, forms.texts(record, "captions")))
    return asked
