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

from tokenizers import Tokenizer

from data.chat import ChatFormat, message_pieces
from data.dataset import Message

SPACE = "\u2581"  # what the tokenizer writes for a space
CROSSING = re.compile(f"[^{SPACE}]{SPACE}")
WORDS_KEPT = 500_000  # about 60 MB; text of any kind has fewer words that come again
NORMALIZERS = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]


class TokenCounter:
    """Counts what `render` would give."""

    def __init__(self, chat_format: ChatFormat) -> None:
        self.chat_format = chat_format
        self._by_word = words_are_independent(chat_format.text_encoder)
        self._lengths = _WordLengths(chat_format.text_encoder)

    def count(self, messages: Sequence[Message]) -> tuple[int, int]:
        """(tokens, supervised tokens) of `render(messages, chat_format)`; raises what it does."""
        total, supervised = 1, 0  # 1: <|endoftext|>
        for message in messages:
            content = sum(
                self.text_tokens(value) if kind == "text" else self.chat_format.tokens_per_image
                for kind, value in message_pieces(message)
            )
            total += content + 2
            supervised += (content + 1) * (message.role == "assistant")
        return total, supervised

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
