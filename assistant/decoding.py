"""Sequences decoded side by side: read, joined by others, and dropped one by one as they end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from data.collate import places_of
from model.cache import KeyValues
from model.compiled import compiled_for
from model.vlm import VisionLanguageModel, spliced

PIECE = 256  # tokens of a prompt that are read in one pass


class Row(Protocol):
    """One sequence: what was fed of it, and the features of its pictures. An `Answer` is one."""

    ids: list[int]
    """prompt and what was chosen since"""
    image_features: Tensor
    """(images, features, vision dim)"""


AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(eq=False)
class Reading(Generic[AnyRow]):
    """A row that is being read, piece by piece: no token can be chosen for it yet."""

    row: AnyRow
    cache: KeyValues
    """of the tokens that were read"""

    @property
    def left(self) -> int:
        """Tokens still to be read."""
        return len(self.row.ids) - self.cache.length

    @property
    def piece(self) -> int:
        """Tokens of the next piece."""
        return piece_of(len(self.row.ids), self.left)


def piece_of(total: int, unread: int) -> int:
    """Tokens that are read next of the last `unread` of a prompt. Pieces end at multiples of
    `PIECE`, whoever is read beside: a prompt is cut at the same places alone and in company."""
    return min(unread, PIECE - (total - unread) % PIECE)


class Decoding(Generic[AnyRow]):
    """Rows with a cache each, and the logits of their next tokens; and those still being read."""

    def __init__(self, model: VisionLanguageModel, compiles: bool = True) -> None:
        """`compiles`: choose what computes a token as `compiled_for` does; without, it is the
        decoder itself, and the model stays as it is: one that is being trained."""
        self.model = model
        self.decoder = model.language_model.model
        self.crossing = model.language_model.config.rope.crossing
        self.device = next(model.parameters()).device
        self.compiled, self.reason = (
            compiled_for(model.language_model) if compiles else (None, "as it is trained")
        )
        """what computes a token of every row, or None for the decoder itself; and why"""
        self.reading: list[Reading[AnyRow]] = []
        self.rows: list[AnyRow] = []
        self.caches: list[KeyValues] = []
        self.logits = torch.zeros(0, 0)  # (rows, vocabulary) float32

    @property
    def bytes(self) -> int:
        """Memory of the keys and values of all rows."""
        caches = [*self.caches, *(reading.cache for reading in self.reading)]
        return sum({id(cache.memory): cache.bytes for cache in caches}.values())

    def begin(
        self, row: AnyRow, past: KeyValues | None = None, most: int | None = None
    ) -> Reading[AnyRow]:
        """Have a row in `reading`, for `read` to go through.

        `past`: keys and values that its first tokens have already; the caller vouches that they are
        of the same ids, pictures and LongRoPE factors. `most`: tokens that it can come to. Raises
        `PhiSightError` when its pictures do not fill their slots.
        """
        self.model.slots_filled(row.ids.count(self.model.placeholder_id), row.image_features)
        cache = past.prefix(past.length, most) if past else self.decoder.empty_cache(most)
        cache.make_room(len(row.ids))
        self.reading.append(Reading(row, cache))
        return self.reading[-1]

    @torch.no_grad()
    def read(self, readings: Sequence[Reading[AnyRow]]) -> None:
        """Feed the next piece of some of `reading` in one pass; who is at its end joins `rows`."""
        if self.compiled and not self.compiled.is_current:  # an adapter was changed since
            self.compiled, self.reason = compiled_for(self.model.language_model)
        pieces = [reading.piece for reading in readings]
        embeddings = self._embedded(readings, pieces)
        ending = [index for index, r in enumerate(readings) if r.left == r.piece]
        rows = [reading.row for reading in readings]
        logits = self._feed(embeddings, pieces, [r.cache for r in readings], rows, ending)
        ended = [readings[index] for index in ending]
        self.reading = [reading for reading in self.reading if reading not in ended]
        self.rows = [*self.rows, *(reading.row for reading in ended)]
        self.caches = [*self.caches, *(reading.cache for reading in ended)]
        self.logits = torch.cat([self.logits, logits]) if len(self.logits) else logits

    def add(self, rows: Sequence[AnyRow]) -> None:
        """Read new rows to their end, and let them take part."""
        for row in rows:
            self.begin(row)
        self.read_all()

    def read_all(self) -> None:
        """Read on until nothing is left in `reading`."""
        while self.reading:
            self.read(self.reading)

    @torch.no_grad()
    def advance(self, tokens: Sequence[int]) -> None:
        """Give every row its next token, and compute the logits of the one after; a row that
        crosses to LongRoPE's long factors is read anew from its start, by `read`."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.ids.append(token)
        # From its crossing on, every position of a row turns by other factors, so its keys are of
        # no use any more.
        crossed = [i for i, row in enumerate(self.rows) if len(row.ids) - 1 == self.crossing]
        if crossed:
            again = [(self.rows[i], self.caches[i].most) for i in crossed]
            self.keep([i for i in range(len(self.rows)) if i not in crossed])
            for row, most in again:
                self.begin(row, most=most)
        if self.rows:
            newest = torch.tensor([[row.ids[-1] for row in self.rows]], device=self.device)
            embeddings = self.decoder.embed_tokens(newest)  # (1, rows, dim)
            if self.compiled:
                totals = [len(row.ids) for row in self.rows]
                logits = self.compiled.step(embeddings[0], self.caches, totals)
                self.logits = self._sayable(logits)
                return
            every = range(len(self.rows))
            self.logits = self._feed(embeddings, [1] * len(every), self.caches, self.rows, every)

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all rows but these, and take this order."""
        self.rows = [self.rows[i] for i in indices]
        self.caches = [self.caches[i] for i in indices]
        self.logits = self.logits[list(indices)]

    def leave(self, rows: Collection[AnyRow]) -> None:
        """Drop those of these rows that are being read."""
        self.reading = [reading for reading in self.reading if reading.row not in rows]

    def past_of(self, index: int) -> KeyValues:
        """The keys and values of one row, to go on from later."""
        return self.caches[index]

    def _embedded(self, readings: Sequence[Reading[AnyRow]], pieces: Sequence[int]) -> Tensor:
        """The next `pieces` of the `readings`, (1, tokens of all pieces, dim). A piece may begin
        and end within a picture, which is projected whole: each token may depend on all of it."""
        ids: list[int] = []
        features: list[Tensor] = []
        wanted: list[int] = []  # of the tokens of these pictures
        tokens = 0  # that all pictures before have
        for reading, piece in zip(readings, pieces, strict=True):
            row, start = reading.row, reading.cache.length
            new = row.ids[start : start + piece]
            ids += new
            if slots := new.count(self.model.placeholder_id):
                each = self.model.projector.tokens(row.image_features.shape[1])
                first = row.ids[:start].count(self.model.placeholder_id)
                pictures = slice(first // each, -(-(first + slots) // each))
                features.append(row.image_features[pictures])
                here = tokens + first % each
                wanted += range(here, here + slots)
                tokens += len(features[-1]) * each
        input_ids = torch.tensor([ids], device=self.device)
        embeddings = self.decoder.embed_tokens(input_ids)
        if not features:
            return embeddings
        projected = self.model.projector(torch.cat(features).to(self.device)).flatten(0, 1)
        if len(wanted) < tokens:
            projected = projected[wanted]
        return spliced(embeddings, projected, places_of(input_ids, self.model.placeholder_id))

    def _feed(
        self,
        embeddings: Tensor,
        lengths: Sequence[int],
        caches: Sequence[KeyValues],
        rows: Sequence[AnyRow],
        wanted: Sequence[int],
    ) -> Tensor:
        """(1, new tokens, dim), `lengths` of them behind each of `caches` -> the logits of the next
        token of those of `rows` that are `wanted`, (wanted, vocabulary) float32."""
        positions = torch.cat([
            torch.arange(cache.length, cache.length + length, device=self.device)
            for cache, length in zip(caches, lengths, strict=True)
        ])  # fmt: skip
        totals = [len(row.ids) for row in rows]
        hidden = self.decoder(embeddings, positions[None], lengths, caches, totals=totals)[0]
        ends = list(accumulate(lengths))
        last = torch.tensor([ends[i] - 1 for i in wanted], dtype=torch.long, device=self.device)
        return self._sayable(self.model.language_model.lm_head(hidden[last]).float())

    def _sayable(self, logits: Tensor) -> Tensor:
        """A slot for a picture that does not exist is nothing to say, however hot the sampling."""
        logits[:, self.model.placeholder_id] = float("-inf")
        return logits
