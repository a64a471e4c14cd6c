"""Answers that are JSON of a schema, by constrained decoding with llguidance, an optional package.

llguidance makes an automaton of a schema and a tokenizer, and gives for every step the tokens that
may come next. A schema is untrusted: it is tried in a process of its own first
(api/schema_check.py), and every step has its fuel: what exceeds it fails its own answer and no
other. No reference to another file or address is followed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import torch
from torch import Tensor

from api.errors import ApiError, bad
from assistant.caches import LeastRecentlyUsed
from errors import PhiSightError
from workers.pool import Limits, Workers, never

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from data.chat_tokenizer import FolderTokenizer

Result = TypeVar("Result")
STACK_LOCK = threading.Lock()
ANY_OBJECT: dict[str, object] = {"type": "object"}
LARGEST_SCHEMA = 128 * 1024  # characters
STACK = 64 * 2**20  # bytes; the process that tries a schema has 8
TRIED = Limits(cpu_seconds=2, wall_seconds=20.0, memory=512 << 20)
KNOWN = 1000  # schemas that were tried
# One blank at most between two values: a small model can go on with blanks for ever.
SPACING = {"whitespace_pattern": r"[ \n]?"}
NEEDED = "needs the package llguidance here (requirements-extras.txt); install it, or leave it out"


@dataclass(frozen=True)
class Schema:
    """A JSON schema as it was sent; `where` names it in errors."""

    where: str
    shape: dict[str, Any] = field(repr=False)


class JsonConstraint:
    """Holds one answer to a schema: a `Constraint` of assistant/answer.py."""

    def __init__(self, matcher: LLMatcher, where: str) -> None:
        self._matcher, self._where = matcher, where
        self._allowed = self._next()

    def allow(self, logits: Tensor) -> Tensor:
        """(vocabulary,) logits of the next token, -inf where it may not come."""
        allowed = self._allowed.to(logits.device)
        return logits.masked_fill(~allowed[: len(logits)], float("-inf"))

    def take(self, token: int) -> None:
        """Go on with a token. Raises `PhiSightError` where the schema asks too much."""
        self._matcher.consume_token(token)
        self._allowed = self._next()

    def _next(self) -> Tensor:
        """(vocabulary,) bool, which tokens may come next; the stop tokens where it may end."""
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), numpy.uint8)
        allowed = torch.from_numpy(numpy.unpackbits(bits, bitorder="little").astype(bool))
        if self._matcher.is_error() or not allowed.any():
            from api.schema_check import reason_of

            reason = reason_of(self._matcher) or "no token is left"
            raise PhiSightError(f"{self._where}: cannot be met from here ({reason}); simplify it")
        return allowed


class JsonOutput:
    """Makes the constraints of answers of one model. For many threads."""

    def __init__(
        self, tokenizer: FolderTokenizer, vocabulary: int, stop_ids: Collection[int]
    ) -> None:
        """`vocabulary`: of the model's logits; `stop_ids`: the tokens that end an answer."""
        self._of = tokenizer, vocabulary, sorted(stop_ids)
        self._tokens: LLTokenizer | None = None
        self._known: LeastRecentlyUsed[str] = LeastRecentlyUsed(KNOWN)
        self._workers = Workers(1)
        self._lock = threading.Lock()

    def constraint(self, schema: Schema, cancelled: Callable[[], bool] = never) -> JsonConstraint:
        """For one answer. Raises `ApiError` of status 400 for a schema that is not taken, and
        `Cancelled` as soon as `cancelled` says that nobody waits for it."""
        if importlib.util.find_spec("llguidance") is None:
            name = schema.where.partition(".")[0]
            raise bad(name, NEEDED, "unsupported_parameter")
        try:  # no options of the client's
            text = json.dumps(schema.shape | {"x-guidance": SPACING})
        except RecursionError:
            raise bad(schema.where, "is nested too deeply; simplify it") from None
        if len(text) > LARGEST_SCHEMA:
            reason = f"has {len(text):,} characters, over the limit of {LARGEST_SCHEMA:,}"
            raise bad(schema.where, f"{reason}; simplify it")
        self._check(text, schema.where, cancelled)
        return on_deep_stack(lambda: self._compiled(text, schema.where))

    def _check(self, text: str, where: str, cancelled: Callable[[], bool]) -> None:
        """Raises `ApiError` for a schema that does not compile within its limits."""
        from api.schema_check import try_schema

        digest = hashlib.sha256(text.encode()).digest()
        fault = self._known.get(digest)
        if fault is None:
            try:
                fault, _ = self._workers.call(
                    try_schema,
                    text.encode(),
                    name="schema",
                    remedy="simplify it",
                    cancelled=cancelled,
                    limits=TRIED,
                )
            except PhiSightError as error:
                fault = str(error).removeprefix("schema: ").removesuffix("; simplify it")
            self._known.put(digest, fault)
        if fault:
            raise bad(where, f"is not taken ({fault}); simplify it")

    def _compiled(self, text: str, where: str) -> JsonConstraint:
        from api.schema_check import compiled

        matcher = compiled(text, self._tokenizer())
        try:
            return JsonConstraint(matcher, where)
        except PhiSightError as error:
            raise ApiError(400, str(error), "invalid_value", where) from error

    def _tokenizer(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._tokens is None:
                tokenizer, vocabulary, stop_ids = self._of
                self._tokens = from_tokenizer(tokenizer.full, vocabulary, stop_ids)
            return self._tokens


def on_deep_stack(function: Callable[[], Result]) -> Result:
    """What `function` returns or raises, called on a stack of `STACK` bytes."""
    done: Future[Result] = Future()

    def call() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # raised again where it is waited for
            done.set_exception(error)

    with STACK_LOCK:  # the size is that of every thread that starts meanwhile
        former = threading.stack_size(STACK)
        try:
            threading.Thread(target=call, name="schema", daemon=True).start()
        finally:
            threading.stack_size(former)
    return done.result()
