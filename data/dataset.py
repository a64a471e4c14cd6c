"""LLaVA-Instruct JSON in, checked conversations out.

Everything here is read from untrusted files, so this border checks every type. A bad record
is set aside with its reason (quarantined) and the rest is used; a bad file is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from data.forms import Turns, form_of
from data.pictures import Pictures
from data.record_content import (
    IMAGE_TAG,
    Piece,
    picture_name,
    picture_names_of,
    pieces_of_turn,
    place_pictures,
)
from data.record_keys import (
    MALFORMED,
    NOT_DONE,
    PICTURE_KEYS,
    UNSUPERVISED,
    BadRecord,
    check_keys,
    check_record_is_learnt,
    check_written_once,
    checked_text,
    says_learn,
    system_text,
    unread_of_record,
    unread_of_turn,
)
from data.stream import NotRead, kind_of, read_lines
from errors import PhiSightError
from files import whole_file

KIND_LENGTH = 60
ID_SHOWN = 100  # characters of an id in a report
Role = Literal["user", "assistant", "system"]
ROLES: dict[str, Role] = {
    # LLaVA
    "human": "user",
    "gpt": "assistant",
    # OpenAI, LLaMA-Factory
    "user": "user",
    "assistant": "assistant",
    # ShareGPT, of answers that were taken from these
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    # all
    "system": "system",
}


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
    learnt: bool = True
    """for an answer, whether training learns from it; without, it only stands there to be read"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant in turn, ending with the assistant."""

    id: str
    messages: tuple[Message, ...]
    put_first: bool = field(default=False, compare=False)
    """its pictures come before its first question, as no mark says where they stand"""

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
    """A record that was set aside: where it stands, its id if it has one, why, and which kind of
    reason that is, one of `data.record_keys.KINDS`."""

    where: str
    id: str
    reason: str
    kind: str


@dataclass(frozen=True, slots=True)
class Fault:
    """A record that cannot be used: its id if it has one, why, and which of
    `data.record_keys.FAULTS` that is."""

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


def conversation_or_fault(record: object, pictures: Pictures = Pictures()) -> Conversation | Fault:
    """Turn one record of `read_records` into a `Conversation`, or say why that cannot be.

    It is of one of `data.forms`, with one picture or a list of them, of the record or of a turn.
    The n-th `<image>` in what the user says is the n-th picture; where there is none at all, the
    pictures come before the first question. In an answer `<image>` is a word like any other. Words
    may be a list of parts, and a part may name its picture. A `system` text beside the turns is the
    first message, and an answer with `loss` false is read and not learnt. A record without an id
    gets one made of its content, so that it does not depend on the record's place in the file.
    `pictures`: those of its source.
    """
    try:
        if isinstance(record, NotRead):
            raise BadRecord(str(record))
        return _parse_record(record, pictures)
    except BadRecord as error:
        return Fault(id_for_report(record), str(error), error.kind)


def picture_names(record: object, pictures: Pictures = Pictures()) -> list[str]:
    """The pictures that a record names, whatever else is wrong with it."""
    if not isinstance(record, dict):
        return []
    names: list[str] = []
    try:
        names += picture_names_of(record)
        turns, _, text_key = form_of(record).turns(record)
        for turn in turns:
            if isinstance(turn, dict) and _may_name_pictures(turn, text_key):
                pieces = pieces_of_turn(turn, text_key, "user", "")
                names += [value for kind, value in pieces if kind == "image"]
        names = [pictures.named(name) for name in names]
    except BadRecord:
        return []  # told where the record is parsed
    return names


def _may_name_pictures(turn: dict, text_key: str) -> bool:
    return isinstance(turn.get(text_key), list) or any(key in turn for key in PICTURE_KEYS)


@dataclass(frozen=True, slots=True)
class _Turn:
    """One turn before the pictures of its record are in their places."""

    role: Role
    pieces: list[Piece]
    learnt: bool
    content: object
    """what an id is made of"""


