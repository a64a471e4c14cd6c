"""Sequences decoded side by side: fed, joined by others, and dropped one by one as they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import KeyValues
from model.vlm import VisionLanguageModel


@dataclass(eq=False)
class Row:
    """One sequence: what was fed of it, and the features of its pictures."""

    ids: list[int]
    """prompt and what was chosen since"""
    image_features: Tensor
    """(images, tokens, vision dim)"""


class Decoding:
    """Rows with a cache each, and the logits of their next tokens."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        self.decoder = model.language_model.model
        self.crossing = model.language_model.config.rope.crossing
        self.device = next(model.parameters()).device
        self.rows: list[Row] = []
        self.caches: list[KeyValues] = []
        self.logits = torch.zeros(0, 0)  # (rows, vocabulary) float32

    @torch.no_grad()
    def add(self, rows: Sequence[Row], past: KeyValues | None = None) -> None:
        """Feed the ids of new rows and let them take part.

        `past`: keys and values that a single row's first tokens have already; the caller vouches
        that they are of the same ids, pictures and LongRoPE factors.
        """
        caches = [past] if past else [self.decoder.empty_cache() for _ in rows]
        new = [row.ids[cache.length :] for row, cache in zip(rows, caches, strict=True)]
        input_ids = torch.tensor([sum(new, [])], device=self.device)  # (1, all new tokens)
        features = torch.cat([row.image_features for row in rows]).to(self.device)
        if past:  # the pictures of the tokens that are fed: the last ones
            slots = int((input_ids == self.model.placeholder_id).sum())
            features = features[features.shape[0] - slots // features.shape[1] :]
        logits = self._feed(
            self.model.embed(input_ids, features), [len(ids) for ids in new], caches
        )
        self.rows, self.caches = [*self.rows, *rows], [*self.caches, *caches]
        self.logits = torch.cat([self.logits, logits]) if len(self.logits) else logits

    @torch.no_grad()
    def advance(self, tokens: Sequence[int]) -> None:
        """Give every row its next token, and compute the logits of the one after."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.ids.append(token)
        # From its crossing on, every position of a row turns by other factors, so its keys are of
        # no use any more: such a row is fed again from its start.
        crossed = [row for row in self.rows if len(row.ids) - 1 == self.crossing]
        if crossed:
            self.keep([i for i, row in enumerate(self.rows) if row not in crossed])
        if self.rows:
            newest = torch.tensor([[row.ids[-1] for row in self.rows]], device=self.device)
            embeddings = self.decoder.embed_tokens(newest)  # (1, rows, dim)
            self.logits = self._feed(embeddings, [1] * len(self.rows), self.caches)
        for row in crossed:
            self.add([row])

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all rows but these, and take this order."""
        self.rows = [self.rows[i] for i in indices]
        self.caches = [self.caches[i] for i in indices]
        self.logits = self.logits[list(indices)]

    def past_of(self, index: int) -> KeyValues:
        """The keys and values of one row, to go on from later."""
        return self.caches[index]

    def _feed(
        self, embeddings: Tensor, lengths: Sequence[int], caches: Sequence[KeyValues]
    ) -> Tensor:
        """(1, new tokens, dim), `lengths` of them behind each of `caches` -> the logits of each
        one's next token, (rows, vocabulary) float32."""
        positions = torch.cat([
            torch.arange(cache.length, cache.length + length, device=self.device)
            for cache, length in zip(caches, lengths, strict=True)
        ])  # fmt: skip
        hidden = self.decoder(embeddings, positions[None], lengths, caches)[0]  # (new tokens, dim)
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        logits = self.model.language_model.lm_head(hidden[last]).float()
        # A slot for a picture that does not exist is nothing to say, however hot the sampling.
        logits[:, self.model.placeholder_id] = float("-inf")
        return logits
