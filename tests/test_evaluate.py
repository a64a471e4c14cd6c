"""Scores: what counts as right, what stands in for a picture, and that the quick meter inside
training agrees with answers that are really generated."""

from __future__ import annotations

import collections
import itertools

import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st

from assistant.assistant import Assistant
from data.chat import RenderedSample, render
from data.dataset import Message, Part, Question, load_questions
from data.features import BLANK, FeatureStore
from evaluation import meter
from evaluation.questions import answer_questions, normalised, score_table, scores_by_kind
from model.vision import VisionTower

LONGEST = 40  # tokens of an answer that is looked at here


def store_of(assistant: Assistant, names: list[str]) -> FeatureStore:
    vision = assistant.parts.vision
    store = FeatureStore(runs.shared() / "features", vision.key, vision.shape)
    assert store.add(names, runs.world() / "images", lambda: VisionTower(vision, "cpu")) == {}
    return store


def asked() -> list[Question]:
    return load_questions(runs.world() / "held_out.jsonl")


def sample_of(assistant: Assistant, question: Question, answer: str) -> RenderedSample:
    messages = (
        Message("user", (Part("image", question.image), Part("text", question.text))),
        Message("assistant", (Part("text", answer),)),
    )
    return render(messages, assistant.parts.chat_format)


def exact(assistant: Assistant, samples: list[RenderedSample], store: FeatureStore) -> float:
    longest = max(len(sample.input_ids) for sample in samples)
    batches = meter.packed_batches(
        samples,
        3 * longest,
        store.features_of,
        assistant.parts.chat_format.padding_id,
        assistant.parts.chat_format.image_id,
        store.shape,
        torch.device("cpu"),
    )
    return meter.exact_answers(assistant.model, batches)


# -- the meter against real answers ---------------------------------------------------------------


def test_teacher_forcing_finds_right_what_greedy_decoding_answers():
    """The labels of the questions, and the model's own answers as labels: the first are mostly
    wrong for a model that has hardly been trained, the second right by construction."""
    assistant, questions = runs.assistant(), asked()
    store = store_of(assistant, [question.image for question in questions])
    answers = answer_questions(assistant, questions, store.features_of, LONGEST, "asking")
    encode = assistant.parts.chat_format.encode_text
    own, labelled = [], []
    for question, answer in zip(questions, answers, strict=True):
        sample = sample_of(assistant, question, question.answer)
        # Only an answer that ended by itself can be compared.
        if len(encode(question.answer)) < LONGEST and len(encode(answer)) < LONGEST - 1:
            labelled.append((answer.strip() == question.answer, sample))
            if answer.strip():
                own.append(sample_of(assistant, question, answer))
    assert len(labelled) > 5 and len(own) > 5
    for right, sample in labelled:
        assert exact(assistant, [sample], store) == (100.0 if right else 0.0)
    assert exact(assistant, own, store) == 100.0
    expected = 100 * sum(right for right, _ in labelled) / len(labelled)
    assert exact(assistant, [s for _, s in labelled], store) == pytest.approx(expected)


def test_one_wrong_token_makes_an_answer_wrong():
    assistant, questions = runs.assistant(), asked()[:12]
    store = store_of(assistant, [question.image for question in questions])
    answers = answer_questions(assistant, questions, store.features_of, LONGEST, "asking")
    encode = assistant.parts.chat_format.encode_text
    question, answer = next(
        (q, a)
        for q, a in zip(questions, answers, strict=True)
        if a.strip() and len(encode(a)) < LONGEST - 1
    )
    assert exact(assistant, [sample_of(assistant, question, answer)], store) == 100.0
    for wrong in (f"{answer} zero", f"zero {answer}"):
        assert exact(assistant, [sample_of(assistant, question, wrong)], store) == 0.0


def test_answers_come_in_the_order_of_the_questions_whatever_the_batch(monkeypatch):
    assistant, questions = runs.assistant(), asked()[:9]
    store = store_of(assistant, [question.image for question in questions])

    def answers() -> list[str]:
        return answer_questions(assistant, questions, store.features_of, 6, "asking")

    together = answers()
    monkeypatch.setattr("evaluation.questions.BATCH", 2)
    assert answers() == together
    assert (
        answer_questions(assistant, questions[::-1], store.features_of, 6, "") == (together[::-1])
    )


