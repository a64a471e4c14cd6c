"""Sample answers of a model in training: what it would say, with nothing of the training moved."""

from __future__ import annotations

import pytest
import runs
import torch

from assistant.text_stream import decode
from data.chat import RenderedSample
from data.collate import collate
from data.dataset import Message, Part
from errors import printable
from evaluation.samples import LONGEST, MOST_TOKENS, sample_answers, sample_questions
from reports.log import read_metrics
from training.rng import rng_state


def questions_of(prepared, count=3):
    return sample_questions(prepared.first_exchanges, prepared.first_messages, count)


def stop_ids_of(parts):
    return parts.chat_format.stop_ids


def spoken(parts, store, question) -> list[int]:
    """The reference: every token by a pass over all before it, without keys and values."""
    ids: list[int] = list(question.prompt)
    parts.model.eval()
    while len(ids) < len(question.prompt) + MOST_TOKENS:
        sample = RenderedSample([*ids, 0], [*[False] * len(ids), True], question.pictures)
        format = parts.chat_format
        batch = collate(
            [[sample]],
            store.features_of,
            format.padding_id,
            format.image_id,
            store.shape,
        )
        with torch.no_grad():
            logits, _ = parts.model.supervised_logits(batch)
        logits[:, parts.model.placeholder_id] = -torch.inf
        token = int(logits[-1].argmax())
        if token in stop_ids_of(parts):
            break
        ids.append(token)
    return ids[len(question.prompt) :]


@pytest.mark.parametrize("trains", [True, False])
def test_answers_are_the_likeliest_and_the_training_is_as_it_was(
    trains, parts, prepared, store, model, monkeypatch
):
    # As in training: other tests may have answered with this model.
    monkeypatch.setattr(model.language_model, "compiled", None)
    monkeypatch.setattr(model.language_model.model, "cache_dtype", None)
    questions = questions_of(prepared)
    tokenizer = parts.base.tokenizer
    model.train(trains)
    before = rng_state()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    answers = sample_answers(model, tokenizer, questions, store, stop_ids_of(parts))
    assert model.training is trains and all(m.training is trains for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in rng_state().items())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert model.language_model.compiled is None and model.language_model.model.cache_dtype is None
    assert all(p.grad is None for p in model.parameters())

    assert len(answers) == len(questions) == 3
    for answer, question in zip(answers, questions):
        said = printable(decode(tokenizer, spoken(parts, store, question)), LONGEST)
        assert answer["answer"] == said
        assert answer["picture"] == question.pictures[0] and answer["right_answer"]


def test_questions_are_the_first_with_a_picture_in_words(prepared):
    with_picture = [s for s in prepared.first_exchanges if s.images]
    questions = questions_of(prepared, 100)
    assert [q.pictures for q in questions] == [s.images for s in with_picture]
    assert questions_of(prepared, 2) == questions[:2] and questions_of(prepared, 0) == []
    for question, sample in zip(questions, with_picture):
        assert sample.input_ids[: len(question.prompt)] == question.prompt
        assert sample.supervised[len(question.prompt)] and question.question

    text_only = RenderedSample([1, 2, 3], [False, True, False], ())
    said = (Message("user", (Part("text", "?"),)), Message("assistant", (Part("text", "!"),)))
    assert sample_questions([text_only], [said], 4) == []


def test_every_evaluation_of_a_run_writes_them():
    records = read_metrics(runs.finished_run() / "metrics.jsonl")
    asked = [r["step"] for r in records if r["kind"] == "evaluation"]
    written = [r for r in records if r["kind"] == "samples"]
    assert [r["step"] for r in written] == asked and len(asked) > 1
    asked_of = [
        [(s["question"], s["picture"], s["right_answer"]) for s in record["samples"]]
        for record in written
    ]
    assert asked_of[0] and all(each == asked_of[0] for each in asked_of)
    assert all({*record["timing"]} == {"seconds"} for record in written)


def test_a_run_without_them_and_with_them_has_the_same_weights(tmp_path):
    fields = runs.SHORT | {"evaluate_steps": 1, "max_steps": 3}
    for count in (0, 4):
        runs.start(tmp_path / str(count), **fields, evaluation_samples=count)
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("0", "4")]
    assert [r["kind"] for r in logs[0]].count("samples") == 0
    kept = [[r for r in log if r["kind"] != "samples"] for log in logs]
    for name in ("validation_loss", "weights_digest", "loss", "steps_digest"):
        assert [r.get(name) for r in kept[0]] == [r.get(name) for r in kept[1]]