def _parse_record(record: object, pictures: Pictures) -> Conversation:
    if not isinstance(record, dict):
        raise BadRecord(f"the record is {kind_of(record)}, not an object")
    images = picture_names_of(record)
    turns = _parse_turns(record, images)
    check_record_is_learnt({k: v for k, v in record.items() if k not in form_of(record).keys})
    if system := system_text(record):
        turns = _with_system(turns, system)
    _check_roles([turn.role for turn in turns])
    if not any(turn.learnt for turn in turns if turn.role == "assistant"):
        raise BadRecord("none of its answers is to be learnt", UNSUPERVISED)
    asked = [turn.pieces for turn in turns if turn.role == "user"]  # where pictures may stand
    put_first = bool(images) and not any(kind == "mark" for turn in asked for kind, _ in turn)
    filled = iter(place_pictures(asked, images))
    messages = tuple(
        Message(
            turn.role,
            _parts(turn.role, next(filled) if turn.role == "user" else turn.pieces, pictures),
            turn.learnt,
        )
        for turn in turns
    )
    return Conversation(_parse_id(record, images, turns), messages, put_first)


def _parse_id(record: dict, images: list[str], turns: list[_Turn]) -> str:
    identity = record.get("id")
    if identity is None:
        content = json.dumps([images, [[turn.role, turn.content] for turn in turns]])
        return "sha256-" + hashlib.sha256(content.encode()).hexdigest()[:16]
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == "":
        raise BadRecord(f"its id is {kind_of(identity)}, not a name or a number")
    return checked_text(str(identity), "id")


def _parse_turns(record: dict, images: list[str]) -> list[_Turn]:
    """The turns of a record of any form, and every key of it and of them checked."""
    try:
        form = form_of(record)
    except BadRecord:
        check_keys(record, "the record", bool(images), (), is_record=True)  # the better reason
        raise
    given, role_key, text_key = form.turns(record)
    turns = [
        _parse_turn(turn, f"turn {number}", role_key, text_key)
        for number, turn in enumerate(given, start=1)
    ]
    has_pictures = bool(images) or any(kind == "image" for turn in turns for kind, _ in turn.pieces)
    check_keys(record, "the record", has_pictures, form.keys, is_record=True)
    for number, turn in enumerate(given, start=1):
        check_keys(turn, f"turn {number}", has_pictures, (role_key, text_key))
    return turns


def _parse_turn(turn: object, what: str, role_key: str, text_key: str) -> _Turn:
    if not isinstance(turn, dict):
        raise BadRecord(f"{what} is {kind_of(turn)}, not an object")
    name = turn.get(role_key)
    if not isinstance(name, str):
        raise BadRecord(f"{what}: `{role_key}` is {kind_of(name)}, not text")
    if name not in ROLES:
        raise BadRecord(f"{what}: unknown `{role_key}` {name!r:.60}")
    role = ROLES[name]
    pieces = pieces_of_turn(turn, text_key, role, what)
    said = says_learn({k: v for k, v in turn.items() if k not in (role_key, text_key)}, what)
    if said and role != "assistant":
        raise BadRecord(
            f"{what} asks for the {role}'s words to be learnt; only answers are", NOT_DONE
        )
    text = turn[text_key]
    as_it_is = isinstance(text, str) and not any(kind == "image" for kind, _ in pieces)
    learnt = role != "assistant" or said is not False
    return _Turn(role, pieces, learnt, text if as_it_is else pieces)


def _with_system(turns: list[_Turn], text: str) -> list[_Turn]:
    """The turns with the system message that stands beside them, unless it is among them too."""
    beside = _parse_turn({"role": "system", "content": text}, "its system text", "role", "content")
    if turns[0].role != "system":
        return [beside, *turns]
    if turns[0].pieces != beside.pieces:
        raise BadRecord("it has a system message beside the turns and another one among them")
    return turns