def test_an_evaluation_leaves_the_model_and_the_generators_as_they_were():
    assistant, questions = runs.assistant(), asked()
    store = store_of(assistant, [question.image for question in questions])
    samples = [sample_of(assistant, question, question.answer) for question in questions]
    longest = max(len(sample.input_ids) for sample in samples)
    model, padding = assistant.model, assistant.parts.chat_format.padding_id
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        for training in (True, False):
            model.train(training)
            modes = [module.training for module in model.modules()]
            generator = torch.get_rng_state()
            found = [
                meter.evaluate(
                    model, samples, samples, store, longest, padding, torch.device("cpu")
                )
                for _ in range(2)
            ]
            assert found[0] == found[1] and found[0]["validation_loss"] > 0
            assert found[0]["alignment"].keys() == {"right", "swapped", "blank"}
            assert torch.equal(torch.get_rng_state(), generator)
            assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_validation_loss_is_a_mean_over_tokens_however_they_are_packed():
    assistant, questions = runs.assistant(), asked()[:10]
    store = store_of(assistant, [question.image for question in questions])
    samples = [sample_of(assistant, question, question.answer) for question in questions]
    longest = max(len(sample.input_ids) for sample in samples)
    losses = [
        meter.validation_loss(
            assistant.model,
            meter.packed_batches(
                samples,
                room,
                store.features_of,
                assistant.parts.chat_format.padding_id,
                assistant.parts.chat_format.image_id,
                store.shape,
                torch.device("cpu"),
            ),
        )
        for room in (longest, 4 * longest)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_conversations_without_a_picture_are_no_matter_of_alignment():
    assistant = runs.assistant()
    question = asked()[0]
    store = store_of(assistant, [question.image])
    text_only = render(
        (Message("user", (Part("text", "What?"),)), Message("assistant", (Part("text", "star"),))),
        assistant.parts.chat_format,
    )
    found = meter.evaluate(
        assistant.model,
        [text_only],
        [text_only],
        store,
        len(text_only.input_ids),
        assistant.parts.chat_format.padding_id,
        torch.device("cpu"),
    )
    assert found["alignment"] == {} and found["validation_loss"] > 0


# -- what stands in for a picture -----------------------------------------------------------------


@given(st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=30))
def test_a_swapped_picture_is_always_another_one(names):
    swapped = meter.swapped_names(names)
    assert swapped.keys() == set(names) and set(swapped.values()) == set(names)
    if len(swapped) > 1:
        assert all(name != other for name, other in swapped.items())


@given(st.lists(st.text("abcd", min_size=1, max_size=2), min_size=1, max_size=12))
def test_a_swapped_picture_is_not_a_copy_of_the_right_one(names):
    """Names that begin alike are copies of one picture."""
    swapped = meter.swapped_names(names, lambda name: name[0])
    assert swapped.keys() == set(names)
    if len({name[0] for name in names}) > 1:
        assert all(name[0] != other[0] for name, other in swapped.items())


def test_the_three_conditions_show_three_pictures():
    names = sorted({question.image for question in asked()})
    store = store_of(runs.assistant(), names)
    swapped = meter.swapped_names(names)
    for name in names:
        shown = {
            condition: meter.features_under(condition, store, swapped)(name)
            for condition in meter.CONDITIONS
        }
        assert torch.equal(shown["right"], store.features_of(name))
        assert torch.equal(shown["swapped"], store.features_of(swapped[name]))
        assert torch.equal(shown["blank"], store.by_hash(BLANK))
        for one, other in itertools.combinations(shown.values(), 2):
            assert not torch.equal(one, other)


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("yes", "yes"),
        ("Yes", "yes"),
        ("yes.", "yes"),
        (" yes \n", "Yes."),
        ("yes .", "yes"),
        ("A big red star.", "a big red star"),
        ("STRASSE", "straße"),
    ],
)
def test_case_and_a_final_full_stop_do_not_count(answer, label):
    assert normalised(answer) == normalised(label)


@pytest.mark.parametrize(
    ("answer", "label"),
    [("no", "yes"), ("yes, it is", "yes"), ("", "yes"), ("yes..", "yes"), ("a  star", "a star")],
)
def test_everything_else_counts(answer, label):
    assert normalised(answer) != normalised(label)


def question(kind: str, answer: str) -> Question:
    return Question(id="1", image="a.png", text="What?", answer=answer, kind=kind)


def test_the_score_counts_by_kind_and_leaves_out_what_is_only_reported():
    questions = [
        question("colour", "red"),
        question("colour", "blue"),
        question("shape", "star"),
        question("two_step", "red"),
        question("", "yes"),
    ]
    found = scores_by_kind(questions, ["Red.", "green", "star", "red", "no"])
    assert found == {
        "exact": 50.0,
        "questions": 4,
        "by_kind": {"colour": 50.0, "shape": 100.0, "two_step": 100.0, "question": 0.0},
        "asked_by_kind": {"colour": 2, "shape": 1, "two_step": 1, "question": 1},
    }
    assert list(found["by_kind"]) == sorted(found["by_kind"])


def test_a_score_needs_an_answer_to_every_question():
    with pytest.raises(ValueError, match="zip"):
        scores_by_kind([question("colour", "red")], [])


def test_only_reported_questions_give_no_total():
    found = scores_by_kind([question("two_step", "red")], ["red"])
    assert (found["exact"], found["questions"]) == (0.0, 0)


def test_the_table_names_every_kind_and_condition_once():
    counted = [question("shape", "star"), question("two_step", "red")]
    results = {
        "held_out": scores_by_kind(counted, ["star", "red"]),
        "blank": scores_by_kind(counted[:1], ["circle"]),
    }
    lines = score_table(results).splitlines()
    assert lines[0].split() == ["exact", "answers,", "%", "held_out", "blank"]
    rows = {line[:20].strip(): line[20:].split() for line in lines[1:]}
    assert rows["shape"] == ["100.0", "0.0"]
    assert rows["two_step *"] == ["100.0", "nan"]
    assert rows["all"] == ["100.0", "0.0"] and rows["questions"] == ["1", "1"]
    assert lines[-1] == "* reported, not part of the totals"
    names = collections.Counter(line[:20].strip() for line in lines)
    assert max(names.values()) == 1
