"""A conversation as the JSON of its file: written, and read back with everything checked.

    {"form": 2, "id": "...", "version": 7, "name": "", "pinned": false, "system": "", "dropped": 0,
     "updated": 1790000000.0, "next": 4, "shown": [1, 2], "nodes": [
      {"node": 1, "parent": 0, "role": "user", "text": "What is it?", "pictures": ["....png"]},
      {"node": 2, "parent": 1, "role": "assistant", "text": "A star.",
       "note": {"reason": "stop", "tokens": 4, "seconds": 0.5, "rate": 9.0}}]}

Files of the first form, which held one list of messages, are read as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, get_args

from documents import parse_json
from errors import PhiSightError
from web.chat.conversation import (
    BEGINNING,
    ID,
    MAX_NODES,
    MAX_SYSTEM,
    PICTURE,
    Cut,
    Node,
    Note,
    Reason,
    SavedConversation,
    Speaker,
    clean_text,
)

FORM = 2
MAX_COUNT = 2**53  # what a browser's numbers hold
MAX_TIME = 250_000_000_000.0  # seconds since 1970: in the last year that a date can be of
REASONS = get_args(Reason)


class _Damaged(Exception):
    """Why a value is not what was written."""


def to_json(conversation: SavedConversation) -> bytes:
    record = {
        "form": FORM,
        "id": conversation.id,
        "version": conversation.version,
        "name": conversation.name,
        "pinned": conversation.pinned,
        "system": conversation.system,
        "dropped": conversation.dropped,
        "updated": conversation.updated,
        "next": conversation.next,
    } | _tree_json(conversation.nodes, conversation.shown)
    return json.dumps(record, ensure_ascii=False).encode()


def from_json(data: bytes, name: str) -> SavedConversation:
    """The conversation in the bytes of a file; `name` stands in the errors.

    Raises PhiSightError (name, reason, remedy) for whatever no version would have written.
    """
    try:
        record = parse_json(data)
    except PhiSightError:
        raise PhiSightError(f"{name}: is not JSON; delete the conversation") from None
    try:
        return _first_form(record) if "form" not in record else _second_form(record)
    except _Damaged as damage:
        raise PhiSightError(f"{name}: {damage}; delete the conversation") from None


def cut_to_json(gone: Cut) -> bytes:
    record = _tree_json(gone.nodes, gone.shown) | {"dropped": gone.dropped}
    return json.dumps(record, ensure_ascii=False).encode()


def cut_from_json(data: bytes) -> Cut:
    """What `cut_to_json` wrote. Raises PhiSightError for anything else."""
    try:
        record = parse_json(data)
        nodes = _nodes(record)
        if not nodes:
            raise _Damaged("holds nothing")
        root = nodes[min(nodes)].parent
        return Cut(nodes, _shown(record, nodes, {root}), _count(record, "dropped"))
    except (PhiSightError, _Damaged) as error:
        raise PhiSightError(f"what was deleted: {error}; it cannot be put back") from None


# -- the second form ------------------------------------------------------------------------------


def _tree_json(nodes: Mapping[int, Node], shown: Mapping[int, int]) -> dict[str, Any]:
    return {
        "shown": sorted(shown.values()),
        "nodes": [_node_json(node) for node in nodes.values()],
    }


def _node_json(node: Node) -> dict[str, Any]:
    record: dict[str, Any] = {
        "node": node.number,
        "parent": node.parent,
        "role": node.role,
        "text": node.text,
    }
    if node.pictures:
        record["pictures"] = node.pictures
    if node.note:
        record["note"] = {
            "reason": node.note.reason,
            "tokens": node.note.tokens,
            "seconds": node.note.seconds,
            "rate": node.note.rate,
        }
    return record


def _second_form(record: dict[str, Any]) -> SavedConversation:
    if record["form"] != FORM:
        raise _Damaged("was written by a newer version")
    nodes = _nodes(record)
    next_number = _count(record, "next")
    if next_number <= max(nodes, default=0):
        raise _Damaged("has no number for its next message")
    system = _text(record, "system")
    if len(system) > MAX_SYSTEM:
        raise _Damaged("has a system prompt that is too long")
    if record.get("pinned") not in (True, False):
        raise _Damaged("is neither pinned nor not")
    updated = _number(record, "updated")
    if updated > MAX_TIME:
        raise _Damaged("was changed at no time that there is")
    conversation = SavedConversation(
        id=_id(record),
        nodes=nodes,
        shown=_shown(record, nodes, {BEGINNING}),
        next=next_number,
        version=_count(record, "version"),
        name=_text(record, "name"),
        pinned=record["pinned"] is True,
        system=system,
        dropped=_count(record, "dropped"),
        updated=updated,
    )
    if conversation.dropped > len(conversation.path):
        raise _Damaged("leaves out more than it has")
    return conversation


def _nodes(record: dict[str, Any]) -> dict[int, Node]:
    """By number. What stands at the top may have parents that are not among them."""
    given = record.get("nodes")
    if not isinstance(given, list):
        raise _Damaged("is not a conversation")
    if len(given) > MAX_NODES:
        raise _Damaged(f"has over {MAX_NODES} messages")
    nodes: dict[int, Node] = {}
    for raw in given:
        node = _node(raw)
        if node.number <= max(next(reversed(nodes), 0), node.parent):
            raise _Damaged(f"message {node.number} is out of order")
        above = nodes.get(node.parent)
        if above is not None and above.role == node.role:
            raise _Damaged(f"message {node.number} is not one of the other speaker")
        nodes[node.number] = node
    return nodes


def _node(raw: object) -> Node:
    if not isinstance(raw, dict):
        raise _Damaged("a message is not an object")
    number, parent = _count(raw, "node"), _count(raw, "parent")
    role = _role(raw.get("role"), number)
    text = _text(raw, "text")
    pictures = _pictures(raw.get("pictures", []), role, number)
    if role == "user" and not text and not pictures:
        raise _Damaged(f"message {number} says nothing")
    note = _note(raw["note"], number) if "note" in raw else None
    if note is not None and role == "user":
        raise _Damaged(f"message {number} is no answer")
    return Node(number, parent, role, text, pictures, note)


def _shown(record: dict[str, Any], nodes: dict[int, Node], roots: set[int]) -> dict[int, int]:
    """Checks that one is shown wherever there are some, and that all stand somewhere."""
    given = record.get("shown")
    if not isinstance(given, list):
        raise _Damaged("does not say what is shown")
    shown: dict[int, int] = {}
    for number in given:
        if type(number) is not int or number not in nodes or nodes[number].parent in shown:
            raise _Damaged("does not say what is shown")
        shown[nodes[number].parent] = number
    for node in nodes.values():
        if node.parent not in shown or (node.parent not in nodes and node.parent not in roots):
            raise _Damaged(f"message {node.number} has no place")
        if node.parent == BEGINNING and node.role != "user":
            raise _Damaged("does not begin with a question")
    return shown


def _note(raw: object, number: int) -> Note:
    if not isinstance(raw, dict) or raw.get("reason") not in REASONS:
        raise _Damaged(f"message {number} has a note that is none")
    return Note(raw["reason"], _count(raw, "tokens"), _number(raw, "seconds"), _number(raw, "rate"))


def _id(record: dict[str, Any]) -> str:
    if not isinstance(record.get("id"), str) or not ID.match(record["id"]):
        raise _Damaged("has no id")
    return record["id"]


def _role(raw: object, number: int) -> Speaker:
    if raw == "user":
        return "user"
    if raw == "assistant":
        return "assistant"
    raise _Damaged(f"message {number} is not one of the user or the assistant")


def _pictures(raw: object, role: Speaker, number: int) -> tuple[str, ...]:
    if not isinstance(raw, list) or (raw and role != "user"):
        raise _Damaged(f"message {number} has pictures that are none")
    for name in raw:
        if not isinstance(name, str) or not PICTURE.match(name):
            raise _Damaged(f"message {number} has pictures that are none")
    return tuple(raw)


def _text(record: dict[str, Any], name: str) -> str:
    text = record.get(name)
    if not isinstance(text, str) or text != clean_text(text):
        raise _Damaged(f"{name} is not a text")
    return text


def _count(record: dict[str, Any], name: str) -> int:
    count = record.get(name)
    if type(count) is not int or not 0 <= count < MAX_COUNT:
        raise _Damaged(f"{name} is not a whole number from 0 on")
    return count


def _number(record: dict[str, Any], name: str) -> float:
    number = record.get(name)
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        raise _Damaged(f"{name} is not a number")
    if not math.isfinite(number) or number < 0:
        raise _Damaged(f"{name} is not a number from 0 on")
    return float(number)


# -- the first form -------------------------------------------------------------------------------


def _first_form(record: dict[str, Any]) -> SavedConversation:
    """One list of messages, of user and assistant in turn, each with its parts."""
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise _Damaged("is not a conversation")
    if len(messages) > MAX_NODES:
        raise _Damaged(f"has over {MAX_NODES} messages")
    nodes = {}
    for index, raw in enumerate(messages):
        role: Speaker = "assistant" if index % 2 else "user"
        if not isinstance(raw, dict) or raw.get("role") != role:
            raise _Damaged(f"message {index + 1} is not one of the {role}")
        text, pictures = _parts(raw.get("parts"), role, index + 1)
        nodes[index + 1] = Node(index + 1, index, role, text, pictures)
    shown = {node.parent: number for number, node in nodes.items()}
    return SavedConversation(_id(record), nodes, shown, len(nodes) + 1, version=1)


def _parts(raw: object, role: Speaker, number: int) -> tuple[str, tuple[str, ...]]:
    if not isinstance(raw, list) or not all(isinstance(part, dict) for part in raw):
        raise _Damaged(f"message {number} has no parts")
    if not raw and role == "user":
        raise _Damaged(f"message {number} is not one of the {role}")
    texts, pictures = [], []
    for part in raw:
        if part.get("kind") == "text":
            texts.append(_text(part, "value"))
        elif part.get("kind") == "image":
            pictures.append(part.get("value"))
        else:
            raise _Damaged(f"message {number} is not one of the {role}")
    return " ".join(texts), _pictures(pictures, role, number)
