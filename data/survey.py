"""What is in data files of any size: counted by several processes, in memory that stays small.

The first process cuts the files into records; the others check pictures, parse and tokenise. What
grows with the file is 24 bytes a record and the names of the pictures, in the first process only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy

from data.chat import ChatFormat, Limits
from data.dataset import (
    ID_SHOWN,
    Conversation,
    Quarantined,
    conversation_or_fault,
    form_name,
    picture_names,
    unread_keys,
)
from data.images import END_BYTES, size_if_whole
from data.lengths import TokenCounter, fit
from data.pictures import PictureFolders, Pictures
from data.reading import check_image_file
from data.record_keys import BAD_PICTURE, TOO_LONG
from data.sources import Source
from errors import PhiSightError
from system import memory
from workers.fitting import share_cut_off

BATCH = 128  # records, or pictures, that a process is given at a time
DECODED_AT_MOST = 5000  # pictures that "auto" decodes; more would take minutes
AHEAD = 3  # batches a process that are under way: enough to keep it busy, few enough to hold
PICTURE_CHECKS = ("decode", "quick", "exists")
KEYS_COUNTED = 1000  # names of unread keys; a file may have a new one in every record
OTHER_KEYS = "(other keys)"
SMALL_FILE = 1_000_000  # bytes; below it, starting processes takes longer than the work


@dataclass
class Tally:
    """Counts over some records; two can be added. Token counts leave out what was set aside, but
    for what is too long."""

    records: int = 0
    conversations: int = 0
    """records that could be parsed; those that are `lost` to a bad picture among them"""
    turns: int = 0
    """answers"""
    text_only: int = 0
    several_pictures: int = 0
    put_first: int = 0
    """conversations whose pictures come before the first question, as no mark says where"""
    lost: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    """form of `data.forms` -> records"""
    faults: Counter[str] = field(default_factory=Counter)
    """kind of fault -> records"""
    lengths: Counter[int] = field(default_factory=Counter)
    """tokens, picture tokens included -> conversations"""
    text_lengths: Counter[int] = field(default_factory=Counter)
    """tokens, picture tokens not counted -> conversations"""
    supervised_tokens: int = 0
    unsupervised: int = 0
    """conversations that parse and yet have no supervised token"""
    shortened: int = 0
    """conversations that lose their last turns to the limits"""
    too_long: int = 0
    """conversations of which no turn fits"""
    unread: Counter[str] = field(default_factory=Counter)
    """keys that nothing reads -> how often they stand in the file"""
    ids: array = field(default_factory=lambda: array("Q"))
    """64 bits of each conversation's id"""
    contents: array = field(default_factory=lambda: array("Q"))
    pictures: array = field(default_factory=lambda: array("Q"))
    set_aside: list[Quarantined] = field(default_factory=list)
    peak_memory: int = 0
    """bytes, the largest of the processes that counted"""

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            if name == "peak_memory":
                self.peak_memory = max(self.peak_memory, value)
            elif isinstance(value, Counter):
                getattr(self, name).update(value)
            elif isinstance(value, (array, list)):
                getattr(self, name).extend(value)
            else:
                setattr(self, name, getattr(self, name) + value)
        self.bound_unread(KEYS_COUNTED)

    def bound_unread(self, names: int) -> None:
        """Keep so many names of keys, the most frequent; the others become one count."""
        if len(self.unread) > names:
            rest = self.unread.most_common()[names - 1 :]
            self.unread -= Counter(dict(rest))
            self.unread[OTHER_KEYS] += sum(count for _, count in rest)

    def distinct(self, name: str) -> int:
        """How many different values `ids`, `contents` or `pictures` has."""
        return len(numpy.unique(numpy.frombuffer(getattr(self, name), dtype=numpy.uint64)))


@dataclass
class Survey:
    """All sources: the counts, and the pictures that cannot be used by name."""

    tally: Tally
    by_source: list[Tally]
    """the counts of each source alone"""
    bad_pictures: dict[str, str]
    missing: int
    """how many of `bad_pictures` are not there at all"""
    picture_check: str
    """one of `PICTURE_CHECKS`, or empty where pictures were not looked at"""
    workers: int
    copies: int = 0
    """pictures that have the bytes of another one of another name"""
    cut_off: list[float] = field(default_factory=list)
    """of each picture looked into that is not square, the share of it that cropping loses"""


