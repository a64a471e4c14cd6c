"""`texts`, a list of {"user", "assistant"} about the record's pictures: The Cauldron's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.form import Form, Turns, exchange
from data.record_keys import BadRecord
from data.stream import kind_of


def _turns(record: Mapping[str, Any]) -> Turns:
    turns: list[dict[str, Any]] = []
    for number, pair in enumerate(record["texts"], start=1):
        for key in ("user", "assistant"):
            if not isinstance(pair.get(key), str):
                raise BadRecord(
                    f"`texts`: `{key}` of its item {number} is {kind_of(pair.get(key))}, not text"
                )
        turns += exchange(pair["user"], pair["assistant"])
    return Turns(turns)


TEXTS = Form(
    "texts",
    frozenset({"texts"}),
    lambda record: (
        isinstance(record.get("texts"), list)
        and bool(record["texts"])
        and all(isinstance(pair, dict) and "user" in pair for pair in record["texts"])
    ),
    _turns,
    '{"images": ["a.jpg"], "texts": [{"user": "What is it?", "assistant": "A cat."}]}',
)
