"""How many tokens conversations have, without the tokens: ten times as fast as to render them.

Phi-3's tokenizer encodes a whole stretch of text at once, but none of its tokens goes from the end
of a word into the space behind it. So no merge crosses from a word to the next, words can be
encoded one by one, and most of them are known already. Whether a tokenizer is of that kind is read
from its file; any other one is asked in full, as is a text in which spaces stand together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from tokenizers import Tokenizer

from data.chat import NOTHING_LEARNT, ChatFormat, Limits, message_pieces
from data.dataset import Message

SPACE = "\u2581"  # what the tokenizer writes for a space
CROSSING = re.compile(f"[^{SPACE}]{SPACE}")
WORDS_KEPT = 500_000  # about 60 MB; text of any kind has fewer words that come again
NORMALIZERS = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]


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
        self._by_word = words_are_independent(chat_format.text_encoder)
        self._lengths = _WordLengths(chat_format.text_encoder)

    def count(self, messages: Sequence[Message]) -> Length:
        """What `render(messages, chat_format)` has; raises what it does."""
        return self.running(messages)[-1]

    def running(self, messages: Sequence[Message]) -> list[Length]:
        """What `render` gives for the first message, for the first two, and so on."""
        text, pictures, supervised = 1, 0, 0  # 1: <|endoftext|>
        lengths = []
        for message in messages:
            content = 0
            for kind, value in message_pieces(message):
                content += self.text_tokens(value) if kind == "text" else 0
                pictures += kind == "image"
            text += content + 2
            supervised += (content + 1) * (message.role == "assistant" and message.learnt)
            tokens = text + pictures * self.chat_format.tokens_per_image
            lengths.append(Length(text, pictures, tokens, supervised))
        return lengths

    def text_tokens(self, text: str) -> int:
        """`len(chat_format.encode_text(text))`."""
        text = text.strip()
        if not self._by_word or not text or "  " in text or SPACE in text:
            return len(self.chat_format.encode_text(text))
        if len(self._lengths) > WORDS_KEPT:
            self._lengths.clear()
        return sum(map(self._lengths.__getitem__, text.split(" ")))


class _WordLengths(dict[str, int]):
    """word -> tokens of the word with the space before it."""

    def __init__(self, encoder: Tokenizer) -> None:
        super().__init__()
        self._encoder = encoder

    def __missing__(self, word: str) -> int:
        length = len(self._encoder.encode(word, add_special_tokens=False).ids)
        self[word] = length
        return length


def words_are_independent(encoder: Tokenizer) -> bool:
    """Whether the ids of a text are those of its words: see the module's docstring."""
    description = json.loads(encoder.to_str())
    model, normalizer = description["model"], description.get("normalizer") or {}
    return (
        normalizer.get("type") == "Sequence"
        and normalizer.get("normalizers") == NORMALIZERS
        and description.get("pre_tokenizer") is None
        and not description.get("added_tokens")
        and model.get("type") == "BPE"
        and SPACE in model["vocab"]
        and not any(
            model.get(name)
            for name in (
                "dropout",
                "continuing_subword_prefix",
                "end_of_word_suffix",
                "ignore_merges",
            )
        )
        and not any(CROSSING.search(token) for token in model["vocab"])
    )
