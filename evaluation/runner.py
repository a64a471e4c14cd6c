"""Ask a run the questions of a task, under each condition of the picture, and score the answers.

Everything is asked in the same batches whatever was answered before: an evaluation that was killed
and goes on has the same answers, and so the same figures, as one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from assistant.assistant import Assistant
from assistant.text_stream import decode
from data.chat import Limits, RenderedSample, render_to_limit
from data.dataset import Question
from data.features import FeatureStore
from data.pictures import PictureFolders
from data.prepare import prepare
from errors import PhiSightError
from evaluation.answers_file import AnswersFile, answers_file
from evaluation.forms import first
from evaluation.meter import NOISED, Rows, Shown, in_batches, packed_batch
from evaluation.noise import SIGMA, NoisedTower, noised_store
from evaluation.questions import BATCH, add_named_pictures, batch_answers, question_prompt
from evaluation.task import Answered, Asked, Task
from evaluation.tasks.loss import TOKENS
from model.vision import VisionTower

RIGHT, SWAPPED = "right", "swapped"


@dataclass(frozen=True)
class Settings:
    """How a task's questions are asked."""

    name: str
    """of the task"""
    conditions: tuple[str, ...]
    max_new_tokens: int
    instruction: str = ""
    """a sentence behind every question, such as "Answer with one word."; empty for none"""
    limit: int = 0
    """questions at most; 0 for all"""
    out: Path | None = None
    """the file of all answers"""


@dataclass(frozen=True)
class Evaluation:
    """What came of it."""

    task: Task
    header: dict[str, Any]
    """what was asked of what; see `evaluation.answers_file`"""
    answered: dict[str, list[Answered]]
    """condition -> the answers to the task's own questions, in their order"""
    further: dict[str, list[Answered]]
    """name of a further set -> its answers, with the right picture"""
    seconds: float


def store_of(assistant: Assistant, folder: str = "") -> FeatureStore:
    """The features of the run's encoder, in its own folder or another one."""
    config, vision = assistant.config, assistant.parts.vision
    return FeatureStore(folder or config.features, vision.key, vision.shape, config.feature_storage)


def evaluated(
    assistant: Assistant,
    task: Task,
    asked: Sequence[Asked],
    images: PictureFolders,
    store: FeatureStore,
    settings: Settings,
) -> Evaluation:
    """Ask everything that `settings.out` does not answer yet. Raises `PhiSightError` for a picture
    that cannot be used: a figure over a part would mislead."""
    started = time.perf_counter()
    samples = {} if task.generates else _samples(assistant, asked)
    names = [name for one in asked for name in _pictures(one, samples)]
    add_named_pictures(assistant, names, images, store)
    if SWAPPED in settings.conditions:
        own_names = [name for one in asked if not one.subset for name in _pictures(one, samples)]
        check_swappable(own_names, store)
    noised = None
    if NOISED in settings.conditions:
        noised = noised_store(store.folder.parent, assistant.parts.vision, store.storage)
        add_named_pictures(assistant, names, images, noised, NoisedTower)
    shown = Shown(store, noised)
    header = _header(assistant, asked, store, names, settings)
    done: dict[str, list[Answered]] = {}
    with answers_file(settings.out, header) as file:
        for condition in settings.conditions:
            ours = [one for one in asked if condition == RIGHT or not one.subset]
            if task.generates:
                given = _generated(assistant, task, ours, condition, shown, settings, file)
            else:
                given = _measured(assistant, ours, samples, condition, shown, file)
            by_id = {one.asked.id: one for one in given}
            done[condition] = [by_id[one.id] for one in ours]
    own = {name: [one for one in given if not one.asked.subset] for name, given in done.items()}
    further: dict[str, list[Answered]] = {}
    for one in done.get(RIGHT, ()):
        if one.asked.subset:
            further.setdefault(one.asked.subset, []).append(one)
    return Evaluation(task, header, own, further, time.perf_counter() - started)


