"""Config -> rendered conversations: load, set aside what is bad, split by picture, render.

A record that cannot be used never stops a run (unless `--strict`): it goes to the quarantine file
with its reason, and the count is reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from config import Config
from data.chat import (
    ChatFormat,
    Limits,
    RenderedSample,
    all_learnt,
    first_exchange,
    render_to_limit,
    to_first_answer,
    too_many_pictures,
)
from data.dataset import ID_SHOWN, Conversation, Message, Quarantined, read_conversations
from data.features import Extract, FeatureStore
from data.packed import PackedSamples
from data.splits import Outline, split_by_image, take_fraction
from data.team import ALONE, Team
from errors import PhiSightError, printable
from paths import command, need_file

DATA_REMEDY = f"give --data FILE, or make the picture world with: {command('-m data.world')}"


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on; nothing to validate on with a `validation_fraction` of 0.
    `first_exchanges` are the validation conversations cut to their first question and answer: what
    the alignment meter asks. `first_messages` are their messages, for programs that are asked in
    words."""

    train: PackedSamples
    validation: list[RenderedSample]
    first_exchanges: list[RenderedSample]
    first_messages: list[tuple[Message, ...]]
    quarantined: list[Quarantined]
    shortened: int
    """conversations that lost their last turns to the token limit"""
    fingerprint: str
    """sha256 over every rendered id, mask and picture hash, in order: any change shows"""

    def counts(self) -> dict[str, int]:
        """How much there is, for people; it tells nothing that the fingerprint does not."""
        return {
            "training_conversations": len(self.train),
            "pictures": len({picture for names in self.train.images for picture in names}),
            "tokens": sum(self.train.lengths),
            "validation_conversations": len(self.validation),
            "alignment_questions": sum(bool(sample.images) for sample in self.first_exchanges),
            "quarantined": len(self.quarantined),
            "shortened": self.shortened,
        }


def prepare(
    config: Config,
    chat_format: ChatFormat,
    store: FeatureStore,
    extract: Callable[[], Extract],
    *,
    positions: int,
    team: Team = ALONE,
) -> TrainingData:
    """Everything between the files of `config` and the token ids that are trained on.

    A conversation that is longer than a row, or than the base's `positions`, is shortened or set
    aside. The processes of `team` share the computing of features, and do all else each.

    Raises `PhiSightError` where nothing is left to train on, and under `strict` at the first record
    that would be set aside.
    """
    path = need_file(config.data, "--data", DATA_REMEDY)
    quarantined: list[Quarantined] = []
    limits = Limits(config.max_text_tokens, config.row_tokens, positions)
    everything = _outlines(path, quarantined, config.strict, chat_format, limits)
    outlines = take_fraction(everything, config.data_fraction, config.seed)
    # Before the split, in which such a record would tie all of its pictures to one side.
    outlines, too_long = _without(outlines, "conversation", lambda outline: outline.reason)
    if any(c.images for c in outlines) and not Path(config.images).is_dir():
        raise PhiSightError(f"{config.images or '--images'}: no such folder; give --images FOLDER")
    names = sorted({name for c in outlines for name in c.images})
    bad = store.add(names, Path(config.images), extract, team=team)
    outlines, unusable = _without(
        outlines, "picture", lambda c: next((bad[name] for name in c.images if name in bad), "")
    )
    quarantined += too_long + unusable
    _stop_if_strict(config, quarantined)
    if not outlines:
        raise _nothing_left(config, "train", quarantined)
    train, validation = split_by_image(
        outlines,
        config.validation_fraction,
        config.seed,
        store.hash_of if config.split_by == "content" else None,
    )
    asked = evenly_spaced(validation, config.evaluation_conversations)
    rendered_train, rendered_validation, first_exchanges, first_messages = _render(
        config, everything, train, validation, asked, chat_format, limits
    )
    quarantined += rendered_train.quarantined + rendered_validation.quarantined
    _stop_if_strict(config, quarantined)
    if not rendered_train.samples:
        raise _nothing_left(config, "train", quarantined)
    if config.validation_fraction and not rendered_validation.samples:
        raise _nothing_left(config, "validate", quarantined)
    return TrainingData(
        train=rendered_train.samples,
        validation=evenly_spaced(rendered_validation.samples, config.evaluation_conversations),
        first_exchanges=first_exchanges,
        first_messages=first_messages,
        quarantined=quarantined,
        shortened=rendered_train.shortened + rendered_validation.shortened,
        fingerprint=_fingerprint(rendered_train.samples, rendered_validation.samples, store),
    )


