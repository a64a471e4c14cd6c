"""Questions with one right answer: asked of an assistant many at a time, and scored by kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

from assistant.answer import Answer
from assistant.assistant import Assistant
from assistant.engine import Engine
from assistant.text_stream import decode
from data.chat import ChatFormat, RenderedSample, render
from data.dataset import Message, Part, Question
from data.features import Extract, FeatureStore
from data.pictures import PictureFolders
from errors import PhiSightError
from model.vision import VisionTower

BATCH = 64
REPORTED_ONLY = ("two_step",)  # kinds outside the totals


def normalised(answer: str) -> str:
    """What is compared: without case, white space around it, and a final full stop."""
    return answer.strip().casefold().removesuffix(".").strip()


def question_messages(question: Question) -> tuple[Message, ...]:
    """The question after its picture, as a conversation that is to be answered."""
    return (Message("user", (Part("image", question.image), Part("text", question.text))),)


def question_prompt(question: Question, chat_format: ChatFormat) -> RenderedSample:
    """The same as ids, up to where the answer begins."""
    return render(question_messages(question), chat_format, add_generation_prompt=True)


def answer_questions(
    assistant: Assistant,
    questions: Sequence[Question],
    features_of: Callable[[str], Tensor],
    max_new_tokens: int,
    label: str,
) -> list[str]:
    """Greedy answers, in the order of the questions; arguments as for `answer_prompts`."""
    # Alike questions together: they are of one length and their answers end at about one time.
    order = sorted(range(len(questions)), key=lambda i: (questions[i].kind, questions[i].text))
    prompts = [question_prompt(questions[i], assistant.parts.chat_format) for i in order]
    answers = [""] * len(questions)
    for index, answer in zip(
        order, answer_prompts(assistant, prompts, features_of, max_new_tokens, label), strict=True
    ):
        answers[index] = answer
    return answers


def answer_prompts(
    assistant: Assistant,
    prompts: Sequence[RenderedSample],
    features_of: Callable[[str], Tensor],
    max_new_tokens: int,
    label: str,
) -> list[str]:
    """Greedy continuations of rendered prompts, in their order, `BATCH` at a time.

    Args: `features_of`: the name of a picture -> its (tokens, vision dim) features; `label`: what
    the progress bar says.
    """
    starts = range(0, len(prompts), BATCH)
    bar = tqdm(starts, desc=label, unit="batch", leave=False, disable=None)
    batches = (prompts[start : start + BATCH] for start in bar)
    given = batch_answers(assistant, batches, features_of, max_new_tokens)
    return [text for texts in given for text in texts]


def batch_answers(
    assistant: Assistant,
    batches: Iterable[Sequence[RenderedSample]],
    features_of: Callable[[str], Tensor],
    max_new_tokens: int,
) -> Generator[list[str]]:
    """The same, batch by batch, each when it is there. A batch has at most `BATCH` prompts."""
    # Of its own: more rows than a conversation needs, and no memory of what was asked.
    engine = Engine(
        assistant.model,
        assistant.stop_ids,
        assistant.parts.chat_format.tokens_per_image,
        max_rows=BATCH,
        queue_limit=0,
    )
    try:
        for prompts in batches:
            answers = []
            for prompt in prompts:
                features = [features_of(name) for name in prompt.images]
                stacked = torch.stack(features) if features else assistant.features([])
                answers.append(Answer(list(prompt.input_ids), max_new_tokens, stacked))
            engine.submit(*answers)
            for answer in answers:
                answer.wait()
            tokenizer = assistant.parts.base.tokenizer
            yield [decode(tokenizer, answer.tokens) for answer in answers]
    finally:
        engine.close()


def add_pictures(
    assistant: Assistant, questions: Sequence[Question], images: PictureFolders, store: FeatureStore
) -> None:
    """Put every picture that is asked about into the store. Raises `PhiSightError` for a bad one:
    a score over a part would mislead."""
    add_named_pictures(assistant, [question.image for question in questions], images, store)


def add_named_pictures(
    assistant: Assistant,
    names: Sequence[str],
    images: PictureFolders,
    store: FeatureStore,
    seen: Callable[[VisionTower], Extract] = lambda tower: tower,
) -> None:
    """The same by the names of the pictures, as `seen` makes the run's tower see them."""
    parts = assistant.parts
    bad = store.add(names, images, lambda: seen(VisionTower(parts.vision, parts.device)))
    if bad:
        first = next(iter(bad.values()))
        raise PhiSightError(
            f"{len(bad)} pictures cannot be used, first: {first}; give their folder with --images"
        )


class Scores(TypedDict):
    """How many answers to a set of questions are exactly right."""

    exact: float
    """percent of the questions whose kinds count"""
    questions: int
    """how many those are"""
    by_kind: dict[str, float]
    """percent of every kind"""
    asked_by_kind: dict[str, int]


def scores_by_kind(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Compare every answer with its label, after folding case and dropping a final full stop."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        right[question.kind or "question"].append(normalised(answer) == normalised(question.answer))
    counted = [good for kind, all_ in right.items() if kind not in REPORTED_ONLY for good in all_]
    return {
        "exact": round(100 * sum(counted) / max(1, len(counted)), 2),
        "questions": len(counted),
        "by_kind": {k: round(100 * sum(v) / len(v), 2) for k, v in sorted(right.items())},
        "asked_by_kind": {k: len(v) for k, v in sorted(right.items())},
    }


def score_table(results: dict[str, Scores]) -> str:
    """Kinds down, conditions across, percent exact."""
    kinds = sorted({kind for result in results.values() for kind in result["by_kind"]})
    kinds = [k for k in kinds if k not in REPORTED_ONLY] + [k for k in kinds if k in REPORTED_ONLY]
    lines = [f"{'exact answers, %':20}" + "".join(f"{name:>13}" for name in results)]
    for kind in kinds:
        cells = "".join(
            f"{result['by_kind'].get(kind, float('nan')):13.1f}" for result in results.values()
        )
        lines.append(f"{kind + (' *' if kind in REPORTED_ONLY else ''):20}{cells}")
    lines.append(f"{'all':20}" + "".join(f"{r['exact']:13.1f}" for r in results.values()))
    lines.append(f"{'questions':20}" + "".join(f"{r['questions']:13d}" for r in results.values()))
    if any(kind in REPORTED_ONLY for kind in kinds):
        lines.append("* reported, not part of the totals")
    return "\n".join(lines)
