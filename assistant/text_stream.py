"""Tokens -> text that may be shown, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

HALF = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """A tokenizer, ours or transformers', as far as it writes text."""

    def decode(self, ids: list[int], /, *, skip_special_tokens: bool) -> Any: ...


class TextStream:
    """Decodes an answer as it grows, ends it at stop strings, and holds back what may not be shown.

    Only the tokens since the last whole character are decoded anew, with those of one piece before
    them: a tokenizer writes a word's space by what stands in front of it.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop: Sequence[str] = (),
        content_filter: Callable[[str, bool], int | None] | None = None,
    ) -> None:
        self.tokenizer, self.stop, self.content_filter = tokenizer, tuple(stop), content_filter
        self.finished: str | None = None
        """"stop" after a stop string, "filtered" after blocked content: nothing more is shown"""
        self.shown = ""
        self._text = ""
        self._ids: list[int] = []
        self._before = self._done = 0  # where the piece before began, where the last one ended

    def push(self, token: int) -> str:
        """The next token -> what can be shown now, often nothing."""
        if self.finished:
            return ""
        self._ids.append(token)
        text = decode(self.tokenizer, self._ids[self._before :])
        if text.endswith(HALF):  # half a character waits for its other bytes
            return ""
        piece = text[len(decode(self.tokenizer, self._ids[self._before : self._done])) :]
        if not piece:  # a special token: what follows is still decoded with what came before it
            return ""
        self._text += piece
        self._before, self._done = self._done, len(self._ids)
        return self._show(final=False)

    def end(self) -> str:
        """Nothing more comes: what was held back. Half a character is never shown."""
        return "" if self.finished else self._show(final=True)

    def _show(self, final: bool) -> str:
        text = self._text
        found = [place for mark in self.stop if (place := text.find(mark)) >= 0]
        if found:
            text, final, self.finished = text[: min(found)], True, "stop"
        limit = len(text) if final else len(text) - held_back(text, self.stop)
        if self.content_filter is not None:
            allowed = self.content_filter(text, final)
            if allowed is None:
                self.finished = "filtered"
                return ""
            limit = min(limit, allowed)
        piece = text[len(self.shown) : limit]
        self.shown += piece
        return piece


def decode(tokenizer: Decoder, ids: list[int]) -> str:
    """Token ids -> their text, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def held_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    return max(
        (
            length
            for mark in stop
            for length in range(1, min(len(mark), len(text) + 1))
            if text.endswith(mark[:length])
        ),
        default=0,
    )
