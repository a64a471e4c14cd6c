"""Files of questions that others made, read strictly: a score over a part of a set is no score.

Two shapes are told apart: one JSON object for the whole file, as VQA v2, GQA and COCO have it, and
records, as a JSON list or one object a line (JSONL).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from data.dataset import KIND_LENGTH
from data.record_content import picture_name
from data.record_keys import BadRecord, check_written_once, checked_text
from data.stream import NotJson, kind_of, read_records
from documents import parse_json
from errors import PhiSightError
from evaluation.task import Asked
from files import read_regular

FILE_BYTES = 2**30  # VQA v2's largest, the annotations of its training half, has 185 MB
OF_A_RECORD = {"question_id", "image", "id"}  # an object with one of these is a record

Record = dict[str, Any]
Item = TypeVar("Item")


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Say where a record stands that cannot be used."""
    try:
        yield
    except (BadRecord, PhiSightError) as error:
        raise PhiSightError(f"{where}: {error}; mend it, a score over a part is no score") from None


def read_file(path: Path) -> Record | list[tuple[str, Record]]:
    """The one object of a file, or its records with their places.

    Raises `PhiSightError` for a file that is missing, too large, or neither."""
    try:
        data = read_regular(path, FILE_BYTES)
    except OSError as error:
        raise PhiSightError(f"{path}: cannot be read ({error.strerror}); check --data") from None
    with contextlib.suppress(PhiSightError):  # then it is records, or told by `read_records`
        whole = parse_json(data, own=False)
        if not OF_A_RECORD & whole.keys():
            return whole
    records: list[tuple[str, Record]] = []
    for where, record in read_records(path):
        if isinstance(record, NotJson):
            raise PhiSightError(f"{where}: not JSON ({record.reason}); mend or remove the line")
        if not isinstance(record, dict):
            raise PhiSightError(f"{where}: {kind_of(record)}, not an object; mend or remove it")
        with at(where):
            check_written_once(record, "the record")
        records.append((where, record))
    return records


def records_of(path: Path) -> list[tuple[str, Record]]:
    """The records of a file that must have this shape."""
    found = read_file(path)
    if isinstance(found, dict):
        raise PhiSightError(f"{path}: one JSON object, not one question a line; check --data")
    return found


def text(record: Record, *keys: str) -> str:
    """The first of these keys that is there, as a text that is not blank. Raises `BadRecord`."""
    key = next((key for key in keys if record.get(key) is not None), keys[0])
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"`{key}` is {kind_of(value)}, not text")
    return checked_text(value.strip(), key)


def texts(record: Record, key: str) -> tuple[str, ...]:
    """A list of texts, at least one. Raises `BadRecord`."""
    values = record.get(key)
    if not isinstance(values, list) or not values:
        raise BadRecord(f"`{key}` is {kind_of(values)}, not a list of texts")
    return tuple(text({key: value}, key) for value in values)


def identity(record: Record, *keys: str) -> str:
    """The first of these keys that is there, as a name. Raises `BadRecord`."""
    key = next((key for key in keys if record.get(key) is not None), keys[0])
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadRecord(f"`{key}` is {kind_of(value)}, not a name or a number")
    return checked_text(str(value), key)


def kind(record: Record, key: str = "kind") -> str:
    """What names a row of the table; empty where there is none. Raises `BadRecord`."""
    value = record.get(key) or ""
    if not isinstance(value, str) or not value.isprintable() or len(value) > KIND_LENGTH:
        raise BadRecord(f"`{key}` is not one line of at most {KIND_LENGTH} characters")
    return value


def image(record: Record, key: str = "image") -> str:
    """The name of a picture within its folder. Raises `BadRecord`."""
    return picture_name(record.get(key))


def first(items: Sequence[Item], limit: int) -> list[Item]:
    """The first `limit` of them, all for 0."""
    return list(items[:limit] if limit else items)


def unique(asked: Sequence[Asked], path: Path) -> list[Asked]:
    """The questions, which must be some and must have different ids."""
    if not asked:
        raise PhiSightError(f"{path}: holds no question; check --data")
    seen: set[str] = set()
    for one in asked:
        if one.id in seen:
            raise PhiSightError(
                f"{path}: the id {one.id[:60]!r} stands there twice; give each question its own"
            )
        seen.add(one.id)
    return list(asked)


def numbered(asked: Sequence[Asked]) -> list[Asked]:
    """The same with the place behind ids that stand there before: LLaVA's records share the id of
    their picture. No such name is an id of the file."""
    taken = {one.id for one in asked}
    seen: dict[str, int] = {}
    found = []
    for one in asked:
        seen[one.id] = seen.get(one.id, 0) + 1
        if seen[one.id] == 1:
            found.append(one)
            continue
        while (name := f"{one.id}#{seen[one.id]}") in taken:
            seen[one.id] += 1
        taken.add(name)
        found.append(replace(one, id=name))
    return found