def survey(
    found: Sequence[Source],
    folders: PictureFolders | None,
    chat_format: ChatFormat,
    picture_check: str = "auto",
    workers: int = 0,
    limits: Limits = Limits(),
) -> Survey:
    """Count what is in data sources, their pictures being in `folders` (None: not looked at).

    What is longer than `limits` is counted, and set aside, as training does it.
    `picture_check`: one of `PICTURE_CHECKS`, or "auto" for "decode" while the pictures are few.
    `workers` processes share the work; 0 for this one alone. Raises PhiSightError if one of
    `folders` is not there, for a file that `read_records` refuses, and if a process is killed.
    """
    if folders is not None:
        folders.check()
    bad: dict[str, str] = {}
    missing, copies = 0, 0
    cut_off: list[float] = []
    if picture_check == "auto" and folders is not None:
        few = sum(1 for _ in islice(distinct_names(found), DECODED_AT_MOST + 1)) <= DECODED_AT_MOST
        picture_check = "decode" if few else "quick"
    with Workers(workers, chat_format) as pool:
        if folders is not None:
            first: dict[int, str] = {}  # mark -> the first picture of it
            alike: dict[int, list[str]] = {}
            for unusable, absent, marks, shares in pool.map(
                check_pictures,
                ((names, folders, picture_check) for names in batches(distinct_names(found))),
            ):
                bad |= unusable
                missing += absent
                cut_off += shares
                for name, mark in marks.items():
                    if first.setdefault(mark, name) is not name:
                        alike.setdefault(mark, [first[mark]]).append(name)
            copies = sum(pool.map(count_copies, ((names, folders) for names in alike.values())))
        total, by_source = Tally(), []
        for source in found:
            own = Tally()
            for tally in pool.map(
                tally_records,
                (
                    (batch, source.pictures, reasons_for(batch, source.pictures, bad), limits)
                    for batch in batches(source.records())
                ),
            ):
                own.add(tally)
            if not own.records:
                raise PhiSightError(
                    f"{source.path}: holds no record; give conversations in one of the forms of"
                    " docs/data.md"
                )
            by_source.append(own)
            total.add(own)
    checked = "" if folders is None else picture_check
    return Survey(total, by_source, bad, missing, checked, workers, copies, cut_off)


def distinct_names(found: Iterable[Source]) -> Iterator[str]:
    """Every picture that a record names, once."""
    seen: set[str] = set()
    for source in found:
        for _, record in source.records():
            for name in picture_names(record, source.pictures):
                if name not in seen:
                    seen.add(name)
                    yield name


def batches(items: Iterable) -> Iterator[list]:
    remaining = iter(items)
    while batch := list(islice(remaining, BATCH)):
        yield batch


def reasons_for(
    batch: Sequence[tuple[str, object]], pictures: Pictures, bad: dict[str, str]
) -> dict[str, str]:
    """The part of `bad` that concerns these records."""
    if not bad:
        return {}
    names = (name for _, record in batch for name in picture_names(record, pictures))
    return {name: bad[name] for name in names if name in bad}


# -- what the processes do ------------------------------------------------------------------------


def check_pictures(
    counter: TokenCounter, names: Sequence[str], folders: PictureFolders, picture_check: str
) -> tuple[dict[str, str], int, dict[str, int], list[float]]:
    """name -> reason for the pictures that cannot be used, how many of them are missing, name ->
    mark for those that were looked into (files of different marks are different), and what
    cropping loses of those that are not square."""
    bad, missing, marks = {}, 0, {}
    cut_off: list[float] = []
    for name in names:
        path = folders.path_of(name)
        try:
            if picture_check == "exists":
                if not os.path.isfile(path):  # Path.is_file raises where a name is too long
                    raise PhiSightError(
                        f"{path}: no such file; check the name and the image folder"
                    )
                continue
            size = size_if_whole(path) if picture_check == "quick" else None
            width, height = size or check_image_file(path)
            if width != height:
                cut_off.append(share_cut_off(width, height))
            marks[name] = _mark(path)
        except PhiSightError as error:
            bad[name] = str(error)
            missing += not os.path.lexists(path)
    return bad, missing, marks, cut_off


def _mark(path: Path) -> int:
    """64 bits of a file's size and its last bytes, which compressed pictures hardly ever share."""
    with contextlib.suppress(OSError), open(path, "rb") as file:  # gone since: training finds it
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - END_BYTES))
        return _hash64(f"{size}/{hashlib.sha256(file.read(END_BYTES)).hexdigest()}")
    return _hash64(str(path))