class _Rendered:
    """One side of the split: its samples, and its conversations that were too long. With
    `learns_all` the samples that are kept have all of their text learnt, and not answers alone."""

    def __init__(self, chat_format: ChatFormat, learns_all: bool = False) -> None:
        self.chat_format, self.learns_all = chat_format, learns_all
        self.samples = PackedSamples(chat_format)
        self.quarantined: list[Quarantined] = []
        self.shortened = 0

    def add(self, conversation: Conversation, limits: Limits) -> RenderedSample | None:
        """Render a conversation and keep it packed; None if it was set aside as too long."""
        try:
            sample, dropped = render_to_limit(conversation.messages, self.chat_format, limits)
        except PhiSightError as error:
            shown_id = conversation.id[:ID_SHOWN]
            self.quarantined.append(Quarantined("conversation", shown_id, str(error)))
            return None
        self.shortened += dropped > 0
        self.samples.append(all_learnt(sample, self.chat_format) if self.learns_all else sample)
        return sample


def _render(
    config: Config,
    everything: Sequence[Outline],
    train: Sequence[Outline],
    validation: Sequence[Outline],
    asked: Sequence[Outline],
    chat_format: ChatFormat,
    limits: Limits,
) -> tuple[_Rendered, _Rendered, list[RenderedSample], list[tuple[Message, ...]]]:
    """Read the file again and tokenise the conversations that are used, each once.

    Returns the training side, the validation side, and the first exchanges of the conversations in
    `asked` that were not too long, as ids and as messages.
    """
    # Validation is over answers whatever is learnt: one yardstick for both ways of training.
    rendered_train = _Rendered(chat_format, learns_all=config.supervise == "all")
    rendered_validation = _Rendered(chat_format)
    side_of = dict.fromkeys((outline.number for outline in train), rendered_train)
    side_of |= dict.fromkeys((outline.number for outline in validation), rendered_validation)
    asked_numbers = {outline.number for outline in asked}
    first_exchanges, first_messages = [], []
    for number, conversation in _read_again(Path(config.data), everything):
        if number not in side_of:
            continue
        sample = side_of[number].add(conversation, limits)
        if sample is not None and number in asked_numbers:
            first_exchanges.append(first_exchange(sample, chat_format))
            first_messages.append(to_first_answer(conversation.messages))
    return rendered_train, rendered_validation, first_exchanges, first_messages


def _outlines(
    path: Path,
    quarantined: list[Quarantined],
    strict: bool,
    chat_format: ChatFormat,
    limits: Limits,
) -> list[Outline]:
    """All good conversations without their text, which is read again when it is rendered."""
    names: dict[str, str] = {}  # conversations share pictures: each name is held once
    return [
        Outline(
            number,
            conversation.id,
            tuple(names.setdefault(n, n) for n in conversation.images),
            too_many_pictures(conversation.messages, chat_format, limits),
        )
        for number, conversation in enumerate(read_conversations(path, quarantined, strict))
    ]


def _read_again(path: Path, everything: Sequence[Outline]) -> Iterator[tuple[int, Conversation]]:
    """The good conversations of a file that was read before, with their numbers.

    Raises PhiSightError if it holds others now: computing features may take days.
    """
    number = -1
    for number, conversation in enumerate(read_conversations(path, [])):
        if number >= len(everything) or (conversation.id, conversation.images) != (
            everything[number].id,
            everything[number].images,
        ):
            raise PhiSightError(f"{path}: was changed while it was in use; run again")
        yield number, conversation
    if number + 1 != len(everything):
        raise PhiSightError(f"{path}: was changed while it was in use; run again")


def _stop_if_strict(config: Config, quarantined: Sequence[Quarantined]) -> None:
    if config.strict and quarantined:
        first = quarantined[0]
        raise PhiSightError(
            f"{config.data}: record {printable(first.id) or 'without an id'}: {first.reason}"
            f" (--strict: {len(quarantined)} bad)"
        )


def _nothing_left(
    config: Config, purpose: str, quarantined: Sequence[Quarantined]
) -> PhiSightError:
    first = f", the first: {quarantined[0].reason}" if quarantined else ""
    return PhiSightError(
        f"{config.data}: nothing left to {purpose} on after setting {len(quarantined)} records"
        f" aside{first}; mend the data, or give another --validation-fraction"
    )


def evenly_spaced(items: Sequence, count: int) -> list:
    """At most `count` items, spread over the whole sequence."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _without(
    outlines: Sequence[Outline], where: str, reason_of: Callable[[Outline], str]
) -> tuple[list[Outline], list[Quarantined]]:
    """Those without a reason against them, and the others, set aside."""
    good, set_aside = [], []
    for outline in outlines:
        if reason := reason_of(outline):
            set_aside.append(Quarantined(where, outline.id[:ID_SHOWN], reason))
        else:
            good.append(outline)
    return good, set_aside


def _fingerprint(train: PackedSamples, validation: PackedSamples, store: FeatureStore) -> str:
    total = hashlib.sha256()
    for sample in chain(train, validation):
        # The features too: another machine may compute the same picture's a little differently.
        hashes = [(store.hash_of(name), store.check_of(name)) for name in sample.images]
        total.update(json.dumps([sample.input_ids, sample.supervised, hashes]).encode())
    return total.hexdigest()
