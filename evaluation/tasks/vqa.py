"""Short answers to questions about pictures, in the forms of VQA v2, of GQA, and as JSONL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from config import Config
from data.record_content import picture_name
from data.world.forms import forms_beside
from documents import LIST, OBJECT, TEXT, require
from errors import PhiSightError
from evaluation import forms
from evaluation.intervals import mean_figure
from evaluation.questions import normalised as folded
from evaluation.task import Answered, Asked, Figure, Task
from evaluation.vqa_answers import accuracy, token_f1

PICTURE_OF = {"mscoco": "COCO_{subset}_{id:012d}.jpg"}  # data_type of VQA v2 -> a picture's name
ABSTRACT = "{type}_{subset}_{id:012d}.png"


class Vqa(Task):
    """VQA accuracy, exact match and token F1."""

    about = "short answers, beside those that people gave"
    form = "VQA v2's two files, GQA's, or JSONL"
    main = "accuracy"

    def default_data(self, config: Config, images: Path) -> list[Path]:
        made = forms_beside(images)
        return [made / "vqa_questions.json", made / "vqa_annotations.json"]

    def questions(self, data: Sequence[Path], limit: int) -> list[Asked]:
        found = [forms.read_file(path) for path in data]
        whole = [one for one in found if isinstance(one, dict)]
        if len(whole) == len(found) == 2:
            asked = _of_vqa_v2(data, whole)
        elif len(found) == 1:
            asked = _of_gqa(whole[0]) if whole else _of_lines(found[0])  # type: ignore[arg-type]
        else:
            raise PhiSightError(
                "--data: give VQA v2's questions and annotations, or one file of another form"
            )
        return forms.first(forms.unique(asked, data[0]), limit)

    def scored(self, asked: Asked, answer: str) -> dict[str, float]:
        said = folded(answer)
        return {
            "accuracy": accuracy(answer, asked.labels),
            "exact": float(any(said == folded(label) for label in asked.labels)),
            "token_f1": max(token_f1(answer, label) for label in asked.labels),
        }

    def figures(self, answered: Sequence[Answered]) -> dict[str, Figure]:
        return {name: mean_figure(answered, name) for name in ("accuracy", "exact", "token_f1")}


# -- the forms ------------------------------------------------------------------------------------


def _of_vqa_v2(data: Sequence[Path], whole: Sequence[forms.Record]) -> list[Asked]:
    """{"data_type", "data_subtype", "questions": [{"question_id", "image_id", "question"}]} and
    {"annotations": [{"question_id", "answer_type", "answers": [{"answer"}]}]}, in any order."""
    by_part = {part: i for i, one in enumerate(whole) for part in ("questions", "annotations")
               if part in one}  # fmt: skip
    if len(by_part) < 2:
        raise PhiSightError(
            f"{data[0]}, {data[1]}: not `questions` and `annotations` as VQA v2 has them; give both"
        )
    questions, annotations = whole[by_part["questions"]], whole[by_part["annotations"]]
    with forms.at(data[by_part["questions"]].name):
        shape = {"questions": [OBJECT], "data_type?": TEXT, "data_subtype?": TEXT}
        require(questions, shape)
    with forms.at(data[by_part["annotations"]].name):
        require(annotations, {"annotations": [OBJECT]})
    answers: dict[str, forms.Record] = {}
    for number, record in enumerate(annotations["annotations"], 1):
        with forms.at(f"{data[by_part['annotations']].name} annotation {number}"):
            name = forms.identity(record, "question_id")
            if name in answers:
                raise PhiSightError(f"the question {name[:60]} has an annotation before")
            answers[name] = record
    asked = []
    for number, record in enumerate(questions["questions"], 1):
        with forms.at(f"{data[by_part['questions']].name} question {number}"):
            name = forms.identity(record, "question_id")
            if name not in answers:
                raise PhiSightError(f"the question {name[:60]} has no annotation")
            asked.append(_vqa_question(questions, record, answers[name]))
    return asked


def _vqa_question(questions: forms.Record, record: forms.Record, annotation: forms.Record) -> Asked:
    require(annotation, {"answers": [{"answer": TEXT}], "answer_type?": TEXT})
    given = [one["answer"] for one in annotation["answers"]]
    return Asked(
        forms.identity(record, "question_id"),
        forms.image(record) if "image" in record else _vqa_picture(questions, record),
        forms.text(record, "question"),
        forms.texts({"answers": given}, "answers"),
        forms.kind(annotation, "answer_type"),
    )


def _vqa_picture(questions: forms.Record, record: forms.Record) -> str:
    """The file's name that VQA v2 makes of an `image_id`."""
    number = record.get("image_id")
    if type(number) is not int or number < 0:
        raise PhiSightError("`image_id` is not a number, and there is no `image`")
    form = PICTURE_OF.get(questions.get("data_type", "mscoco"), ABSTRACT)
    subset, kind = questions.get("data_subtype", "val2014"), questions.get("data_type", "")
    return picture_name(form.format(type=kind, subset=subset, id=number))


def _of_gqa(whole: forms.Record) -> list[Asked]:
    """{question id: {"imageId", "question", "answer", "types": {"semantic"}}}. A picture's name is
    its id with ".jpg", unless the id has an ending of its own."""
    asked = []
    for name, record in whole.items():
        with forms.at(f"question {name[:60]}"):
            require(record, {"imageId": TEXT, "types?": OBJECT})
            picture = forms.image(record, "imageId")
            if not PurePosixPath(picture).suffix:
                picture += ".jpg"
            kind = forms.kind(record.get("types", {}), "semantic")
            labels = (forms.text(record, "answer"),)
            asked.append(Asked(name, picture, forms.text(record, "question"), labels, kind))
    return asked


def _of_lines(records: Sequence[tuple[str, forms.Record]]) -> list[Asked]:
    """`question_id`, `image`, `text` (or `question`), `label` (or `answer`, or a list as `answers`)
    and, if wanted, `kind`."""
    asked = []
    for where, record in records:
        with forms.at(where):
            require(record, {"answers?": LIST})
            several = "answers" in record
            labels = forms.texts(record, "answers") if several else ()
            asked.append(
                Asked(
                    forms.identity(record, "question_id", "id"),
                    forms.image(record),
                    forms.text(record, "text", "question"),
                    labels or (forms.text(record, "label", "answer"),),
                    forms.kind(record),
                )
            )
    return asked