def count_copies(counter: TokenCounter, names: Sequence[str], folders: PictureFolders) -> int:
    """How many of these files have the very bytes of one before them."""
    seen, copies = set(), 0
    for name in names:
        with contextlib.suppress(OSError), open(folders.path_of(name), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            copies += digest in seen
            seen.add(digest)
    return copies


def tally_records(
    counter: TokenCounter,
    records: Sequence[tuple[str, object]],
    pictures: Pictures,
    bad: dict[str, str],
    limits: Limits,
) -> Tally:
    """Count `records` (place, decoded record); a conversation with a picture in `bad` is lost."""
    tally = Tally(records=len(records))
    for where, record in records:
        tally.unread.update(key[:ID_SHOWN] for key in unread_keys(record))
        tally.bound_unread(100 * KEYS_COUNTED)  # a single record may have a million
        tally.forms[form_name(record)] += 1
        result = conversation_or_fault(record, pictures)
        if isinstance(result, Conversation):
            _count(tally, where, result, bad, counter, limits)
        else:
            tally.faults[result.kind] += 1
            tally.set_aside.append(Quarantined(where, result.id, result.reason, result.kind))
    tally.peak_memory = memory.peak()
    return tally


def _count(
    tally: Tally,
    where: str,
    conversation: Conversation,
    bad: dict[str, str],
    counter: TokenCounter,
    limits: Limits,
) -> None:
    images, shown_id = conversation.images, conversation.id[:ID_SHOWN]
    tally.conversations += 1
    tally.turns += sum(message.role == "assistant" for message in conversation.messages)
    tally.text_only += not images
    tally.several_pictures += len(images) > 1
    tally.put_first += conversation.put_first
    tally.ids.append(_hash64(conversation.id))
    tally.contents.append(
        _hash64(
            "\0".join(
                f"{message.role}\0{message.learnt}\0{part.kind}\0{part.value}"
                for message in conversation.messages
                for part in message.parts
            )
        )
    )
    tally.pictures.extend(map(_hash64, images))
    broken = next((name for name in images if name in bad), None)
    if broken is not None:
        tally.lost += 1
        tally.set_aside.append(Quarantined(f"picture {broken}", shown_id, bad[broken], BAD_PICTURE))
        return
    running = counter.running(conversation.messages)
    length = running[-1]
    tally.lengths[length.tokens] += 1
    tally.text_lengths[length.text_tokens] += 1
    tally.supervised_tokens += length.supervised
    tally.unsupervised += not length.supervised
    dropped, reason = fit(conversation.messages, running, limits)
    if reason:
        tally.too_long += 1
        tally.set_aside.append(Quarantined(where, shown_id, reason, TOO_LONG))
    else:
        tally.shortened += dropped > 0


def _hash64(text: str) -> int:
    """Two of a million different texts share it with a probability of 3 in 100 million."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


# -- the processes --------------------------------------------------------------------------------

_counter: list[TokenCounter] = []  # of a worker process: made once, not for every batch


def _begin(chat_format: ChatFormat) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is the unit here
    _counter[:] = [TokenCounter(chat_format)]


def _call(work: Callable, arguments: tuple) -> object:
    return work(_counter[0], *arguments)


class Workers:
    """Processes that `map` a function over batches in order; with `count` 0, this process does."""

    def __init__(self, count: int, chat_format: ChatFormat) -> None:
        self.count, self.chat_format = count, chat_format
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.count:
            # Not forked: torch and the tokenizer may have threads, of which a fork keeps the locks.
            self._pool = ProcessPoolExecutor(
                self.count, get_context("spawn"), _begin, (self.chat_format,)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, work: Callable, batches: Iterable[tuple]) -> Iterator:
        """`work(counter, *batch)` for every batch, in order; few batches are held at a time."""
        if self._pool is None:
            counter = TokenCounter(self.chat_format)
            yield from (work(counter, *batch) for batch in batches)
            return
        waiting: deque[Future] = deque()
        try:
            for batch in batches:
                waiting.append(self._pool.submit(_call, work, batch))
                if len(waiting) >= AHEAD * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise PhiSightError(
                "a worker process was ended from outside, perhaps for want of memory; run again"
                " with fewer --workers"
            ) from None
