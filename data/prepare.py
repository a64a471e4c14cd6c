"""Config -> rendered conversations: load, set aside what is bad, split by picture, render.

A record that cannot be used never stops a run (unless `--strict`): it goes to the quarantine file
with its reason, and the count is reported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from config import Config, need_file
from data.chat import ChatFormat, RenderedSample, fit_to_limit, render
from data.dataset import (
    Conversation,
    Quarantined,
    load_conversations,
    split_by_image,
    take_fraction,
)
from data.features import Extract, FeatureStore
from errors import PhiSightError

DATA_REMEDY = "give --data FILE, or make the picture world with: python -m data.world"


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on. `first_exchanges` are the validation conversations cut to
    their first question and answer: what the alignment meter asks."""

    train: list[RenderedSample]
    validation: list[RenderedSample]
    first_exchanges: list[RenderedSample]
    quarantined: list[Quarantined]
    shortened: int
    """conversations that lost their last turns to the token limit"""
    fingerprint: str
    """sha256 over every rendered id, mask and picture hash, in order: any change shows"""


def prepare(
    config: Config, chat_format: ChatFormat, store: FeatureStore, extract: Callable[[], Extract]
) -> TrainingData:
    """Everything between the files of `config` and the token ids that are trained on.

    Raises `PhiSightError` where nothing is left to train on, and under `strict` at the first record
    that would be set aside.
    """
    loaded = load_conversations(need_file(config.data, "--data", DATA_REMEDY), config.strict)
    quarantined = list(loaded.quarantined)
    conversations = take_fraction(loaded.conversations, config.data_fraction, config.seed)
    if any(c.images for c in conversations) and not Path(config.images).is_dir():
        raise PhiSightError(f"{config.images or '--images'}: no such folder; give --images FOLDER")
    names = sorted({name for c in conversations for name in c.images})
    bad = store.add(names, Path(config.images), extract)
    conversations, unusable = _without(conversations, bad)
    quarantined += unusable
    _stop_if_strict(config, quarantined)
    if not conversations:
        raise _nothing_left(config, "train", quarantined)
    train, validation = split_by_image(conversations, config.validation_fraction, config.seed)

    rendered: list[list[RenderedSample]] = []
    shortened = 0
    for part in (train, validation):
        samples = []
        for conversation in part:
            try:
                messages, dropped = fit_to_limit(
                    conversation.messages, chat_format, config.max_text_tokens
                )
            except PhiSightError as error:
                quarantined.append(Quarantined("conversation", conversation.id, str(error)))
                continue
            shortened += dropped > 0
            samples.append(render(messages, chat_format))
        rendered.append(samples)
    _stop_if_strict(config, quarantined)
    if not all(rendered):
        raise _nothing_left(config, "validate" if rendered[0] else "train", quarantined)
    chosen = evenly_spaced(validation, config.evaluation_conversations)
    exchanges = [c for c in (_first_exchange(c) for c in chosen)
                 if _text_tokens(c, chat_format) <= config.max_text_tokens]
    return TrainingData(
        train=rendered[0],
        validation=evenly_spaced(rendered[1], config.evaluation_conversations),
        first_exchanges=[render(c.messages, chat_format) for c in exchanges],
        quarantined=quarantined,
        shortened=shortened,
        fingerprint=_fingerprint([*rendered[0], *rendered[1]], store),
    )


def _stop_if_strict(config: Config, quarantined: Sequence[Quarantined]) -> None:
    if config.strict and quarantined:
        first = quarantined[0]
        raise PhiSightError(
            f"{config.data}: record {first.id}: {first.reason} (--strict: {len(quarantined)} bad)"
        )


def _nothing_left(
    config: Config, purpose: str, quarantined: Sequence[Quarantined]
) -> PhiSightError:
    first = f", the first: {quarantined[0].reason}" if quarantined else ""
    return PhiSightError(
        f"{config.data}: nothing left to {purpose} on after setting {len(quarantined)} records"
        f" aside{first}; mend the data, or give more with another --validation-fraction"
    )


def evenly_spaced(items: Sequence, count: int) -> list:
    """At most `count` items, spread over the whole sequence."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _without(
    conversations: Sequence[Conversation], bad: dict[str, str]
) -> tuple[list[Conversation], list[Quarantined]]:
    good, set_aside = [], []
    for conversation in conversations:
        reason = next((bad[name] for name in conversation.images if name in bad), None)
        if reason is None:
            good.append(conversation)
        else:
            set_aside.append(Quarantined("picture", conversation.id, reason))
    return good, set_aside


def _first_exchange(conversation: Conversation) -> Conversation:
    end = next(i for i, m in enumerate(conversation.messages) if m.role == "assistant") + 1
    return dataclasses.replace(conversation, messages=conversation.messages[:end])


def _text_tokens(conversation: Conversation, chat_format: ChatFormat) -> int:
    sample = render(conversation.messages, chat_format)
    return len(sample.input_ids) - len(sample.images) * chat_format.tokens_per_image


def _fingerprint(samples: Sequence[RenderedSample], store: FeatureStore) -> str:
    total = hashlib.sha256()
    for sample in samples:
        # The features too: another machine may compute the same picture's a little differently.
        hashes = [(store.hash_of(name), store.check_of(name)) for name in sample.images]
        total.update(json.dumps([sample.input_ids, sample.supervised, hashes]).encode())
    return total.hexdigest()
