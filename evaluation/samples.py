"""Answers to a few questions, always the same, of a model that is being trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assistant.decoding import Decoding
from assistant.text_stream import Decoder, decode
from data.chat import RenderedSample
from data.dataset import Message
from data.features import FeatureStore
from errors import printable
from model.vlm import VisionLanguageModel

MOST_TOKENS = 48  # of an answer: enough to see where it goes
LONGEST = 500  # characters of a text in the log


@dataclass(frozen=True)
class SampleQuestion:
    """A validation conversation up to its first answer."""

    prompt: list[int]
    pictures: tuple[str, ...]
    question: str
    right_answer: str


@dataclass(eq=False)
class _Row:
    """A sequence being decoded, see `assistant.decoding.Row`."""

    ids: list[int]
    image_features: Tensor
    most: int
    """tokens that it may come to"""


def sample_questions(
    exchanges: Sequence[RenderedSample], messages: Sequence[Sequence[Message]], count: int
) -> list[SampleQuestion]:
    """The first `count` of the `exchanges` that have a picture; `messages` are theirs in words."""
    chosen = [pair for pair in zip(exchanges, messages, strict=True) if pair[0].images][:count]
    return [
        SampleQuestion(
            sample.input_ids[: sample.supervised.index(True)],
            sample.images,
            " ".join(_text(message) for message in said if message.role == "user"),
            _text(said[-1]),
        )
        for sample, said in chosen
    ]


def _text(message: Message) -> str:
    return " ".join(part.value.strip() for part in message.parts if part.kind == "text").strip()


@torch.no_grad()
def sample_answers(
    model: VisionLanguageModel,
    tokenizer: Decoder,
    questions: Sequence[SampleQuestion],
    store: FeatureStore,
    stop_ids: Collection[int],
) -> list[dict[str, str]]:
    """{"question", "picture", "answer", "right_answer"} of each, the answers greedy and of at most
    `MOST_TOKENS`. The model is put back into the mode it was in, keeps no key and no value, and no
    random number is drawn."""
    positions = model.language_model.config.max_position_embeddings
    was_training = model.training
    model.eval()
    # Not by compiled code: its making would take longer than these answers, once an evaluation.
    decoding: Decoding[_Row] = Decoding(model, compiles=False)
    rows = [
        _Row(
            list(q.prompt),
            torch.stack([store.features_of(name) for name in q.pictures]),
            min(len(q.prompt) + MOST_TOKENS, positions),
        )
        for q in questions
    ]
    decoding.add(rows)
    while decoding.rows:
        tokens = decoding.logits.argmax(-1).tolist()
        going_on = [
            index
            for index, (row, token) in enumerate(zip(decoding.rows, tokens, strict=True))
            if token not in stop_ids and len(row.ids) < row.most
        ]
        decoding.keep(going_on)
        if going_on:
            decoding.advance([tokens[index] for index in going_on])
        decoding.read_all()  # those that crossed to LongRoPE's long factors
    model.train(was_training)
    return [
        {
            "question": printable(question.question, LONGEST),
            "picture": printable(", ".join(question.pictures), LONGEST),
            "answer": printable(decode(tokenizer, row.ids[len(question.prompt) :]), LONGEST),
            "right_answer": printable(question.right_answer, LONGEST),
        }
        for question, row in zip(questions, rows, strict=True)
    ]
