"""The questions that a run and its export are both asked: as ids, as messages, with right answers.

They are the run's held-out questions where it has some, else the first questions of its validation
conversations, spread evenly over all there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assistant.assistant import Assistant
from data.chat import RenderedSample, render
from data.dataset import Message, load_questions
from data.features import FeatureStore
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
    if config.held_out_questions:
        path = need_file(config.held_out_questions, "--held-out-questions", DATA_REMEDY)
        chosen = evenly_spaced(load_questions(path), count)
        add_pictures(assistant, chosen, Path(config.images), store)
        asked = [Asked(question_messages(q), q.answer, q.kind) for q in chosen]
    else:
        first = [
            messages
            for messages in data().first_messages
            if any(part.kind == "image" for message in messages for part in message.parts)
        ]
        asked = [
            Asked(messages[:-1], "\n".join(part.value for part in messages[-1].parts))
            for messages in evenly_spaced(first, count)
        ]
    if not asked:
        raise PhiSightError(
            f"{config.held_out_questions or config.data}: has no question about a picture to ask;"
            " give some with --held-out-questions"
        )
    prompts = [render(one.messages, chat_format, add_generation_prompt=True) for one in asked]
    facts = {
        "questions": len(asked),
        "questions_from": config.held_out_questions or "validation conversations",
    }
    return Questions(asked, prompts, store, facts)
