"""A question and its answer under two keys, with what was said before under a third."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.form import Form, Turns, exchange, has, history
from data.record_keys import BadRecord
from data.stream import kind_of


def _pair(question: str, answer: str, example: str, *more: str) -> Form:
    return Form(
        f"{question}, {answer}",
        frozenset({question, answer, *more}),
        lambda record: has(record, question, answer),
        lambda record: Turns(
            [
                *(history(record) if "history" in more else ()),
                *exchange(record[question], record[answer]),
            ]
        ),
        example,
    )


def _alpaca(record: Mapping[str, Any]) -> Turns:
    """`input` is what the instruction is about, and stands below it."""
    question, about = record["instruction"], record.get("input")
    if about is not None and not isinstance(about, str):
        raise BadRecord(f"`input` is {kind_of(about)}, not text")
    if about and about.strip():
        if not isinstance(question, str):
            raise BadRecord(f"`instruction` is {kind_of(question)}, not text")
        question = f"{question.strip()}\n{about.strip()}"
    return Turns([*history(record), *exchange(question, record["output"])])


QUERY = _pair(
    "query",
    "response",
    '{"query": "<image>What is it?", "response": "A cat.", "images": ["a.jpg"], "history": []}',
    "history",
)
PROMPT = _pair(
    "prompt",
    "completion",
    '{"image": "a.jpg", "prompt": "What is it?", "completion": "A cat."}',
)
QUESTION = _pair(
    "question",
    "answer",
    '{"image": "a.jpg", "question": "What is it?", "answer": "A cat."}',
)
ALPACA = Form(
    "instruction, output",
    frozenset({"instruction", "input", "output", "history"}),
    lambda record: has(record, "instruction", "output"),
    _alpaca,
    '{"image": "a.jpg", "instruction": "Name the animal.", "input": "", "output": "A cat."}',
)
