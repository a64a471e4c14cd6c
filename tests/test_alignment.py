"""Does an export still see: the gap that counts, what warns, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import exporting
import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

import export
import exports.generated
import exports.llava
from assistant.assistant import Assistant
from config import replace
from data.dataset import Question
from data.features import blank_picture
from data.pictures import PictureFolders
from errors import PhiSightError
from evaluation.questions import add_pictures, answer_questions
from exports import alignment, measure
from exports.asked import Asked, Questions
from exports.measure import CERTIFICATE


class Store:
    """Of a feature store, what tells pictures apart."""

    def hash_of(self, name: str) -> str:
        return name


def questions(count: int = 100, pictures: int = 10) -> Questions:
    """`count` questions, the answer to each of which is "yes"."""
    prompt = dataclasses.make_dataclass("Prompt", ["images"])
    asked = [Asked((), "Yes.") for _ in range(count)]
    prompts = [prompt((f"picture {i % pictures}",)) for i in range(count)]
    return Questions(asked, prompts, Store(), {"questions_from": "a test"})


def answers(count: int = 100, **right: int) -> dict[str, list[str]]:
    """For each condition so many right answers of `count`, the first ones."""
    return {name: ["yes"] * n + ["no"] * (count - n) for name, n in right.items()}


def test_the_gap_is_what_the_picture_adds():
    found = alignment.scored(questions(), answers(right=90, swapped=30, blank=20), "a model")
    assert (found["right"], found["swapped"], found["blank"]) == (90, 30, 20)
    assert found["gap"] == 60 and found["questions"] == 100 and found["warning"] == ""
    # 60 of 100 are right with the picture only: by hand, with half a question in every case.
    deviation = math.sqrt(60 + 1 - 60**2 / 102) / 102
    assert found["gap_at_least"] == round(100 * (60 / 102 - 1.645 * deviation), 2)


def test_a_model_that_sees_nothing_is_warned_about():
    """It is right as often with any picture, and chance alone makes a gap of a few points."""
    blind = alignment.scored(questions(), answers(right=40, swapped=40, blank=40), "a model")
    lucky = alignment.scored(questions(), answers(right=40, swapped=36, blank=40), "a model")
    for found in (blind, lucky):
        assert found["gap_at_least"] < alignment.WANTED_GAP
        assert found["warning"].startswith("its answers may not come from the picture: 40 % of 100")
        assert found["warning"] in alignment.alignment_line(found)


def test_a_few_questions_are_no_proof():
    for count, enough in ((1, False), (2, False), (8, True)):
        certain = alignment.certain_gap([True] * count, [False] * count)
        assert (certain >= alignment.WANTED_GAP) is enough


def test_the_lower_end_is_passed_by_chance_as_rarely_as_it_says():
    """A model whose gap is 0, but whose answers to the two pictures are drawn apart."""
    drawn = random.Random(0)
    passed = 0
    for _ in range(1000):
        right, swapped = ([drawn.random() < 0.4 for _ in range(60)] for _ in range(2))
        passed += alignment.certain_gap(right, swapped) > 0
    assert 20 <= passed <= 80  # 50 were to be expected


def test_what_the_conversion_lost_is_told_from_what_the_run_never_had():
    sees = alignment.scored(questions(), answers(right=90, swapped=30, blank=20), "ours")
    lost = alignment.scored(questions(), answers(right=30, swapped=30, blank=30), "theirs", sees)
    assert lost["of_the_run"] == sees
    assert lost["warning"].endswith("the run itself has 60, so the export lost them")
    never = alignment.scored(questions(), answers(right=30, swapped=30, blank=30), "theirs", lost)
    assert "the export lost them" not in never["warning"]


@pytest.mark.parametrize(("what", "flag"), [("llava", "--dtype"), ("gguf", "--quantize")])
def test_what_the_export_lost_is_looked_for_by_a_flag_that_it_takes(what, flag):
    sees = alignment.scored(questions(), answers(right=90, swapped=30, blank=20), "ours")
    lost = alignment.scored(questions(), answers(right=30, swapped=30, blank=30), "theirs", sees)
    with pytest.raises(PhiSightError, match=f"so the export lost them: use another {flag}$"):
        alignment.check_alignment(lost, 40, what)


@pytest.mark.parametrize(("required", "refused"), [(None, False), (40, False), (55, True)])
def test_the_gate_asks_for_points_that_are_certain(required, refused):
    found = alignment.scored(questions(), answers(right=90, swapped=30, blank=20), "a model")
    if not refused:
        alignment.check_alignment(found, required, "llava")
        return
    with pytest.raises(PhiSightError, match=r"llava: refused.*gap of 60 .*asks 55; ask more"):
        alignment.check_alignment(found, required, "llava")


def test_one_picture_cannot_be_swapped():
    found = alignment.scored(questions(5, 1), answers(5, right=5, swapped=5, blank=5), "a model")
    assert found["gap"] is None and "all about one picture" in found["warning"]
    assert alignment.alignment_line(found).startswith("warning: whether its answers come from")
    with pytest.raises(PhiSightError, match="refused, nothing was written: .* not measured"):
        alignment.check_alignment(found, 0, "push")
    alignment.check_alignment(found, None, "push")


def test_a_program_is_shown_the_same_pictures_as_the_run():
    probe = exporting.probe()
    name = probe.prompts[0].images[0]
    folders = PictureFolders([runs.world() / "images"])
    shown = {
        condition: alignment.pictures_under(condition, probe, folders)(name)
        for condition in ("right", "swapped", "blank")
    }
    assert shown["blank"].tobytes() == blank_picture().tobytes()
    assert shown["right"].tobytes() != shown["swapped"].tobytes()
    other = alignment.swapped_pictures(probe)[name]
    again = alignment.pictures_under("right", probe, folders)(other)
    assert shown["swapped"].tobytes() == again.tobytes()


def test_a_run_is_measured_by_the_questions_alone():
    """Where it has held-out questions, its training data need not be there."""
    run = runs.assistant()
    config = replace(run.config, data="gone.json")
    found = alignment.alignment_of_run(Assistant(run.parts, config, run.source), 8)
    assert found == alignment.alignment_of(run, exporting.probe())
    config = replace(config, held_out_questions="")
    found = alignment.alignment_of_run(Assistant(run.parts, config, run.source), 8)
    assert found["gap"] is None and "not measured: gone.json" in found["warning"]


def test_questions_of_conversations_are_asked_in_words_too():
    """As messages they give the ids that the meter asks, and the answer that was to be learnt."""
    run = runs.assistant()
    other = Assistant(run.parts, replace(run.config, held_out_questions=""), run.source)
    probe = measure.make_probe(other, 3)
    first = {tuple(s.input_ids[: s.supervised.index(True)]): s for s in probe.data.first_exchanges}
    for one, prompt in zip(probe.asked, probe.prompts, strict=True):
        sample = first[tuple(prompt.input_ids)]
        learnt = [i for i, s in zip(sample.input_ids, sample.supervised, strict=True) if s]
        text = run.parts.base.tokenizer.decode(learnt, skip_special_tokens=True)
        assert text.strip() == one.answer.strip() and one.messages[-1].role == "user"


def test_questions_with_typed_marks_are_not_asked(tmp_path):
    """Other programs read them otherwise, and transformers raises over the mark of a picture."""
    run, name = runs.assistant(), "train_000000.png"
    texts = ["What is <|placeholder1|>?", "Is </s> red?", "Is it <|end|>?", "Is it <red>? a < b >"]

    def asked_of(chosen: list[str]) -> Assistant:
        path = tmp_path / "questions.jsonl"
        lines = [{"question_id": t, "image": name, "text": t, "label": "no"} for t in chosen]
        path.write_text("\n".join(map(json.dumps, lines)))
        return Assistant(run.parts, replace(run.config, held_out_questions=str(path)), run.source)

    probe = measure.make_probe(asked_of(texts), 9)
    assert [one.text for one in probe.asked] == texts[-1:]
    assert probe.facts["questions"] == 1 and probe.facts["questions_left_out_for_marks"] == 3
    with pytest.raises(PhiSightError, match="to ask without a typed mark such as <.end.>; give"):
        measure.make_probe(asked_of(texts[:-1]), 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--merge", "--out=x", "--require-alignment=10"], "--merge writes no pictures' part"),
        (["--llava=x", "--require-alignment=-1"], "must be 0 to 100 points"),
        (["--llava=x", "--require-alignment=nan"], "must be 0 to 100 points"),
        (["--import-peft=x", "--out=y", "--require-alignment=1"], "--import-peft writes no"),
    ],
)
def test_bad_requirements_are_told_before_anything_is_loaded(arguments, message):
    with pytest.raises(PhiSightError, match=message):
        export.main([*arguments, "--run=nowhere"])


def test_an_adapter_is_measured_where_it_is_asked_of_it(tmp_path):
    """It changes nothing, so that without a requirement it needs no data."""
    with pytest.raises(PhiSightError, match="peft: refused, nothing was written"):
        export.main(
            [
                *(f"--peft={tmp_path / 'out'}", f"--run={runs.finished_run()}"),
                *("--require-alignment=99", exporting.ANSWERS),
            ]
        )
    assert list(tmp_path.iterdir()) == []


def test_the_certificate_of_a_llava_has_both_sides():
    found = json.loads((exporting.llava() / CERTIFICATE).read_text())["alignment"]
    assert found["answered_by"].startswith("transformers' image-text-to-text pipeline")
    figures = ("right", "swapped", "blank", "gap", "gap_at_least", "questions")
    assert [found[name] for name in figures] == [found["of_the_run"][name] for name in figures]
    assert found["questions"] == 8 and found["warning"]  # the tests' run has learnt little


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """Questions that the tests' run answers rightly with the right picture only: what it says of
    some pictures, each otherwise, are the right answers. Returns the file with them."""
    for module in (alignment, measure, exports.generated):
        monkeypatch.setattr(module, "LONGEST_ANSWER", 32)
    run, store = runs.assistant(), exporting.probe().store
    names = sorted(path.name for path in (runs.world() / "images").iterdir())
    asked = [Question(name, name, "Describe the picture.", "") for name in names]
    add_pictures(run, asked, runs.world() / "images", store)
    said = answer_questions(run, asked, store.features_of, 32, "")
    chosen = dict(zip(said, names, strict=True))  # one picture for each answer
    assert len(chosen) >= 6
    path = tmp_path / "questions.jsonl"
    lines = [
        {"question_id": name, "image": name, "text": "Describe the picture.", "label": text}
        for text, name in list(chosen.items())[:6]
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_llava_whose_projector_is_lost_is_refused(tmp_path, seen, monkeypatch):
    """Broken on purpose in the folder. The limits of loss and answers would tell of it as well, and
    are set so that they do not."""
    run = runs.assistant()
    asked = Assistant(run.parts, replace(run.config, held_out_questions=str(seen)), run.source)
    assert alignment.alignment_of_run(asked, 6)["gap_at_least"] > 40
    write = exports.llava.write_processor

    def without_projector(assistant, folder, *rest):
        write(assistant, folder, *rest)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        lost = [name for name in tensors if "multi_modal_projector" in name]
        assert len(lost) == 4
        tensors |= {name: torch.zeros_like(tensors[name]) for name in lost}
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(exports.llava, "write_processor", without_projector)
    blind = r"llava: refused.* (\d+|16.67) % of 6 answers are exact with the right picture and \1 %"
    with pytest.raises(
        PhiSightError, match=rf"{blind} with another one, a gap of 0 .* asks 40; the run itself"
    ):
        export.main(
            [
                *(f"--llava={tmp_path / 'new/llava'}", f"--run={runs.finished_run()}"),
                *("--dtype=float32", f"--held-out-questions={seen}"),
                *("--max-loss-difference=1e9", "--min-greedy-equal=0", "--require-alignment=40"),
            ]
        )
    assert list(tmp_path.iterdir()) == [seen]
