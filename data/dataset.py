"""LLaVA-Instruct JSON in, checked conversations out.

Everything here is read from untrusted files, so this border checks every type. A bad record
is set aside with its reason (quarantined) and the rest is used; a bad file is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

from data.stream import NotJson, kind_of, read_lines, read_records
from errors import PhiSightError
from files import whole_file

IMAGE_TAG = "<image>"
Role = Literal["user", "assistant", "system"]
ROLES: dict[str, Role] = {
    # LLaVA
    "human": "user",
    "gpt": "assistant",
    # LLaMA-Factory
    "user": "user",
    "assistant": "assistant",
    # both
    "system": "system",
}

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

    role: Role
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
            part.value
            for message in self.messages
            for part in message.parts
            if part.kind == "image"
        )


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
class Question:
    """One evaluation question about one picture, with the answer that counts as right."""

    id: str
    image: str
    text: str
    answer: str
    kind: str = ""


# --- one record ---------------------------------------------------------------------------------


def conversation_or_fault(record: object) -> Conversation | Fault:
    """Turn one record of `read_records` into a `Conversation`, or say why that cannot be.

    Two forms are read: LLaVA's (`image`, `conversations` of `from` and `value`) and LLaMA-Factory's
    (`images`, `messages` of `role` and `content`); one picture or a list of them in either. The
    n-th `<image>` in the text is the n-th picture. A record without an id gets one made of its
    content, so that it does not depend on the record's place in the file.
    """
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


def _parse_id(record: dict, images: list[str], turns: list[tuple[Role, str]]) -> str:
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


def _parse_turns(record: dict) -> list[tuple[Role, str]]:
    """The (role, text) pairs of either form, types checked."""
    known = (("conversations", "from", "value"), ("messages", "role", "content"))
    forms = [form for form in known if record.get(form[0]) is not None]
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


def _check_roles(roles: list[Role]) -> None:
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


def _parse_content(role: Role, text: str, images: Iterator[str]) -> tuple[Part, ...]:
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


def read_conversations(
    path: str | Path, quarantined: list[Quarantined], strict: bool = False
) -> Iterator[Conversation]:
    """The good conversations of a data file, one by one: a JSON list of records, or JSONL.

    Neither the text nor the conversations are held: see `data.stream`. A bad record is appended to
    `quarantined` with its reason; with `strict` it raises PhiSightError. A file that is missing,
    empty, not JSON, not a list, or without one good record raises PhiSightError.
    """
    good = 0
    bad: list[Quarantined] = []
    for where, record in read_records(Path(path)):
        result = conversation_or_fault(record)
        if isinstance(result, Conversation):
            good += 1
            yield result
            continue
        if strict:
            raise PhiSightError(f"{where}: {result.reason}; mend or remove the record")
        bad.append(Quarantined(where, result.id, result.reason))
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
    questions: list[Question] = []
    seen: set[str] = set()
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