def check_swappable(names: Sequence[str], store: FeatureStore) -> None:
    """Raise `PhiSightError` where there is no other picture: the right one would be shown for it,
    and no answer could show whether it comes from the picture."""
    if len({store.hash_of(name) for name in names}) == 1:
        raise PhiSightError(
            f"--conditions: {SWAPPED} needs two different pictures, and all questions are about"
            " one; ask more, or name other conditions"
        )


def _pictures(one: Asked, samples: dict[str, RenderedSample]) -> tuple[str, ...]:
    if one.id in samples:
        return samples[one.id].images
    return (one.image,) if one.image else ()


def _header(
    assistant: Assistant,
    asked: Sequence[Asked],
    store: FeatureStore,
    names: Sequence[str],
    settings: Settings,
) -> dict[str, Any]:
    """The first line of the file of answers."""
    questions = [[one.id, one.image, one.text, one.labels, one.kind, one.subset] for one in asked]
    pictures = [store.hash_of(name) for name in names]
    return {
        "task": settings.name,
        "run": assistant.source,
        "step": assistant.provenance.get("step"),
        "weights_digest": assistant.provenance.get("weights_digest"),
        "questions": len(asked),
        "data_sha256": _digest(questions),
        "pictures_sha256": _digest(pictures),
        "conditions": list(settings.conditions),
        **({"noise": SIGMA} if NOISED in settings.conditions else {}),
        "max_new_tokens": settings.max_new_tokens,
        "instruction": settings.instruction,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# -- answers that are generated -------------------------------------------------------------------


def _generated(
    assistant: Assistant,
    task: Task,
    asked: Sequence[Asked],
    condition: str,
    shown: Shown,
    settings: Settings,
    file: AnswersFile,
) -> list[Answered]:
    """All answers under one condition, those that are known from the file first."""
    answered = [
        Answered(one, condition, answer, task.scored(one, answer))
        for one in asked
        for answer, _ in (file.known.get((condition, one.id), (None, {})),)
        if answer is not None
    ]
    known = {one.asked.id for one in answered}
    # Alike questions together: they are of one length and their answers end at about one time.
    ordered = sorted(asked, key=lambda one: (one.subset, one.kind, one.text))
    batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    batches = [batch for batch in batches if not known.issuperset(one.id for one in batch)]
    chat_format = assistant.parts.chat_format
    prompts = (
        [question_prompt(_question(one, settings.instruction), chat_format) for one in batch]
        for batch in batches
    )
    features_of = shown.under(condition, [one.image for one in asked])
    given = batch_answers(assistant, prompts, features_of, settings.max_new_tokens)
    bar = _bar(settings.name, condition, len(asked), len(known))
    with contextlib.closing(given), bar:
        for batch, answers in zip(batches, given):
            new = [
                Answered(one, condition, answer, task.scored(one, answer))
                for one, answer in zip(batch, answers, strict=True)
                if one.id not in known
            ]
            file.add(new)
            answered += new
            bar.update(len(new))
    return answered


def _question(one: Asked, instruction: str) -> Question:
    text = with_instruction(one.text, instruction)
    return Question(one.id, one.image, text, one.labels[0], one.kind)


def with_instruction(text: str, instruction: str) -> str:
    """A question as it is asked."""
    return f"{text}\n{instruction}" if instruction else text


def _bar(name: str, condition: str, total: int, done: int) -> tqdm:
    return tqdm(
        total=total,
        initial=done,
        desc=f"{name}, {condition} picture",
        unit="question",
        leave=False,
        disable=None,
    )


# -- the loss of given answers --------------------------------------------------------------------


def _samples(assistant: Assistant, asked: Sequence[Asked]) -> dict[str, RenderedSample]:
    """Id -> a conversation as ids. Raises `PhiSightError` for one that is too long."""
    chat_format = assistant.parts.chat_format
    limits = Limits(positions=assistant.context_tokens)
    samples = {}
    for one in asked:
        if one.sample is not None:
            samples[one.id] = one.sample
            continue
        sample, dropped = render_to_limit(one.messages, chat_format, limits)
        if dropped:
            raise PhiSightError(
                f"conversation {one.id[:60]}: longer than the {limits.positions} tokens that the"
                " base reads; shorten it"
            )
        samples[one.id] = sample
    return samples


def validation_conversations(assistant: Assistant, store: FeatureStore, limit: int) -> list[Asked]:
    """What the run's training evaluates: its validation conversations, as ids."""
    parts = assistant.parts
    data = prepare(
        assistant.config,
        parts.chat_format,
        store,
        lambda: VisionTower(parts.vision, parts.device),
        positions=assistant.context_tokens,
    )
    if not data.validation:
        raise PhiSightError("--data: not given, and the run has no validation split; give --data")
    image_id, tokenizer = parts.chat_format.image_id, parts.base.tokenizer
    asked = []
    for number, sample in enumerate(first(data.validation, limit)):
        learnt = [i for i, s in zip(sample.input_ids, sample.supervised) if s]
        others = [i for i, s in zip(sample.input_ids, sample.supervised) if not s and i != image_id]
        texts = decode(tokenizer, others), decode(tokenizer, learnt)
        picture = (*sample.images, "")[0]
        asked.append(Asked(f"validation/{number}", picture, texts[0], (texts[1],), sample=sample))
    return asked


def _measured(
    assistant: Assistant,
    asked: Sequence[Asked],
    samples: dict[str, RenderedSample],
    condition: str,
    shown: Shown,
    file: AnswersFile,
) -> list[Answered]:
    """The loss of every conversation under one condition."""
    answered = [
        Answered(one, condition, "", scores)
        for one in asked
        for _, scores in (file.known.get((condition, one.id), ("", {})),)
        if scores.keys() == {"loss", TOKENS}
    ]
    known = {one.asked.id for one in answered}
    asked_of = {id(samples[one.id]): one for one in asked}
    mine = [samples[one.id] for one in asked]
    features_of = shown.under(condition, [name for sample in mine for name in sample.images])
    chat_format, device = assistant.parts.chat_format, assistant.parts.device
    with _bar("loss", condition, len(asked), len(known)) as bar:
        for rows in _rows(assistant, mine):
            if all(asked_of[id(sample)].id in known for row in rows for sample in row):
                continue
            padding, image = chat_format.padding_id, chat_format.image_id
            batch, in_order = packed_batch(
                rows, features_of, padding, image, shown.store.shape, device
            )
            new = []
            for sample, scores in zip(in_order, losses(assistant, batch, in_order), strict=True):
                if asked_of[id(sample)].id not in known:
                    new.append(Answered(asked_of[id(sample)], condition, "", scores))
            file.add(new)
            answered += new
            bar.update(len(new))
    return answered


def _rows(assistant: Assistant, samples: Sequence[RenderedSample]) -> Iterator[Rows]:
    """The samples in batches of packed rows, packed as in training's evaluations."""
    longest = max((len(sample.input_ids) for sample in samples), default=0)
    yield from in_batches(samples, max(assistant.config.row_tokens, longest))


@torch.no_grad()
def losses(
    assistant: Assistant, batch: Any, samples: Sequence[RenderedSample]
) -> list[dict[str, float]]:
    """{"loss": nats a token, "tokens": how many} of every conversation of a packed batch."""
    logits, targets = assistant.model.supervised_logits(batch)
    nats = iter(functional.cross_entropy(logits, targets, reduction="none").tolist())
    found = []
    for sample in samples:
        own = [next(nats) for supervised in sample.supervised if supervised]
        found.append({"loss": math.fsum(own) / len(own), TOKENS: float(len(own))})
    return found