def _check_roles(roles: list[Role]) -> None:
    """An optional system message, then user and assistant in turn, the assistant last."""
    turns = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns:
        raise BadRecord("it has no assistant turn, so there is nothing to learn", UNSUPERVISED)
    for number, role in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if role != expected:
            place = number + 1 + len(roles) - len(turns)
            raise BadRecord(f"turn {place} is the {role}'s where the {expected}'s should be")
    if turns[-1] != "assistant":
        raise BadRecord("the last question has no answer", UNSUPERVISED)


def _parts(role: Role, pieces: Sequence[Piece], pictures: Pictures) -> tuple[Part, ...]:
    """What a message holds, its pictures being in their places."""
    if role != "user" and any(kind != "text" for kind, _ in pieces):
        raise BadRecord(f"{IMAGE_TAG} stands in the {role}'s text, where no picture can be")
    if not pieces:
        raise BadRecord(
            f"an empty turn of the {role}", UNSUPERVISED if role == "assistant" else MALFORMED
        )
    return tuple(
        Part("image", pictures.named(value)) if kind == "image" else Part("text", value)
        for kind, value in pieces
    )


# --- whole files --------------------------------------------------------------------------------


def unread_keys(record: object) -> Iterator[str]:
    """Every key of a record, of its turns ("turn: name") and of their parts that nothing reads."""
    if not isinstance(record, dict):
        return
    keys: Collection[str] = ()
    given = Turns(())
    with contextlib.suppress(BadRecord):  # told where the record is parsed
        keys = (form := form_of(record)).keys
        given = form.turns(record)
    yield from unread_of_record(record, keys)
    turns, role_key, text_key = given
    for turn in turns:
        yield from unread_of_turn(turn, role_key, text_key)


def form_name(record: object) -> str:
    """What the form of a record is called; "none" where it is of no form that is read."""
    try:
        return form_of(record).name if isinstance(record, dict) else "none"
    except BadRecord:
        return "none"


def id_for_report(record: object) -> str:
    """What a report calls a record, be it good or bad; empty where it has no id."""
    identity = record.get("id") if isinstance(record, dict) else None
    return str(identity)[:ID_SHOWN] if isinstance(identity, (str, int)) else ""


def write_quarantine(path: str | Path, quarantined: Sequence[Quarantined]) -> None:
    """Write one JSON object a line; the file appears whole or not at all.

    Raises PhiSightError if the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            whole_file(path) as temporary,
            open(temporary, "w", encoding="utf-8", newline="\n") as file,
        ):
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
                raise BadRecord(f"the question_id {question.id[:ID_SHOWN]} occurs twice")
        except BadRecord as error:
            raise PhiSightError(f"{where}: {error}; mend or remove the line") from None
        seen.add(question.id)
        questions.append(question)
    return questions


def _parse_question(record: object) -> Question:
    if isinstance(record, NotRead):
        raise BadRecord(str(record))
    if not isinstance(record, dict):
        raise BadRecord(f"the line is {kind_of(record)}, not an object")
    check_written_once(record, "the line")
    identity = record.get("question_id")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == "":
        raise BadRecord(f"`question_id` is {kind_of(identity)}, not a name or a number")
    texts = {}
    for key in ("text", "label", "kind"):
        value = record.get(key, "" if key == "kind" else None)
        if not isinstance(value, str) or (key != "kind" and not value.strip()):
            raise BadRecord(f"`{key}` is {kind_of(value)}, not text")
        texts[key] = checked_text(value.strip(), key)
    if not texts["kind"].isprintable() or len(texts["kind"]) > KIND_LENGTH:  # a row of a table
        raise BadRecord(f"`kind` is not one line of at most {KIND_LENGTH} characters")
    image = Pictures().named(picture_name(record.get("image")))
    identity = checked_text(str(identity), "question_id")
    return Question(identity, image, texts["text"], texts["label"], texts["kind"])
