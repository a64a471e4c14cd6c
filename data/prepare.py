"""Config -> rendered conversations: load, set aside what is bad, split by picture, render.

A record that cannot be used never stops a run (unless `--strict`): it goes to the quarantine file
with its reason, and the count is reported.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from config import Config
from data.chat import (
    ChatFormat,
    Limits,
    RenderedSample,
    first_exchange,
    render,
    render_to_limit,
    to_first_answer,
    too_many_pictures,
)
from data.dataset import ID_SHOWN, Conversation, Message, Quarantined, conversation_or_fault
from data.features import Extract, FeatureStore
from data.packed import ChosenSamples, PackedSamples
from data.pictures import PictureFolders
from data.record_keys import BAD_PICTURE, TOO_LONG
from data.sources import Source, read_conversations, sources_of
from data.splits import Outline, split_by_image, take_fraction
from data.team import ALONE, Team
from errors import PhiSightError, printable
from paths import command

WHERE = {TOO_LONG: "conversation", BAD_PICTURE: "picture"}  # what is named where no file is
MOST_OF_AN_EPOCH = 50_000_000  # conversations: 24 bytes each, and minutes before the first step
DATA_REMEDY = f"give --data FILE, or make the picture world with: {command('-m data.world')}"


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and validates on; nothing to validate on with a `validation_fraction` of 0.
    `first_exchanges` are the validation conversations cut to their first question and answer: what
    the alignment meter asks. `first_messages` are their messages, for programs that are asked in
    words."""

    train: ChosenSamples
    validation: list[RenderedSample]
    first_exchanges: list[RenderedSample]
    first_messages: list[tuple[Message, ...]]
    quarantined: list[Quarantined]
    put_first: int
    """conversations whose pictures come before the first question, as no mark says where"""
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
            "put_first": self.put_first,
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
    found = sources_of(config, DATA_REMEDY)
    folders = PictureFolders.of(config)
    limits = Limits(config.max_text_tokens, config.row_tokens, positions)
    read = _Read(chat_format, limits)
    for number, source in enumerate(found):
        read.add(number, source, config.strict)
    quarantined = read.quarantined
    times = _times(read.outlines, found, config.seed)
    outlines = [outline for outline in read.outlines if times(outline)]
    outlines = take_fraction(outlines, config.data_fraction, config.seed)
    # Before the split, in which such a record would tie all of its pictures to one side.
    outlines, too_long = _without(
        outlines, TOO_LONG, lambda outline: outline.reason if outline.by_pictures else ""
    )
    if any(c.images for c in outlines):
        folders.check()
    names = sorted({name for c in outlines for name in c.images})
    bad = store.add(names, folders, extract, team=team)
    outlines, unusable = _without(
        outlines, BAD_PICTURE, lambda c: next((bad[name] for name in c.images if name in bad), "")
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
    return _training_data(config, read, found, store, (train, validation), times)


def _training_data(
    config: Config,
    read: _Read,
    found: Sequence[Source],
    store: FeatureStore,
    sides: tuple[Sequence[Outline], Sequence[Outline]],
    times: Callable[[Outline], int],
) -> TrainingData:
    """The two `sides` of the split, without what is too long, as they are trained and evaluated;
    `times`: how often each conversation is taken in an epoch."""
    train, validation = sides
    quarantined = read.quarantined
    asked = evenly_spaced(validation, config.evaluation_conversations)
    train, too_long = _without(train, TOO_LONG, lambda outline: outline.reason)
    validation, too_long_too = _without(validation, TOO_LONG, lambda outline: outline.reason)
    quarantined += too_long + too_long_too
    _stop_if_strict(config, quarantined)
    if not train:
        raise _nothing_left(config, "train", quarantined)
    if config.validation_fraction and not validation:
        raise _nothing_left(config, "validate", quarantined)
    if (count := sum(map(times, train))) > MOST_OF_AN_EPOCH:
        raise PhiSightError(
            f"{_names(config)}: its weights make an epoch of {count:,} conversations; give smaller"
            " numbers in the same proportion, and more --epochs"
        )
    training = ChosenSamples(
        read.samples,
        (outline.sample for outline in train for _ in range(times(outline))),
        # Validation is over answers whatever is learnt: one yardstick for both ways of training.
        learns_all=config.supervise == "all",
    )
    validating = ChosenSamples(read.samples, (outline.sample for outline in validation))
    asked = [outline for outline in asked if not outline.reason]
    chat_format = read.chat_format
    exchanges = [first_exchange(read.samples[o.sample], chat_format) for o in asked]
    return TrainingData(
        train=training,
        validation=evenly_spaced(validating, config.evaluation_conversations),
        first_exchanges=exchanges,
        first_messages=_first_messages(found, asked, exchanges, chat_format),
        quarantined=quarantined,
        put_first=sum(outline.sample in read.put_first for outline in (*train, *validation)),
        shortened=sum(outline.sample in read.shortened for outline in (*train, *validation)),
        fingerprint=_fingerprint(training, validating, store),
    )


class _Read:
    """What was read of the sources, each record once: the good conversations' outlines and, of
    those that are not too long, their ids."""

    def __init__(self, chat_format: ChatFormat, limits: Limits) -> None:
        self.chat_format, self.limits = chat_format, limits
        self.outlines: list[Outline] = []
        self.samples = PackedSamples(chat_format)
        self.shortened: set[int] = set()
        """the samples that lost their last turns to the limits"""
        self.put_first: set[int] = set()
        """the samples whose pictures come before the first question, as no mark says where"""
        self.quarantined: list[Quarantined] = []
        self._names: dict[str, str] = {}  # conversations share pictures: each name is held once

    def add(self, number: int, source: Source, strict: bool) -> None:
        """Read the `number`-th source. Raises as `read_conversations` does."""
        for record, conversation in read_conversations(source, self.quarantined, strict):
            reason, sample = self._rendered(conversation)
            names = tuple(self._names.setdefault(n, n) for n in conversation.images)
            by_pictures = sample < 0 and bool(
                too_many_pictures(conversation.messages, self.chat_format, self.limits)
            )
            self.outlines.append(
                Outline(record, number, conversation.id, names, sample, reason, by_pictures)
            )

    def _rendered(self, conversation: Conversation) -> tuple[str, int]:
        """Why a conversation is too long, or its place among the samples."""
        try:
            sample, dropped = render_to_limit(conversation.messages, self.chat_format, self.limits)
        except PhiSightError as error:
            return str(error), -1
        place = len(self.samples)
        self.samples.append(sample)
        if dropped:
            self.shortened.add(place)
        if conversation.put_first:
            self.put_first.add(place)
        return "", place


def _times(
    outlines: Sequence[Outline], found: Sequence[Source], seed: int
) -> Callable[[Outline], int]:
    """How often each conversation is taken in an epoch: as its source's weight says, and of a part
    of a whole number the share of its pictures, always the same."""
    more: set[tuple[int, int]] = set()
    for number, source in enumerate(found):
        if part := source.weight % 1:
            own = [outline for outline in outlines if outline.source == number]
            taken = take_fraction(own, part, seed, "weight")
            more |= {(outline.source, outline.record) for outline in taken}
    return lambda o: int(found[o.source].weight) + ((o.source, o.record) in more)


def _first_messages(
    found: Sequence[Source],
    asked: Sequence[Outline],
    exchanges: Sequence[RenderedSample],
    chat_format: ChatFormat,
) -> list[tuple[Message, ...]]:
    """The messages of the conversations that are `asked` up to the first answer that is learnt,
    read again, as the text of none is held.

    Raises PhiSightError where they are not those of the `exchanges` any more: computing features
    may take days.
    """
    wanted = {(o.source, o.record): exchange for o, exchange in zip(asked, exchanges, strict=True)}
    messages: dict[tuple[int, int], tuple[Message, ...]] = {}
    for number, source in enumerate(found):
        last = max((record for origin, record in wanted if origin == number), default=-1)
        for record, (_, content) in enumerate(islice(source.records(), last + 1)):
            if exchange := wanted.get((number, record)):
                again = conversation_or_fault(content, source.pictures)
                first = to_first_answer(again.messages) if isinstance(again, Conversation) else ()
                if render(first, chat_format) == exchange:
                    messages[number, record] = first
    if len(messages) < len(wanted):
        lost = next(found[origin] for origin, record in wanted if (origin, record) not in messages)
        raise PhiSightError(f"{lost.path}: was changed while it was in use; run again")
    return [messages[outline.source, outline.record] for outline in asked]


def _stop_if_strict(config: Config, quarantined: Sequence[Quarantined]) -> None:
    if config.strict and quarantined:
        first = quarantined[0]
        raise PhiSightError(
            f"{_names(config)}: record {printable(first.id) or 'without an id'}: {first.reason}"
            f" (--strict: {len(quarantined)} bad)"
        )


def _nothing_left(
    config: Config, purpose: str, quarantined: Sequence[Quarantined]
) -> PhiSightError:
    first = f", the first: {quarantined[0].reason}" if quarantined else ""
    remedy = "mend the data, or give another --validation-fraction"
    # A preset has a picture folder of its own, which is easily left in place beside other data.
    if os.strerror(errno.ENOENT) in first:
        remedy = "give the folder that the pictures' names are relative to with --images"
    return PhiSightError(
        f"{_names(config)}: nothing left to {purpose} on after setting {len(quarantined)} records"
        f" aside{first}; {remedy}"
    )


def _names(config: Config) -> str:
    return " ".join(config.data)


def evenly_spaced(items: Sequence, count: int) -> list:
    """At most `count` items, spread over the whole sequence."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _without(
    outlines: Sequence[Outline], kind: str, reason_of: Callable[[Outline], str]
) -> tuple[list[Outline], list[Quarantined]]:
    """Those without a reason against them, and the others, set aside."""
    good, set_aside = [], []
    for outline in outlines:
        if reason := reason_of(outline):
            set_aside.append(Quarantined(WHERE[kind], outline.id[:ID_SHOWN], reason, kind))
        else:
            good.append(outline)
    return good, set_aside


def _fingerprint(train: ChosenSamples, validation: ChosenSamples, store: FeatureStore) -> str:
    total = hashlib.sha256()
    for ids, supervised, images in chain(train.written(), validation.written()):
        # The features too: another machine may compute the same picture's a little differently.
        hashes = [(store.hash_of(name), store.check_of(name)) for name in images]
        total.update(f"[{ids}, {supervised}, {json.dumps(hashes)}]".encode())
    return total.hexdigest()
