"""A conversation as the web app keeps it: its JSON form, and how it grows and goes back."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Literal

from data.dataset import Message, Part
from documents import parse_json
from errors import PhiSightError
from web.errors import RequestError

ID = re.compile(r"[0-9a-f]{16}\Z")
PICTURE = re.compile(r"[0-9a-f]{64}\.(?:png|jpg|gif|webp|bmp)\Z")
MAX_MESSAGES = 1000
TITLE_LENGTH = 48

Speaker = Literal["user", "assistant"]


@dataclass(frozen=True)
class SavedConversation:
    """User and assistant in turn. Its picture parts are names of files that lie beside it in the
    store; the last question may be without an answer."""

    id: str
    messages: tuple[Message, ...] = ()

    @property
    def title(self) -> str:
        """The first words that were asked, or "" where only pictures were sent."""
        text = " ".join(text_of(self.messages[0]).split()) if self.messages else ""
        return text if len(text) <= TITLE_LENGTH else text[: TITLE_LENGTH - 1].rstrip() + "…"


def new_conversation() -> SavedConversation:
    return SavedConversation(secrets.token_hex(8))


def clean_text(text: str) -> str:
    """`text` without halves of characters, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def text_of(message: Message) -> str:
    return " ".join(part.value for part in message.parts if part.kind == "text")


# -- as JSON ---------------------------------------------------------------------------------------


def to_json(conversation: SavedConversation) -> bytes:
    messages = [
        {"role": message.role, "parts": [{"kind": p.kind, "value": p.value} for p in message.parts]}
        for message in conversation.messages
    ]
    record = {"id": conversation.id, "messages": messages}
    return json.dumps(record, ensure_ascii=False).encode()


def from_json(data: bytes, name: str) -> SavedConversation:
    """The conversation in the bytes of a file; `name` stands in the errors.

    Raises PhiSightError (name, reason, remedy) for whatever `to_json` would not have written.
    """

    def refusal(reason: str) -> PhiSightError:
        return PhiSightError(f"{name}: {reason}; delete the conversation")

    try:
        record = parse_json(data)
    except PhiSightError:
        raise refusal("is not JSON") from None
    if not isinstance(record.get("messages"), list):
        raise refusal("is not a conversation")
    if not isinstance(record.get("id"), str) or not ID.match(record["id"]):
        raise refusal("has no id")
    if len(record["messages"]) > MAX_MESSAGES:
        raise refusal(f"has over {MAX_MESSAGES} messages")
    messages = []
    for index, raw in enumerate(record["messages"]):
        role: Speaker = "assistant" if index % 2 else "user"
        message = _message_from_json(raw, role)
        if message is None:
            raise refusal(f"message {index + 1} is not one of the {role}")
        messages.append(message)
    return SavedConversation(record["id"], tuple(messages))


def _message_from_json(raw: object, role: Speaker) -> Message | None:
    """The message of `role` that a decoded JSON value holds; None where it holds another thing."""
    if (
        not isinstance(raw, dict)
        or raw.get("role") != role
        or not isinstance(raw.get("parts"), list)
    ):
        return None
    parts = []
    for raw_part in raw["parts"]:
        part = _part_from_json(raw_part, role)
        if part is None:
            return None
        parts.append(part)
    return Message(role, tuple(parts)) if parts or role == "assistant" else None


def _part_from_json(raw: object, role: Speaker) -> Part | None:
    """The text, or the user's picture, that a decoded JSON value holds; None for another thing."""
    if not isinstance(raw, dict) or not isinstance(raw.get("value"), str):
        return None
    kind, value = raw.get("kind"), raw["value"]
    if kind == "text" and value == clean_text(value):
        return Part("text", value)
    if kind == "image" and role == "user" and PICTURE.match(value):
        return Part("image", value)
    return None


# -- forward and back ------------------------------------------------------------------------------


def with_answer(conversation: SavedConversation, text: str) -> SavedConversation:
    parts = (Part("text", clean_text(text)),) if text.strip() else ()
    return SavedConversation(conversation.id, (*conversation.messages, Message("assistant", parts)))


def before_question(
    conversation: SavedConversation, index: int
) -> tuple[SavedConversation, Message]:
    """The conversation before the question that message `index` is or answers, and that question.
    Raises `RequestError` for an index that is not in it."""
    if not isinstance(index, int) or not 0 <= index < len(conversation.messages):
        raise RequestError("nothing_there")
    start = index - index % 2
    earlier = SavedConversation(conversation.id, conversation.messages[:start])
    return earlier, conversation.messages[start]


def question_of(pictures: tuple[Part, ...], text: str) -> Message:
    """A user's turn: pictures first, then the text. Raises `RequestError` for an empty one."""
    text = clean_text(text).strip()
    if not text and not pictures:
        raise RequestError("ask_something")
    return Message("user", (*pictures, *((Part("text", text),) if text else ())))


def reworded(question: Message, text: str) -> Message:
    """A question with other words and the same pictures; `RequestError` if nothing is left."""
    return question_of(tuple(part for part in question.parts if part.kind == "image"), text)
