"""How many tokens conversations have, without the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from data.chat import NOTHING_LEARNT, ChatFormat, Limits, message_pieces
from data.dataset import Message


class Length(NamedTuple):
    """How long a rendered conversation is."""

    text_tokens: int
    pictures: int
    tokens: int
    """all of them, those of the pictures among them"""
    supervised: int

    def is_within(self, limits: Limits) -> bool:
        return limits.hold(self.text_tokens, self.tokens)


def fit(messages: Sequence[Message], running: Sequence[Length], limits: Limits) -> tuple[int, str]:
    """How many turns `render_to_limit` drops of a conversation with these `running` lengths, and
    why it cannot be used, which is empty where it can."""
    turns = [length for m, length in zip(messages, running) if m.role == "assistant"]
    kept = list(takewhile(lambda length: length.is_within(limits), turns))
    if not kept:
        return len(turns), limits.reason(*turns[0][:3])
    return len(turns) - len(kept), "" if kept[-1].supervised else NOTHING_LEARNT


class TokenCounter:
    """Counts what `render` would give."""

    def __init__(self, chat_format: ChatFormat) -> None:
        self.chat_format = chat_format

    def count(self, messages: Sequence[Message]) -> Length:
        """What `render(messages, chat_format)` has; raises what it does."""
        return self.running(messages)[-1]

    def running(self, messages: Sequence[Message]) -> list[Length]:
        """What `render` gives for the first message, for the first two, and so on."""
        text, pictures, supervised = self.chat_format.bare_tokens(messages), 0, 0
        lengths = []
        for message in messages:
            content = 0
            for kind, value in message_pieces(message):
                content += len(self.chat_format.encode_text(value)) if kind == "text" else 0
                pictures += kind == "image"
            text += content + self.chat_format.frame_tokens(message.role)
            supervised += (content + 1) * (message.role == "assistant" and message.learnt)
            tokens = text + pictures * self.chat_format.tokens_per_image
            lengths.append(Length(text, pictures, tokens, supervised))
        return lengths
