"""The questions that a run and its export are both asked: as ids, as messages, with right answers.

They are the run's held-out questions where it has some, else the first questions of its validation
conversations, spread evenly over all there are. Left out are those in which somebody typed a mark
of the tokenizer, such as <|end|>: we read it as words and other programs as a mark, so that an
answer would tell of the question alone, and transformers refuses the mark of a picture that is not
there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from assistant.assistant import Assistant
from data.chat import RenderedSample, render
from data.chat_tokenizer import FolderTokenizer
from data.dataset import Message, Question, load_questions
from data.features import FeatureStore
from data.pictures import PictureFolders
from data.prepare import DATA_REMEDY, TrainingData, evenly_spaced, prepare
from errors import PhiSightError
from evaluation.questions import add_pictures, question_messages
from model.vision import VisionTower
from paths import need_file


@dataclass(frozen=True)
class Asked:
    """One question with its pictures, and the answer that counts as right."""

    messages: tuple[Message, ...]
    """up to the user's turn that is to be answered"""
    answer: str
    kind: str = ""

    @property
    def text(self) -> str:
        """Of all messages."""
        parts = [part for message in self.messages for part in message.parts]
        return "\n".join(part.value for part in parts if part.kind == "text")


@dataclass(frozen=True)
class Questions:
    """What models are asked."""

    asked: list[Asked]
    prompts: list[RenderedSample]
    """`asked` as ids, up to where the answers begin"""
    store: FeatureStore
    """holds the features of every picture that is asked about"""
    facts: dict[str, Any]
    """what a certificate says about them"""


def feature_store(assistant: Assistant) -> FeatureStore:
    """The run's own store of features, read as its training read it."""
    config, vision = assistant.config, assistant.parts.vision
    return FeatureStore(config.features, vision.key, vision.shape, config.feature_storage)


def prepared(assistant: Assistant, store: FeatureStore) -> TrainingData:
    """The run's data, with the features of their pictures in `store`."""
    parts = assistant.parts
    return prepare(
        assistant.config,
        parts.chat_format,
        store,
        lambda: VisionTower(parts.vision, parts.device),
        positions=parts.base.model.config.max_position_embeddings,
    )


def questions_of(
    assistant: Assistant,
    count: int,
    store: FeatureStore,
    data: Callable[[], TrainingData],
) -> Questions:
    """At most `count` questions about pictures; `data` is called only where the run has no held-out
    questions. Raises `PhiSightError` where there is no question with a picture."""
    if count < 1:
        raise PhiSightError(f"--greedy-answers {count}: must be at least 1")
    config, chat_format = assistant.config, assistant.parts.chat_format
    held_out: list[Question] = []
    if config.held_out_questions:
        path = need_file(config.held_out_questions, "--held-out-questions", DATA_REMEDY)
        held_out = load_questions(path)
        every = [Asked(question_messages(q), q.answer, q.kind) for q in held_out]
    else:
        every = [
            Asked(messages[:-1], "\n".join(part.value for part in messages[-1].parts))
            for messages in data().first_messages
            if any(part.kind == "image" for message in messages for part in message.parts)
        ]
    marks = marks_of(assistant.parts.base.tokenizer)
    plain = [n for n, one in enumerate(every) if not any(mark in one.text for mark in marks)]
    chosen = evenly_spaced(plain, count)
    asked = [every[number] for number in chosen]
    if not asked:
        without = " without a typed mark such as <|end|>" if every else ""
        where = config.held_out_questions or " ".join(config.data)
        raise PhiSightError(
            f"{where}: has no question about a picture to ask{without}; give some with"
            " --held-out-questions"
        )
    if held_out:
        pictured = [held_out[number] for number in chosen]
        add_pictures(assistant, pictured, PictureFolders.of(config), store)
    prompts = [render(one.messages, chat_format, add_generation_prompt=True) for one in asked]
    facts = {
        "questions": len(asked),
        "questions_from": config.held_out_questions or "validation conversations",
    }
    if left_out := len(every) - len(plain):
        facts["questions_left_out_for_marks"] = left_out
    return Questions(asked, prompts, store, facts)


def marks_of(tokenizer: FolderTokenizer) -> tuple[str, ...]:
    """What other programs read as a mark wherever it stands in a text, and we as words where
    somebody typed it: special tokens, and others in angle brackets, as Phi-3 has </s>. Not words
    that a tokenizer was given: a model that was trained without them is asked with them."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return tuple(
        token.content
        for token in added
        if token.special or (token.content.startswith("<") and token.content.endswith(">"))
    )
