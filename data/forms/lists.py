"""A list of turns, each with its speaker and its words: LLaVA, ShareGPT, OpenAI, LLaMA-Factory.

`conversations` with `from` and `value` is LLaVA's and ShareGPT's; `messages` with `role` and
`content` OpenAI's, Hugging Face's and LLaMA-Factory's. Each list is also found with the other's
keys, so that they are told by the first turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.forms.form import Form, Turns
from data.record_keys import BadRecord
from data.stream import kind_of

KEYS = {"from": ("from", "value"), "role": ("role", "content")}


def _turns(list_key: str, usual: str, record: Mapping[str, Any]) -> Turns:
    given = record[list_key]
    if not isinstance(given, list) or not given:
        raise BadRecord(f"`{list_key}` is {kind_of(given)}, not a list of turns")
    first = given[0] if isinstance(given[0], dict) else {}
    other = next(key for key in KEYS if key != usual)
    return Turns(given, *KEYS[other if other in first and usual not in first else usual])


CONVERSATIONS = Form(
    "conversations",
    frozenset({"conversations"}),
    lambda record: record.get("conversations") is not None,
    lambda record: _turns("conversations", "from", record),
    '{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is'
    ' it?"}, {"from": "gpt", "value": "A cat."}]}',
)
MESSAGES = Form(
    "messages",
    frozenset({"messages"}),
    lambda record: record.get("messages") is not None,
    lambda record: _turns("messages", "role", record),
    '{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type":'
    ' "text", "text": "What is it?"}]}, {"role": "assistant", "content": "A cat."}]}',
)
