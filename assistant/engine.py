"""Many answers at once: they join the running batch, and leave it when they end.

One worker thread owns the model. Every step it takes in what has arrived, gives each sequence its
next token, and drops those that ended or whose reader has gone: continuous batching (Orca, OSDI
2022).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence

import numpy
import torch

from assistant.answer import Answer
from assistant.decoding import Decoding
from assistant.prefix import PrefixCache, token_keys
from assistant.sampling import choose, penalize
from errors import PhiSightError
from model.cache import KeyValues
from model.vlm import VisionLanguageModel

FED_AT_ONCE = 8192  # tokens of new answers that are fed in one pass


class Busy(PhiSightError):
    """More answers wait than the queue takes."""


class Engine:
    """Takes answers from any thread; its own thread, started by the first one, decodes them."""

    def __init__(
        self,
        model: VisionLanguageModel,
        stop_ids: Collection[int],
        tokens_per_image: int,
        max_rows: int = 16,
        queue_limit: int = 64,
        prefix_bytes: int = 0,
    ) -> None:
        """`max_rows`: sequences decoded at once; `queue_limit`: answers that may wait beside
        them; `prefix_bytes`: room for keys and values of conversations that may go on."""
        self.model, self.stop_ids, self.tokens_per_image = model, stop_ids, tokens_per_image
        self.max_rows, self.queue_limit = max_rows, queue_limit
        crossing = model.language_model.config.rope.crossing
        self.prefixes = PrefixCache(prefix_bytes, crossing, tokens_per_image)
        self.counts: Counter[str] = Counter()
        self._waiting: list[Answer] = []
        self._running: list[Answer] = []
        self._decoding: Decoding[Answer] = Decoding(model)
        self._changed = threading.Condition()  # of what waits and runs, and of closing
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, *answers: Answer) -> None:
        """Queue answers; those of one call join the batch together where it has room.

        Raises `Busy`, and takes none of them, when there is no room for all.
        """
        now = time.perf_counter()
        with self._changed:
            if self._closed:
                raise PhiSightError("assistant: is closed; load it again")
            # Whoever has gone takes no place: the thread is about to drop it.
            waiting = sum(not answer.cancelled for answer in self._waiting)
            free = self.max_rows - len(self._running)
            if waiting + len(answers) > free + self.queue_limit:
                raise Busy(f"assistant: {waiting} questions wait already; ask later")
            for answer in answers:
                answer.submitted = now
            self._waiting += answers
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
                self._thread.start()
            self._changed.notify()

    def statistics(self) -> dict[str, float]:
        with self._changed:
            return {
                "running": len(self._running),
                "waiting": len(self._waiting),
                "prompt_tokens": self.counts["prompt_tokens"],
                "tokens_generated": self.counts["tokens_generated"],
                "prefix_cache_hits": self.counts["prefix_cache_hits"],
                "prefix_cache_bytes": self.prefixes.bytes,
            }

    def close(self) -> None:
        """Cancel what runs and waits, and wait for the thread to end."""
        with self._changed:
            self._closed = True
            for answer in (*self._waiting, *self._running):
                answer.cancel()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    # -- the worker thread -------------------------------------------------------------------------

    def _work(self) -> None:
        torch.set_grad_enabled(False)  # of this thread
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if self._closed and not (self._waiting or self._running):
                    return
                gone = [answer for answer in self._waiting if answer.cancelled]
                waiting = [answer for answer in self._waiting if not answer.cancelled]
                free = self.max_rows - len(self._running)
                arrived, self._waiting = waiting[:free], waiting[free:]
            for answer in gone:
                answer.end("cancelled")
            try:
                self._admit(arrived)
                self._step()
            except Exception as error:  # whatever it is, readers must not wait for ever
                self._fail([*arrived, *self._running], error)

    def _fail(self, answers: Sequence[Answer], error: Exception) -> None:
        for answer in answers:
            answer.end("failed", error)
        self._decoding = Decoding(self.model)
        with self._changed:
            self._running = []

    def _admit(self, arrived: Sequence[Answer]) -> None:
        """Feed the prompts of new answers: alone where their beginning is known, else together."""
        together: list[Answer] = []
        for answer in arrived:
            if answer.max_new_tokens < 1:
                answer.end("length")
                continue
            self.counts["prompt_tokens"] += answer.prompt_tokens
            if answer.sampling.temperature > 0:
                answer.generator = torch.Generator(self._decoding.device)
                seed = answer.seed
                answer.generator.seed() if seed is None else answer.generator.manual_seed(seed)
            if self.prefixes.max_bytes:
                past = self.prefixes.longest(self._keys(answer))
                if past is not None:
                    answer.reused_tokens = past.length
                    self.counts["prefix_cache_hits"] += past.length
                    self._add([answer], past)
                    continue
            tokens = sum(len(other.ids) for other in (*together, answer))
            if together and tokens > FED_AT_ONCE:
                self._add(together)
                together = []
            together.append(answer)
        if together:
            self._add(together)

    def _keys(self, answer: Answer) -> numpy.ndarray:
        """What names the content at each place of its sequence, for the prefix cache."""
        return token_keys(
            answer.ids, self.model.placeholder_id, answer.image_keys, self.tokens_per_image
        )

    def _add(self, answers: list[Answer], past: KeyValues | None = None) -> None:
        try:
            self._decoding.add(answers, past)
        except Exception as error:  # such as too little memory: those that run already go on
            for answer in answers:
                answer.end("failed", error)
            return
        with self._changed:
            self._running += answers

    def _step(self) -> None:
        """One token for every sequence."""
        rows = list(self._decoding.rows)
        going_on: list[int] = []
        tokens: list[int] = []
        ended: list[tuple[Answer, str, Exception | None]] = []
        for index, (answer, token) in enumerate(zip(rows, self._choose(rows), strict=True)):
            reason, error = self._take(answer, token)
            if reason is None:
                going_on.append(index)
                tokens.append(token)
                continue
            if self.prefixes.max_bytes:
                self.prefixes.put(self._keys(answer), self._decoding.past_of(index))
            ended.append((answer, reason, error))
        if ended:
            with self._changed:
                self._running = [rows[i] for i in going_on]
            for answer, reason, error in ended:
                answer.end(reason, error)
            self._decoding.keep(going_on)
        if going_on:
            self._decoding.advance(tokens)

    def _take(self, answer: Answer, token: int) -> tuple[str | None, Exception | None]:
        """Give an answer its next token; the reason to end it, and what made it fail."""
        if answer.cancelled:
            return "cancelled", None
        if token in self.stop_ids:
            return "stop", None
        self.counts["tokens_generated"] += 1
        try:
            return answer.push(token), None
        except Exception as error:  # the filter's or the constraint's: it harms no other answer
            return "failed", error

    def _choose(self, rows: Sequence[Answer]) -> list[int]:
        """The next token of every row, by its own settings and its own generator."""
        logits = self._decoding.logits  # (rows, vocabulary)
        tokens = logits.argmax(-1).tolist() if rows else []
        for index, answer in enumerate(rows):
            sampling = answer.sampling
            if sampling.temperature or sampling.repetition_penalty != 1 or answer.constraint:
                own = penalize(logits[index], answer.ids, sampling.repetition_penalty)
                if answer.constraint is not None:
                    own = answer.constraint.allow(own)
                tokens[index] = int(choose(own[None], sampling, answer.generator))
        return tokens
