"""What a form of records says of itself, see `data.forms`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.record_keys import BadRecord
from data.stream import kind_of


class Turns(NamedTuple):
    """The turns of a record, and under which keys each has its speaker and its words."""

    turns: Sequence[Any]
    role_key: str = "role"
    text_key: str = "content"


@dataclass(frozen=True)
class Form:
    """One way to write a conversation down; `turns` may raise `BadRecord`."""

    name: str
    keys: frozenset[str]
    """of a record, that are read; beside `id`, `image` and `images`"""
    is_one: Callable[[Mapping[str, Any]], bool]
    turns: Callable[[Mapping[str, Any]], Turns]
    example: str
    """one record, as docs/data.md shows it"""


def turn(role: str, content: object) -> dict[str, Any]:
    return {"role": role, "content": content}


def exchange(question: object, answer: object) -> list[dict[str, Any]]:
    """A question and its answer as two turns."""
    return [turn("user", question), turn("assistant", answer)]


def history(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns before the question, from `history`: a list of [question, answer]."""
    pairs = record.get("history")
    if pairs is None:
        return []
    if not isinstance(pairs, list):
        raise BadRecord(f"`history` is {kind_of(pairs)}, not a list of [question, answer]")
    turns: list[dict[str, Any]] = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord(f"`history`: its item {number} is not [question, answer]")
        turns += exchange(*pair)
    return turns


def has(record: Mapping[str, Any], *keys: str) -> bool:
    """Whether a record has something under each of these keys."""
    return all(record.get(key) is not None for key in keys)
