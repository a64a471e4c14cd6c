"""Questions with one right answer: asked of an assistant many at a time, and scored by kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, stack
from tqdm import tqdm

from assistant.assistant import Assistant
from assistant.sampling import generate
from data.chat import ChatFormat, RenderedSample, render
from data.dataset import Message, Part, Question
from data.features import FeatureStore
from errors import PhiSightError
from evaluation.meter import CONDITIONS, features_under, swapped_names
from model.vision import VisionTower

BATCH = 64
REPORTED_ONLY = ("two_step",)  # kinds outside the totals


def normalise(answer: str) -> str:
    return answer.strip().casefold().removesuffix(".").strip()


def question_prompt(question: Question, chat_format: ChatFormat) -> RenderedSample:
    """The question after its picture, up to where the answer begins."""
    message = Message("user", (Part("image", question.image), Part("text", question.text)))
    return render([message], chat_format, add_generation_prompt=True)


def answer_all(
    assistant: Assistant,
    questions: Sequence[Question],
    features_of: Callable[[str], Tensor],
    max_new_tokens: int,
    label: str,
) -> list[str]:
    """Greedy answers, in the order of the questions, many at a time."""
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
    """Greedy continuations of rendered prompts, in their order, many at a time."""
    tokenizer, answers = assistant.parts.base.tokenizer, []
    for start in tqdm(
        range(0, len(prompts), BATCH), desc=label, unit="batch", leave=False, disable=None
    ):
        chosen = prompts[start : start + BATCH]
        features = [features_of(name) for prompt in chosen for name in prompt.images]
        stacked = stack(features) if features else assistant.features([])
        ids: list[list[int]] = [[] for _ in chosen]
        for tokens in generate(
            assistant.model,
            [prompt.input_ids for prompt in chosen],
            stacked,
            assistant.stop_ids,
            max_new_tokens,
        ):
            for row, token in enumerate(tokens):
                if token is not None:
                    ids[row].append(token)
        answers += [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    return answers


def add_pictures(
    assistant: Assistant, questions: Sequence[Question], images: Path, store: FeatureStore
) -> None:
    """Put every picture that is asked about into the store. Raises `PhiSightError` for a bad one:
    a score over part of the questions is no score."""
    bad = store.add(
        [question.image for question in questions],
        images,
        lambda: VisionTower(assistant.parts.vision, assistant.parts.device),
    )
    if bad:
        first = next(iter(bad.values()))
        raise PhiSightError(f"{len(bad)} pictures cannot be used, first: {first}")


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, object]:
    """{"exact": percent over the kinds that count, "questions": how many, "by_kind": percents}."""
    right: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        right[question.kind or "question"].append(normalise(answer) == normalise(question.answer))
    counted = [good for kind, all_ in right.items() if kind not in REPORTED_ONLY for good in all_]
    return {
        "exact": round(100 * sum(counted) / max(1, len(counted)), 2),
        "questions": len(counted),
        "by_kind": {k: round(100 * sum(v) / len(v), 2) for k, v in sorted(right.items())},
        "asked_by_kind": {k: len(v) for k, v in sorted(right.items())},
    }


def evaluate(
    assistant: Assistant,
    sets: dict[str, list[Question]],
    images: Path,
    store: FeatureStore,
    max_new_tokens: int,
) -> dict[str, dict[str, object]]:
    """Scores by name: the first set under all three conditions, the others with the right one."""
    add_pictures(
        assistant,
        [question for questions in sets.values() for question in questions],
        images,
        store,
    )
    results = {}
    for number, (name, questions) in enumerate(sets.items()):
        swapped = swapped_names([question.image for question in questions])
        for condition in CONDITIONS if number == 0 else CONDITIONS[:1]:
            answers = answer_all(
                assistant,
                questions,
                features_under(condition, store, swapped),
                max_new_tokens,
                f"{name}, {condition} picture",
            )
            results[name if condition == "right" else condition] = score(questions, answers)
    return results


def table(results: dict[str, dict[str, object]]) -> str:
    """Kinds down, conditions across, percent exact."""
    kinds = sorted({kind for result in results.values() for kind in result["by_kind"]})
    kinds = [k for k in kinds if k not in REPORTED_ONLY] + [k for k in kinds if k in REPORTED_ONLY]
    lines = [f"{'exact answers, %':20}" + "".join(f"{name:>13}" for name in results)]
    for kind in kinds:
        cells = "".join(
            f"{result['by_kind'].get(kind, float('nan')):13.1f}" for result in results.values()
        )
        lines.append(f"{kind + (' *' if kind in REPORTED_ONLY else ''):20}{cells}")
    for label, key, form in (("all", "exact", "13.1f"), ("questions", "questions", "13d")):
        lines.append(f"{label:20}" + "".join(f"{r[key]:{form}}" for r in results.values()))
    if any(kind in REPORTED_ONLY for kind in kinds):
        lines.append("* reported, not part of the totals")
    return "\n".join(lines)
