"""One answer, from the question to its last piece of text."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from assistant.ngrams import Ngrams
from assistant.sampling import Sampling
from assistant.text_stream import TextStream
from errors import PhiSightError

log = logging.getLogger("phisight.assistant")


class Constraint(Protocol):
    """What an answer has to be: it decides before every token which ones may come."""

    def allow(self, logits: Tensor) -> Tensor:
        """(vocabulary,) logits of the next token, -inf where it may not come; never all of them.
        A stop token may come where the answer may end."""
        ...

    def take(self, token: int) -> None:
        """Go on with the token that was chosen. What it raises makes the answer fail."""
        ...


@dataclass(eq=False, repr=False)
class Answer:
    """A prompt that is being continued: the one object between who asks and the engine.

    Whoever asks makes it (mostly by `Assistant.ask`), hands it in (`Assistant.start`, or
    `Engine.submit` for a prompt whose features are known), and reads it in one of two ways:

    - by waiting: `for piece in answer`, `next_piece()`, or `wait()` for its end;
    - without a thread: `subscribe(callback)`, which the engine's thread calls.

    An answer ends once, for the reason in `finish_reason`. Whoever does not want more of it calls
    `cancel()`, from any thread and at any time: it then ends at once in a queue, before its next
    batch of pictures, before the next piece of its prompt is read, or within a token. Leaving a
    `for` loop over it does the same.
    """

    ids: list[int]
    """token ids of the prompt, and what was chosen and fed since: a row of `Decoding`"""
    max_new_tokens: int
    image_features: Tensor
    """(images, tokens, vision dim) of the pictures in the prompt, in slot order"""
    image_keys: Sequence[str] = ()
    """name the content of the pictures, in slot order"""
    sampling: Sampling = Sampling()
    seed: int | None = None
    """makes sampling repeatable"""
    text: TextStream | None = None
    """what turns tokens into text and ends at stop strings; None: no piece is told, see `tokens`"""
    pictures: Sequence[tuple[str, bytes | Image.Image | None]] = ()
    """name and content of the pictures that are still to be encoded, in slot order; content None
    is read from the file of that name"""
    constraint: Constraint | None = None
    """what the answer has to be; None: any text; not with a `no_repeat_ngram_size`"""

    finish_reason: str | None = field(default=None, init=False)
    """None while it runs; "stop", "length", "filtered", "cancelled" or "failed" """
    error: BaseException | None = field(default=None, init=False)
    """what made it fail"""
    cancelled: bool = field(default=False, init=False)
    """whether `cancel` was called; it may still run for a moment"""
    cached: bool = field(default=False, init=False)
    """whether it was remembered and not computed"""
    tokens: list[int] = field(default_factory=list, init=False)
    """chosen so far; none for a remembered answer"""
    completion_tokens: int = field(default=0, init=False)
    reused_tokens: int = field(default=0, init=False)
    """of the prompt, whose keys and values were known from before"""
    seconds_to_first_token: float | None = field(default=None, init=False)
    """since it was submitted to the engine"""
    submitted: float = field(default=0.0, init=False)
    """when, by `time.perf_counter`"""
    unread: int = field(default=0, init=False)
    """tokens of `ids` that the engine still has to read before the next one is chosen"""
    looked_up: bool = field(default=False, init=False)
    """whether `unread` leaves out what the engine knows of an earlier conversation"""
    generator: torch.Generator | None = field(default=None, init=False)
    """what its tokens are drawn with, made by the engine"""
    ngrams: Ngrams | None = field(default=None, init=False)
    """which of them may not come twice, made by the engine; None where all may"""
    remember: Callable[[str], None] | None = field(default=None, init=False)
    """called with the reason when it has ended by itself, before its reader is told"""

    def __post_init__(self) -> None:
        if self.constraint is not None and self.sampling.no_repeat_ngram_size:
            # Both forbid tokens: together it may be all of them, as JSON repeats its marks.
            raise PhiSightError(
                "no_repeat_ngram_size: cannot go with JSON output, which has to repeat its marks;"
                " leave one of them out"
            )
        self.prompt_tokens = self.unread = len(self.ids)
        self._lock = threading.Lock()  # of the next two
        self._callback: Callable[[str | None], None] | None = None
        self._untold: list[str | None] = []
        self._arrived: queue.SimpleQueue[str | None] | None = None
        self._read_to_end = False

    # -- for who asks ------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End it as soon as can be, from any thread; of no effect once it has ended."""
        self.cancelled = True

    def subscribe(self, callback: Callable[[str | None], None]) -> None:
        """Have `callback` called with every piece of text as it comes, and with None at the end.

        The contract:

        - An answer has one reader: a second `subscribe`, and reading by waiting after it, raise
          `RuntimeError`.
        - It may be called at any time, best before the answer is started. What came before is told
          at once, in the thread that subscribes.
        - Pieces come in order, none is empty, no two calls overlap, and None comes exactly once,
          last. By then `finish_reason`, `error` and all counts are final. Whoever needs it looks
          at `error`: a callback gets no exception.
        - It is called in the engine's thread, and in the thread that starts the answer when it ends
          before it gets to the engine. Every answer of the engine waits for it, so it only hands
          the piece on, such as `loop.call_soon_threadsafe(pieces.put_nowait, piece)`.
        - It may call `cancel`. If it raises, it is not called again, the answer is cancelled, and
          the exception is logged.
        """
        with self._lock:
            if self._callback is not None:
                raise RuntimeError("answer: it has a reader already")
            self._callback = callback
            untold, self._untold = self._untold, []
            for piece in untold:
                self._call(self._callback, piece)

    def next_piece(self) -> str | None:
        """Wait for a piece of the text; None at the end. Raises what made the answer fail."""
        if self._arrived is None:
            arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()
            self.subscribe(arrived.put)
            self._arrived = arrived
        piece = None if self._read_to_end else self._arrived.get()
        if piece is None:
            self._read_to_end = True
            if self.error is not None:
                raise self.error
        return piece

    def wait(self) -> None:
        """Return when it has ended. Raises what made it fail."""
        while self.next_piece() is not None:
            pass

    def __iter__(self) -> Iterator[str]:
        """Its pieces of text as they come; leaving the iteration cancels it."""
        try:
            while (piece := self.next_piece()) is not None:
                yield piece
        finally:
            self.cancel()

    # -- for the engine ----------------------------------------------------------------------------

    def push(self, token: int) -> str | None:
        """Take the next token and tell the text that it completes.

        Returns the reason to end, or None to go on. Raises what the content filter and the
        constraint raise.
        """
        if self.seconds_to_first_token is None:
            self.seconds_to_first_token = time.perf_counter() - self.submitted
        self.tokens.append(token)
        self.completion_tokens += 1
        if self.constraint is not None:
            self.constraint.take(token)
        if self.text is not None:
            self._tell(self.text.push(token))
            if self.text.finished:
                return self.text.finished
        return "length" if len(self.tokens) == self.max_new_tokens else None

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """Tell what was held back, and that nothing more comes; of no effect once it has ended."""
        if self.finish_reason is not None:
            return
        rest = ""
        if self.text is not None and error is None:
            try:
                rest = self.text.end()
                reason = self.text.finished or reason
            except Exception as failure:  # the content filter's
                reason, error = "failed", failure
        self.finish_reason, self.error = reason, error
        if self.remember is not None and reason in ("stop", "length", "filtered"):
            self.remember(reason)
        self._tell(rest)
        self._tell(None)

    def recall(self, text: str, reason: str, completion_tokens: int) -> None:
        """End at once, with what was answered when the same was asked before."""
        self.cached, self.completion_tokens = True, completion_tokens
        self.seconds_to_first_token = 0.0
        self.finish_reason = reason
        self._tell(text)
        self._tell(None)

    def _tell(self, piece: str | None) -> None:
        if piece == "":
            return
        with self._lock:
            if self._callback is None:
                self._untold.append(piece)
            else:
                self._call(self._callback, piece)

    def _call(self, callback: Callable[[str | None], None], piece: str | None) -> None:
        try:
            callback(piece)
        except Exception:
            log.exception("the reader of an answer failed; the answer is cancelled")
            self._callback = ignore
            self.cancel()


def ignore(piece: str | None) -> None:
    """A reader that has failed is told nothing more."""
