"""LLaVA-Instruct JSON in, checked conversations out; splits that never share a picture.

Everything here is read from files that strangers wrote, so this border checks every type. A bad
record is set aside with its reason (quarantined) and the rest is used; a bad file is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal, TypeVar

from data.images import load_image
from data.stream import NotJson, kind_of, read_lines, read_records
from errors import PhiSightError
from files import whole_file

IMAGE_TAG = "<image>"
ROLES = {
    "human": "user", "gpt": "assistant",  # LLaVA
    "user": "user", "assistant": "assistant",  # LLaMA-Factory
    "system": "system",
}  # fmt: skip


# Why a record is set aside, for the counts of a report.
UNLIKE_PICTURES = f"pictures and {IMAGE_TAG} differ"
UNSUPERVISED = "no supervised token"
MALFORMED = "malformed"
FAULTS = (UNLIKE_PICTURES, UNSUPERVISED, MALFORMED)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of text, or one picture (its path relative to the image folder)."""

    kind: Literal["text", "image"]
    value: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of one speaker: text and pictures in their order."""

    role: Literal["user", "assistant", "system"]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant in turn, ending with the assistant."""

    id: str
    messages: tuple[Message, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """The pictures in the order in which they stand in the text, repetitions included."""
        return tuple(
            part.value for message in self.messages for part in message.parts
            if part.kind == "image"
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outline:
    """What a conversation is split by, without its text; `number` is its place among the good
    conversations of the file."""

    number: int
    id: str
    images: tuple[str, ...]


Pictured = TypeVar("Pictured", Conversation, Outline)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A record that was set aside: where it stands, its id if it has one, and why."""

    where: str
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fault:
    """A record that cannot be used: its id if it has one, why, and which of `FAULTS` that is."""

    id: str
    reason: str
    kind: str


@dataclass(frozen=True, slots=True)
class LoadedData:
    """The good conversations in file order, and the records that were set aside."""

    conversations: list[Conversation]
    quarantined: list[Quarantined]


@dataclass(frozen=True, slots=True)
class Question:
    """One evaluation question about one picture, with the answer that counts as right."""

    id: str
    image: str
    text: str
    answer: str
    kind: str = ""


# --- one record ---------------------------------------------------------------------------------


def parse_record(record: object, where: str) -> Conversation:
    """Turn one decoded JSON record into a Conversation.

    Two forms are read: LLaVA's (`image`, `conversations` of `from` and `value`) and LLaMA-Factory's
    (`images`, `messages` of `role` and `content`); one picture or a list of them in either. The
    n-th `<image>` in the text is the n-th picture. A record without an id gets one made of its
    content, so that it does not depend on the record's place in the file.

    Raises PhiSightError "<where>: <reason>; <remedy>" for anything that cannot be trained on.
    """
    try:
        return _parse_record(record)
    except _BadRecord as error:
        raise PhiSightError(f"{where}: {error}; mend or remove the record") from None


def conversation_or_fault(record: object) -> Conversation | Fault:
    """What one record of `read_records` is; see `parse_record` for the forms."""
    try:
        if isinstance(record, NotJson):
            raise _BadRecord(f"not JSON ({record.reason})")
        return _parse_record(record)
    except _BadRecord as error:
        return Fault(_id_for_report(record), str(error), error.kind)


def picture_names(record: object) -> list[str]:
    """The pictures that a record names, whatever else is wrong with it."""
    try:
        return _parse_image_names(record) if isinstance(record, dict) else []
    except _BadRecord:
        return []


class _BadRecord(Exception):
    """The reason why a record is bad, without its place; `kind` is one of `FAULTS`."""

    def __init__(self, reason: str, kind: str = MALFORMED) -> None:
        super().__init__(reason)
        self.kind = kind


def _parse_record(record: object) -> Conversation:
    if not isinstance(record, dict):
        raise _BadRecord(f"the record is {kind_of(record)}, not an object")
    images = _parse_image_names(record)
    turns = _parse_turns(record)
    _check_roles([role for role, _ in turns])
    tags = sum(text.count(IMAGE_TAG) for _, text in turns)
    if tags != len(images):
        raise _BadRecord(
            f"{len(images)} picture(s) but {tags} {IMAGE_TAG} in the text", UNLIKE_PICTURES
        )
    remaining = iter(images)
    messages = tuple(Message(role, _parse_content(role, text, remaining)) for role, text in turns)
    return Conversation(_parse_id(record, images, turns), messages)


def _parse_id(record: dict, images: list[str], turns: list[tuple[str, str]]) -> str:
    identity = record.get("id")
    if identity is None:
        content = json.dumps([images, turns])
        return "sha256-" + hashlib.sha256(content.encode()).hexdigest()[:16]
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == "":
        raise _BadRecord(f"its id is {kind_of(identity)}, not a name or a number")
    return _checked_text(str(identity), "id")


def _parse_image_names(record: dict) -> list[str]:
    if record.get("image") is not None and record.get("images") is not None:
        raise _BadRecord("it has both `image` and `images`")
    names = record.get("image")
    if names is None:
        names = record.get("images")
    if names is None:
        return []
    return [_parse_image_name(name) for name in (names if isinstance(names, list) else [names])]


def _parse_image_name(name: object) -> str:
    """A clean relative path: `a.jpg` and `./a.jpg` are one picture and must get one name."""
    if not isinstance(name, str):
        raise _BadRecord(f"a picture's name is {kind_of(name)}, not text")
    _checked_text(name, "picture's name")
    if "://" in name:
        raise _BadRecord(f"the picture {name!r} is a web address, not a file in the image folder")
    path = PurePosixPath(name)
    if "\0" in name or not path.name:
        raise _BadRecord(f"the picture's name {name!r} is not a file name")
    windows = PureWindowsPath(name)  # splits at \ and / both: one check for every system's forms
    if windows.anchor or path.is_absolute() or ".." in windows.parts:
        raise _BadRecord(f"the picture {name!r} lies outside the image folder")
    return str(path)


def _parse_turns(record: dict) -> list[tuple[str, str]]:
    """The (role, text) pairs of either form, types checked."""
    forms = [
        form for form in (("conversations", "from", "value"), ("messages", "role", "content"))
        if record.get(form[0]) is not None
    ]  # fmt: skip
    if len(forms) != 1:
        raise _BadRecord("it must have one of `conversations` and `messages`")
    list_key, role_key, text_key = forms[0]
    turns = record[list_key]
    if not isinstance(turns, list) or not turns:
        raise _BadRecord(f"`{list_key}` is {kind_of(turns)}, not a list of turns")
    pairs = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise _BadRecord(f"turn {number} is {kind_of(turn)}, not an object")
        role, text = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str):
            raise _BadRecord(f"turn {number}: `{role_key}` is {kind_of(role)}, not text")
        if role not in ROLES:
            raise _BadRecord(f"turn {number}: unknown `{role_key}` {role!r:.60}")
        if not isinstance(text, str):
            raise _BadRecord(f"turn {number}: `{text_key}` is {kind_of(text)}, not text")
        pairs.append((ROLES[role], _checked_text(text, f"text of turn {number}")))
    return pairs


def _check_roles(roles: list[str]) -> None:
    """An optional system message, then user and assistant in turn, the assistant last."""
    turns = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns:
        raise _BadRecord("it has no assistant turn, so there is nothing to learn", UNSUPERVISED)
    for number, role in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if role != expected:
            place = number + 1 + len(roles) - len(turns)
            raise _BadRecord(f"turn {place} is the {role}'s where the {expected}'s should be")
    if turns[-1] != "assistant":
        raise _BadRecord("the last question has no answer", UNSUPERVISED)


def _parse_content(role: str, text: str, images: Iterable[str]) -> tuple[Part, ...]:
    """Cut the text at each `<image>`; take the pictures from `images`, which is used up."""
    pieces = text.split(IMAGE_TAG)
    if role != "user" and len(pieces) > 1:
        raise _BadRecord(f"{IMAGE_TAG} stands in the {role}'s text, where no picture can be")
    parts = []
    for index, piece in enumerate(pieces):
        if index > 0:
            parts.append(Part("image", next(images)))
        if piece.strip():
            parts.append(Part("text", piece.strip()))
    if not parts:
        raise _BadRecord(
            f"an empty turn of the {role}", UNSUPERVISED if role == "assistant" else MALFORMED
        )
    return tuple(parts)


def _checked_text(text: str, what: str) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer and no file system takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRecord(f"the {what} is not valid Unicode") from None
    return text


# --- whole files --------------------------------------------------------------------------------


def load_conversations(path: str | Path, strict: bool = False) -> LoadedData:
    """Every good conversation of a data file at once; see `read_conversations`."""
    quarantined: list[Quarantined] = []
    return LoadedData(list(read_conversations(path, quarantined, strict)), quarantined)


def read_conversations(
    path: str | Path, quarantined: list[Quarantined], strict: bool = False
) -> Iterator[Conversation]:
    """The good conversations of a data file, one by one: a JSON list of records, or JSONL.

    Neither the text nor the conversations are held: see `data.stream`. A bad record is appended to
    `quarantined` with its reason; with `strict` it raises PhiSightError. A file that is missing,
    empty, not JSON, not a list, or without one good record raises PhiSightError.
    """
    good, bad = 0, []
    for where, record in read_records(Path(path)):
        found = conversation_or_fault(record)
        if isinstance(found, Conversation):
            good += 1
            yield found
            continue
        if strict:
            raise PhiSightError(f"{where}: {found.reason}; mend or remove the record")
        bad.append(Quarantined(where, found.id, found.reason))
        quarantined.append(bad[-1])
    if not good:
        first = [f", the first ({entry.where}): {entry.reason}" for entry in bad[:1]]
        raise PhiSightError(
            f"{path}: no usable record among {len(bad)}{''.join(first)}; "
            "give a LLaVA-Instruct JSON file"
        )


def _id_for_report(record: object) -> str:
    identity = record.get("id") if isinstance(record, dict) else None
    return str(identity)[:100] if isinstance(identity, (str, int)) else ""


def write_quarantine(path: str | Path, quarantined: Sequence[Quarantined]) -> None:
    """Write one JSON object a line; the file appears whole or not at all.

    Raises PhiSightError if the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            # ASCII escapes: an id may hold half of a surrogate pair, which UTF-8 cannot.
            file.writelines(json.dumps(asdict(entry)) + "\n" for entry in quarantined)
    except OSError as error:
        raise PhiSightError(f"{path}: cannot be written ({error.strerror}); check it") from error


def load_questions(path: str | Path) -> list[Question]:
    """Read evaluation questions, one JSON object a line, in the form of POPE (arXiv 2305.10355).

    Keys: `question_id`, `image`, `text`, `label` (becomes `answer`) and, if wanted, `kind`. A score
    over part of a benchmark is no score, so any bad line raises PhiSightError, as does a bad file.
    """
    questions, seen = [], set()
    for where, record in read_lines(Path(path)):
        try:
            question = _parse_question(record)
            if question.id in seen:
                raise _BadRecord(f"the question_id {question.id} occurs twice")
        except _BadRecord as error:
            raise PhiSightError(f"{where}: {error}; mend or remove the line") from None
        seen.add(question.id)
        questions.append(question)
    return questions


def _parse_question(record: object) -> Question:
    if isinstance(record, NotJson):
        raise _BadRecord(f"not JSON ({record.reason})")
    if not isinstance(record, dict):
        raise _BadRecord(f"the line is {kind_of(record)}, not an object")
    identity = record.get("question_id")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == "":
        raise _BadRecord(f"`question_id` is {kind_of(identity)}, not a name or a number")
    texts = {}
    for key in ("text", "label", "kind"):
        value = record.get(key, "" if key == "kind" else None)
        if not isinstance(value, str) or (key != "kind" and not value.strip()):
            raise _BadRecord(f"`{key}` is {kind_of(value)}, not text")
        texts[key] = _checked_text(value.strip(), key)
    image = _parse_image_name(record.get("image"))
    identity = _checked_text(str(identity), "question_id")
    return Question(identity, image, texts["text"], texts["label"], texts["kind"])


# --- pictures on disk ---------------------------------------------------------------------------


def check_images(
    conversations: Sequence[Conversation], folder: str | Path, decode: bool = True
) -> LoadedData:
    """Set aside the conversations of which a picture is missing from `folder` or is broken.

    Each distinct picture is looked at once. With `decode=False` only its presence is checked.
    Raises PhiSightError if `folder` is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PhiSightError(f"{folder}: no such image folder; give the folder of the pictures")

    def problem(name: str) -> str | None:
        try:
            if decode:
                load_image(folder / name)
            elif not os.path.isfile(folder / name):
                return f"{folder / name}: no such file; check the name and the image folder"
        except PhiSightError as error:
            return str(error)
        return None

    names = sorted({name for conversation in conversations for name in conversation.images})
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the decoders work outside Python's lock
        problems = {n: reason for n, reason in zip(names, pool.map(problem, names)) if reason}
    good, quarantined = [], []
    for conversation in conversations:
        bad = next((name for name in conversation.images if name in problems), None)
        if bad is None:
            good.append(conversation)
        else:
            quarantined.append(Quarantined(f"picture {bad}", conversation.id, problems[bad]))
    return LoadedData(good, quarantined)


# --- splits -------------------------------------------------------------------------------------


def split_by_image(
    conversations: Sequence[Pictured], fraction: float, seed: int
) -> tuple[list[Pictured], list[Pictured]]:
    """Split into (train, validation) so that no picture is on both sides.

    Conversations that share a picture, directly or through others, form a group; a text-only one
    belongs to the group of its id. A group goes to validation if the hash of the seed and its first
    name lies below `fraction`: the side depends neither on the file's order nor on what else is in
    the file (unless a new record ties two groups together). Each list keeps the given order.
    `fraction` 0 asks for no validation; otherwise each side gets at least one group.

    Raises PhiSightError for a fraction outside [0, 1) or if there are fewer than two groups.
    """
    if not 0 <= fraction < 1:
        raise PhiSightError(f"validation fraction {fraction}: out of range; give 0 <= it < 1")
    if fraction == 0:
        return list(conversations), []
    groups = _group_names(conversations)
    places = {name: _place_in_unit_interval("split", seed, name) for name in set(groups)}
    if len(places) < 2:
        raise PhiSightError(
            f"validation split: needs at least 2 pictures with separate conversations, found "
            f"{len(places)}; add data or set the validation fraction to 0"
        )
    # The nearest group goes over where chance left a side empty.
    threshold = max(fraction, math.nextafter(min(places.values()), 1))
    threshold = min(threshold, max(places.values()))
    train, validation = [], []
    for conversation, group in zip(conversations, groups):
        (validation if places[group] < threshold else train).append(conversation)
    return train, validation


def take_fraction(conversations: Sequence[Pictured], fraction: float, seed: int) -> list[Pictured]:
    """Keep about `fraction` of the picture groups (see `split_by_image`), at least one.

    A smaller fraction keeps a subset of what a larger one keeps. The choice is independent of the
    split's, so that taking first and splitting afterwards still gives fair shares.

    Raises PhiSightError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise PhiSightError(f"data fraction {fraction}: out of range; give 0 < it <= 1")
    groups = _group_names(conversations)
    places = {name: _place_in_unit_interval("take", seed, name) for name in set(groups)}
    threshold = max(fraction, math.nextafter(min(places.values(), default=0.0), 1))
    return [c for c, group in zip(conversations, groups) if places[group] < threshold]


def _place_in_unit_interval(purpose: str, seed: int, name: str) -> float:
    """A fixed pseudo-random number in [0, 1) for a name: 53 bits of its hash, exact in a float."""
    digest = hashlib.sha256(f"{purpose}\0{seed}\0{name}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _group_names(conversations: Sequence[Pictured]) -> list[str]:
    """For each conversation the name of its group: the alphabetically first picture in it.

    Union-find over picture names; the smaller name is always the root, so that the name of a group
    does not depend on the order of the records.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]  # halve the path: the next walk is shorter
            name = parent[name]
        return name

    firsts = []
    for conversation in conversations:
        names = [f"image\0{name}" for name in conversation.images] or [f"id\0{conversation.id}"]
        firsts.append(names[0])
        for name in names:
            low, high = sorted((root(names[0]), root(name)))
            parent[high] = low
    return [root(first) for first in firsts]
