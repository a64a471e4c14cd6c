"""Many answers at once: they join the running batch, and leave it when they end.

One worker thread owns the model. Every step it reads a piece of the prompts that have come, gives
each sequence that has been read its next token, and drops those that ended or whose reader has
gone: continuous batching (Orca, OSDI 2022) with prompts in pieces (`Schedule`).
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
from assistant.ngrams import Ngrams
from assistant.prefix import PrefixCache, token_keys
from assistant.refusals import Busy, Closed
from assistant.sampling import choose, penalize
from assistant.schedule import Schedule
from errors import PhiSightError
from model.vlm import VisionLanguageModel


class Engine:
    """Takes answers from any thread; its own thread, started by the first one, decodes them.

    An answer that was begun is never in want of memory because of others: it has its place when
    there is room for the keys and values of its prompt and of all the tokens it may have.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        stop_ids: Collection[int],
        tokens_per_image: int,
        max_rows: int = 16,
        queue_limit: int = 64,
        prefix_bytes: int = 0,
        kv_bytes: int | None = None,
    ) -> None:
        """`max_rows`: sequences read and decoded at once; `queue_limit`: answers that may wait
        beside them; `prefix_bytes`: room for keys and values of conversations that may go on;
        `kv_bytes`: for those of the sequences that are read and decoded, all together."""
        self.model, self.stop_ids, self.tokens_per_image = model, stop_ids, tokens_per_image
        self.max_rows, self.queue_limit, self.kv_bytes = max_rows, queue_limit, kv_bytes
        crossing = model.language_model.config.rope.crossing
        self.prefixes = PrefixCache(prefix_bytes, crossing, tokens_per_image)
        self.counts: Counter[str] = Counter()
        self._waiting: list[Answer] = []
        self._running: list[Answer] = []
        self._schedule = Schedule()
        self._decoding: Decoding[Answer] = Decoding(model)
        self._bytes_of = model.language_model.model.empty_cache().bytes_of
        self._held = 0  # bytes of keys and values after the last step
        self._changed = threading.Condition()  # of what waits and runs, and of closing
        self._thread: threading.Thread | None = None
        self._closed = False

    def check(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raises `PhiSightError` for an answer whose keys and values can never fit."""
        needed = self._bytes_of(prompt_tokens + max_new_tokens)
        if self.kv_bytes is not None and needed > self.kv_bytes:
            raise PhiSightError(
                f"conversation: its {prompt_tokens} tokens and an answer of up to {max_new_tokens}"
                f" take {needed / 2**20:.1f} MiB of keys and values, more than the limit of"
                f" {self.kv_bytes / 2**20:.1f}; shorten it, ask for a shorter answer, or start with"
                " a larger --kv-memory"
            )

    def submit(self, *answers: Answer) -> None:
        """Queue answers; those of one call join the batch together where it has room.

        Raises `Busy`, and takes none of them, when there is no room for all, and what `check` does.
        """
        for answer in answers:
            self.check(answer.prompt_tokens, answer.max_new_tokens)
        now = time.perf_counter()
        with self._changed:
            if self._closed:
                raise Closed("assistant: is closed; load it again")
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

    @property
    def decoding(self) -> str:
        """By what a token is computed, and why, in words."""
        return self._decoding.reason

    def statistics(self) -> dict[str, float]:
        with self._changed:
            return {
                "running": len(self._running),
                "waiting": len(self._waiting),
                "prompt_tokens": self.counts["prompt_tokens"],
                "tokens_generated": self.counts["tokens_generated"],
                "prefix_cache_hits": self.counts["prefix_cache_hits"],
                "prefix_cache_bytes": self.prefixes.bytes,
                "kv_bytes": self._held,
                "kv_bytes_reserved": self._reserved(),
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
            try:
                self._tidy_queue()
                self._read()
                self._step()
            except Exception as error:  # whatever it is, readers must not wait for ever
                self._fail(error)
            self._held = self._decoding.bytes

    def _fail(self, error: Exception) -> None:
        with self._changed:
            running, self._running = self._running, []
        self._decoding = Decoding(self.model)
        for answer in running:
            answer.end("failed", error)

    def _end(self, answers: Sequence[Answer], reason: str, error: Exception | None = None) -> None:
        """End answers that wait or have a place, which is free before their readers are told."""
        with self._changed:
            self._waiting = [answer for answer in self._waiting if answer not in answers]
            self._running = [answer for answer in self._running if answer not in answers]
        for answer in answers:
            answer.end(reason, error)

    def _tidy_queue(self) -> None:
        """End those that have gone and those that need no token; see how much new ones need."""
        with self._changed:
            waiting = list(self._waiting)
        reading = [reading.row for reading in self._decoding.reading]
        gone = [answer for answer in (*waiting, *reading) if answer.cancelled]
        if gone:
            self._decoding.leave(gone)
            self._end(gone, "cancelled")
        if silent := [a for a in waiting if a.max_new_tokens < 1 and not a.cancelled]:
            self._end(silent, "length")
        for answer in waiting:
            if self.prefixes.max_bytes and not answer.looked_up:
                answer.looked_up = True
                past = self.prefixes.longest(self._keys(answer))
                answer.unread = len(answer.ids) - (past.length if past else 0)

    def _read(self) -> None:
        """Read the next pieces of prompts, in one pass; who has none left is decoded from now."""
        with self._changed:
            waiting = list(self._waiting)
        begun = [reading.row for reading in self._decoding.reading]
        chosen = self._schedule.choose(begun, waiting, self._begin)
        readings = [reading for reading in self._decoding.reading if reading.row in chosen]
        if not readings:
            return
        try:
            self._decoding.read(readings)
        except Exception as error:  # such as too little memory: those that run already go on
            self._decoding.leave(chosen)
            self._end(chosen, "failed", error)
        for reading in readings:
            reading.row.unread = reading.left

    def _reserved(self) -> int:
        """Bytes that the keys and values of all that run can come to."""
        return sum(self._bytes_of(a.prompt_tokens + a.max_new_tokens) for a in self._running)

    def _begin(self, answer: Answer) -> bool:
        """Give an answer a place and memory, if there is room."""
        most = answer.prompt_tokens + answer.max_new_tokens
        if len(self._running) == self.max_rows or (
            self.kv_bytes is not None and self._reserved() + self._bytes_of(most) > self.kv_bytes
        ):
            return False
        past = self.prefixes.longest(self._keys(answer)) if self.prefixes.max_bytes else None
        try:
            reading = self._decoding.begin(answer, past, most)
        except Exception as error:  # its pictures do not fit, or too little memory
            self._end([answer], "failed", error)
            return False
        self.counts["prompt_tokens"] += answer.prompt_tokens
        self.counts["prefix_cache_hits"] += reading.cache.length
        answer.reused_tokens = reading.cache.length
        answer.unread = reading.left
        if answer.sampling.temperature > 0:
            answer.generator = torch.Generator(self._decoding.device)
            seed = answer.seed
            answer.generator.seed() if seed is None else answer.generator.manual_seed(seed)
        if size := answer.sampling.no_repeat_ngram_size:
            answer.ngrams = Ngrams(size, self.model.placeholder_id, self.stop_ids)
        with self._changed:
            self._waiting.remove(answer)
            self._running.append(answer)
        return True

    def _keys(self, answer: Answer) -> numpy.ndarray:
        """What names the content at each place of its sequence, for the prefix cache."""
        return token_keys(
            answer.ids, self.model.placeholder_id, answer.image_keys, self.tokens_per_image
        )

    def _step(self) -> None:
        """One token for every sequence that has been read."""
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
            self._decoding.keep(going_on)
            for answer, reason, error in ended:
                self._end([answer], reason, error)
        if going_on:
            self._decoding.advance(tokens)
        for reading in self._decoding.reading:  # those that crossed to LongRoPE's long factors
            reading.row.unread = reading.left

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
            if not sampling.takes_the_likeliest or answer.constraint:
                # In transformers' order, which is that of what it is compared with.
                own = penalize(logits[index], answer.ids, sampling.repetition_penalty)
                if answer.ngrams is not None:
                    own = answer.ngrams.forbid(own, answer.ids)
                if answer.constraint is not None:
                    own = answer.constraint.allow(own)
                tokens[index] = int(choose(own[None], sampling, answer.generator))
        return tokens
