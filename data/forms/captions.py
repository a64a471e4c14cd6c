"""A picture and what is said of it, without a question: the answer follows the picture alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.form import Form, Turns, exchange, has
from data.record_keys import PICTURE_KEYS

MARK = "<image>"


def _caption(key: str, example: str) -> Form:
    def turns(record: Mapping[str, Any]) -> Turns:
        given = next(record[name] for name in PICTURE_KEYS if record.get(name))
        pictures = len(given) if isinstance(given, list) else 1
        return Turns(exchange(MARK * pictures, record[key]))

    return Form(
        key,
        frozenset({key}),
        lambda record: has(record, key) and any(record.get(name) for name in PICTURE_KEYS),
        turns,
        example,
    )


CAPTION = _caption("caption", '{"image": "a.jpg", "caption": "A cat on a wall."}')
TEXT = _caption("text", '{"image": "a.jpg", "text": "A cat on a wall."}')
