"""Many answers at once: requests join the running batch, and leave it when they end.

One worker thread owns the model. Every step it takes in what has arrived, gives each sequence its
next token, and drops those that ended or whose reader has gone: continuous batching (Orca, OSDI
2022), over a cache that is padded on the left.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from assistant.decoding import Decoding, Row
from assistant.prefix import PrefixCache, token_keys
from assistant.sampling import Sampling, choose, penalize
from errors import PhiSightError
from model.cache import KeyValues
from model.vlm import VisionLanguageModel

FED_AT_ONCE = 8192  # tokens, padding included, of new requests that are fed in one pass


class Busy(PhiSightError):
    """More requests wait than the queue takes."""


@dataclass(frozen=True, eq=False)
class Request:
    """What to continue, and how. `image_keys` name the content of the pictures, in slot order."""

    input_ids: Sequence[int]
    image_features: Tensor
    """(images, tokens, vision dim)"""
    image_keys: Sequence[str]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int | None = None


class Generation:
    """One request on its way: iterate for its tokens as they come."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.finish_reason: str | None = None
        """None while it runs; "stop", "length", "cancelled" or "failed" """
        self.tokens: list[int] = []
        self.reused_tokens = 0
        """of the prompt, whose keys and values were known"""
        self.cancelled = threading.Event()
        self.submitted = time.perf_counter()
        self.seconds_to_first_token: float | None = None
        self._arrived: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[int]:
        """Raises what made the generation fail."""
        while (item := self._arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def cancel(self) -> None:
        """End within a token; of no effect once it has ended. From any thread."""
        self.cancelled.set()

    def say(self, token: int) -> None:
        if self.seconds_to_first_token is None:
            self.seconds_to_first_token = time.perf_counter() - self.submitted
        self.tokens.append(token)
        self._arrived.put(token)

    def end(self, reason: str, error: BaseException | None = None) -> None:
        self.finish_reason = reason
        self._arrived.put(error)


@dataclass(eq=False)
class Running:
    """A generation in the batch, with what names its tokens and what draws its next one."""

    generation: Generation
    row: Row
    keys: numpy.ndarray
    generator: torch.Generator | None


class Engine:
    """Takes requests from any thread; its own thread, started by the first one, decodes them."""

    def __init__(
        self,
        model: VisionLanguageModel,
        stop_ids: Collection[int],
        tokens_per_image: int,
        max_rows: int = 16,
        queue_limit: int = 64,
        prefix_bytes: int = 0,
    ) -> None:
        """`max_rows`: sequences decoded at once; `queue_limit`: requests that may wait beside
        them; `prefix_bytes`: room for keys and values of conversations that may go on."""
        self.model, self.stop_ids, self.tokens_per_image = model, stop_ids, tokens_per_image
        self.max_rows, self.queue_limit = max_rows, queue_limit
        crossing = model.language_model.config.rope.crossing
        self.prefixes = PrefixCache(prefix_bytes, crossing, tokens_per_image)
        self.counts: Counter[str] = Counter()
        self._waiting: list[Generation] = []
        self._running: list[Running] = []
        self._decoding = Decoding(model)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, request: Request) -> Generation:
        """Queue a request. Raises `Busy` when the queue is full."""
        generation = Generation(request)
        with self._changed:
            if self._closed:
                raise PhiSightError("assistant: is closed; load it again")
            for gone in [g for g in self._waiting if g.cancelled.is_set()]:
                self._waiting.remove(gone)
                gone.end("cancelled")
            if len(self._waiting) >= self.queue_limit:
                raise Busy(f"assistant: {len(self._waiting)} questions wait already; ask later")
            self._waiting.append(generation)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
                self._thread.start()
            self._changed.notify()
        return generation

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
            for generation in [*self._waiting, *(r.generation for r in self._running)]:
                generation.cancel()
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
                free = self.max_rows - len(self._running)
                arrived, self._waiting = self._waiting[:free], self._waiting[free:]
            try:
                self._admit(arrived)
                self._step()
            except Exception as error:  # whatever it is, readers must not wait for ever
                self._fail([*arrived, *(r.generation for r in self._running)], error)

    def _fail(self, generations: Sequence[Generation], error: Exception) -> None:
        for generation in dict.fromkeys(generations):
            if generation.finish_reason is None:
                generation.end("failed", error)
        self._decoding = Decoding(self.model)
        with self._changed:
            self._running = []

    def _admit(self, arrived: Sequence[Generation]) -> None:
        """Feed the prompts of new requests: alone where their beginning is known, else together."""
        together: list[Running] = []
        for generation in arrived:
            if generation.cancelled.is_set():
                generation.end("cancelled")
                continue
            request = generation.request
            if request.max_new_tokens < 1:
                generation.end("length")
                continue
            running = self._prepare(request, generation)
            self.counts["prompt_tokens"] += len(request.input_ids)
            past = self.prefixes.longest(running.keys) if self.prefixes.max_bytes else None
            if past is not None:
                generation.reused_tokens = past.length
                self.counts["prefix_cache_hits"] += past.length
                self._add([running], past)
                continue
            longest = max(len(r.row.ids) for r in (*together, running))
            if together and longest * (len(together) + 1) > FED_AT_ONCE:
                self._add(together)
                together = []
            together.append(running)
        if together:
            self._add(together)

    def _prepare(self, request: Request, generation: Generation) -> Running:
        keys = token_keys(
            request.input_ids, self.model.placeholder_id, request.image_keys, self.tokens_per_image
        )
        generator = None
        if request.sampling.temperature > 0:
            generator = torch.Generator(self._decoding.device)
            generator.seed() if request.seed is None else generator.manual_seed(request.seed)
        return Running(
            generation, Row(list(request.input_ids), request.image_features), keys, generator
        )

    def _add(self, new: list[Running], past: KeyValues | None = None) -> None:
        try:
            self._decoding.add([running.row for running in new], past)
        except Exception as error:  # such as too little memory: those that run already go on
            for running in new:
                running.generation.end("failed", error)
            return
        with self._changed:
            self._running += new

    def _step(self) -> None:
        """One token for every sequence."""
        by_row = {id(running.row): running for running in self._running}
        order = [by_row[id(row)] for row in self._decoding.rows]
        going_on: list[int] = []
        tokens: list[int] = []
        for index, (running, token) in enumerate(zip(order, self._choose(order), strict=True)):
            generation = running.generation
            if generation.cancelled.is_set():
                self._end(index, running, "cancelled")
            elif token in self.stop_ids:
                self._end(index, running, "stop")
            else:
                generation.say(token)
                self.counts["tokens_generated"] += 1
                if len(generation.tokens) == generation.request.max_new_tokens:
                    self._end(index, running, "length")
                else:
                    going_on.append(index)
                    tokens.append(token)
        if len(going_on) < len(order):
            with self._changed:
                self._running = [order[i] for i in going_on]
            self._decoding.keep(going_on)
        if going_on:
            self._decoding.advance(tokens)

    def _choose(self, order: Sequence[Running]) -> list[int]:
        """The next token of every row, by its own settings and its own generator."""
        logits = self._decoding.logits  # (rows, vocabulary)
        tokens = logits.argmax(-1).tolist() if len(order) else []
        for index, running in enumerate(order):
            sampling = running.generation.request.sampling
            if sampling.temperature or sampling.repetition_penalty != 1:
                own = penalize(logits[index], running.row.ids, sampling.repetition_penalty)
                tokens[index] = int(choose(own[None], sampling, running.generator))
        return tokens

    def _end(self, index: int, running: Running, reason: str) -> None:
        if self.prefixes.max_bytes:
            row = running.row
            fed = numpy.array(row.ids[len(running.keys) :], dtype=numpy.int64)
            self.prefixes.put(numpy.concatenate([running.keys, fed]), self._decoding.past_of(index))
        running.generation.end(reason)
