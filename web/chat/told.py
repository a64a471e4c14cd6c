"""A conversation as the page is told of it."""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from web.chat.conversation import (
    Node,
    Note,
    SavedConversation,
    messages_of,
    read_turns,
)
from web.chat.markdown import rendered

if TYPE_CHECKING:
    from assistant.assistant import Assistant
    from data.chat import ChatFormat
    from web.chat.store import Listed

COUNTED = 20_000  # texts whose length in tokens is remembered, 100 bytes each


def conversation_json(
    conversation: SavedConversation,
    assistant: Assistant | None,
    last: int | None = None,
    answering: bool = False,
) -> dict[str, Any]:
    """Args: `assistant`: whose context it fills, None while it is loaded; `last`: node behind which
    nothing is told, such as a question that is answered again; `answering`: whether an answer to it
    is being written."""
    path = conversation.path
    if last is not None:
        end = next(index for index, node in enumerate(path, 1) if node.number == last)
        path = path[:end]
    below = conversation.versions()
    turns = [
        _turn_json(node, below[node.parent], index < conversation.dropped)
        for index, node in enumerate(path)
    ]
    return {
        "id": conversation.id,
        "title": conversation.title,
        "named": bool(conversation.name),
        "pinned": conversation.pinned,
        "system": conversation.system,
        "version": conversation.version,
        "updated": conversation.updated,
        "turns": turns,
        "answering": answering,
        "context": _context_json(conversation, path, assistant),
    }


def _turn_json(node: Node, versions: list[int], unread: bool) -> dict[str, Any]:
    turn: dict[str, Any] = {
        "node": node.number,
        "role": node.role,
        "text": node.text,
        "versions": versions,
        "unread": unread,
    }
    if node.role == "user":
        return turn | {"pictures": list(node.pictures)}
    return turn | {"html": rendered(node.text), "note": note_json(node.note)}


def note_json(note: Note | None) -> dict[str, Any] | None:
    if note is None:
        return None
    return {
        "reason": note.reason,
        "tokens": note.tokens,
        "seconds": note.seconds,
        "rate": note.rate,
    }


def listed_json(listed: Listed) -> dict[str, Any]:
    return {
        "id": listed.id,
        "title": listed.title,
        "updated": listed.updated,
        "pinned": listed.pinned,
        "thumbnail": listed.thumbnail,
        "turns": listed.turns,
    }


def _context_json(
    conversation: SavedConversation, path: list[Node], assistant: Assistant | None
) -> dict[str, int] | None:
    if assistant is None:
        return None
    messages = messages_of(conversation, read_turns(conversation, path[-1] if path else None))
    used = tokens_of(messages, assistant.parts.chat_format)
    return {"used": used, "of": assistant.context_tokens}


# -- how many tokens ------------------------------------------------------------------------------

_counted: OrderedDict[bytes, int] = OrderedDict()
_counting = threading.Lock()


_formats: dict[int, tuple[weakref.ref[ChatFormat], int]] = {}
_numbers = itertools.count()


def _number_of(chat_format: ChatFormat) -> int:
    """Tells the formats of models apart: one may lie where that of a former model has lain."""
    with _counting:
        known = _formats.get(id(chat_format))
        if known is None or known[0]() is not chat_format:
            known = _formats[id(chat_format)] = weakref.ref(chat_format), next(_numbers)
        return known[1]


def tokens_of(messages: Any, chat_format: ChatFormat) -> int:
    """How many tokens the model reads of messages, without those that open its answer. What was
    counted before is remembered, by the digest of its text."""
    from data.chat import message_pieces

    count = len(chat_format.heads[messages[0].role]) if messages else 0
    for message in messages:
        count += chat_format.frame_tokens(message.role)
        for kind, value in message_pieces(message):
            count += (
                chat_format.tokens_per_image
                if kind == "image"
                else _text_tokens(value, chat_format)
            )
    return count


def _text_tokens(text: str, chat_format: ChatFormat) -> int:
    named = f"{_number_of(chat_format)} {text}".encode()
    digest = hashlib.blake2b(named, digest_size=16).digest()
    with _counting:
        known = _counted.get(digest)
        if known is not None:
            _counted.move_to_end(digest)
            return known
    count = len(chat_format.encode_text(text))
    with _counting:
        _counted[digest] = count
        while len(_counted) > COUNTED:
            _counted.popitem(last=False)
    return count
