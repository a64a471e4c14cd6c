"""Sequences decoded side by side: fed, joined by others, and dropped one by one as they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from model.rope import rope_crossing
from model.vlm import VisionLanguageModel


class Row(Protocol):
    """One sequence: what was fed of it, and the features of its pictures. An `Answer` is one."""

    ids: list[int]
    """prompt and what was chosen since"""
    image_features: Tensor
    """(images, tokens, vision dim)"""


AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass
class KeyValues:
    """The keys and values of every layer, (rows, heads, length, head dim) each."""

    layers: list[tuple[Tensor, Tensor]]

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2]

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def as_cache(self) -> DynamicCache:
        """What transformers takes, over the same memory: its own `update` of an empty cache would
        copy all of it, at every token."""
        cache = DynamicCache()
        for keys, values in self.layers:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        return cache

    def row(self, index: int, start: int, end: int) -> KeyValues:
        """A copy of some positions of one row."""
        return KeyValues(
            [
                (
                    keys[index : index + 1, :, start:end].clone(),
                    values[index : index + 1, :, start:end].clone(),
                )
                for keys, values in self.layers
            ]
        )


class Decoding(Generic[AnyRow]):
    """Rows with one key-value cache, padded on the left, and the logits of their next tokens."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        self.rows: list[AnyRow] = []
        self.crossing = rope_crossing(model.language_model.config)
        self.device = next(model.parameters()).device
        self._cache: KeyValues | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)  # (rows, length), 0 where padded
        self.logits = torch.zeros(0, 0)  # (rows, vocabulary) float32

    @torch.no_grad()
    def add(self, rows: Sequence[AnyRow], past: KeyValues | None = None) -> None:
        """Feed the ids of new rows and let them take part.

        `past`: keys and values that a single row's first tokens have already; the caller vouches
        that they are of the same ids, pictures and LongRoPE factors.
        """
        joined: Decoding[AnyRow] = Decoding(self.model)
        joined.rows = list(rows)
        done = past.length if past else 0
        length = max(len(row.ids) for row in rows)
        padding = self.model.language_model.config.pad_token_id or 0
        input_ids = torch.full((len(rows), length), padding)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for index, row in enumerate(rows):
            input_ids[index, length - len(row.ids) :] = torch.tensor(row.ids)
            mask[index, length - len(row.ids) :] = 1
        input_ids = input_ids[:, done:].to(self.device)
        features = torch.cat([row.image_features for row in rows]).to(self.device)
        if done:  # the pictures of the tokens that are fed: the last ones
            slots = int((input_ids == self.model.placeholder_id).sum())
            features = features[features.shape[0] - slots // features.shape[1] :]
        joined._mask = mask.to(self.device)
        joined._cache = past
        joined._feed(self.model.embed(input_ids, features))
        self._join(joined)

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
            newest = torch.tensor([[row.ids[-1]] for row in self.rows], device=self.device)
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
            self._feed(self.model.language_model.model.embed_tokens(newest))
        for row in crossed:
            self.add([row])

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all rows but these, and take this order."""
        self.rows = [self.rows[i] for i in indices]
        if not self.rows:
            self._cache = None
            return
        chosen = torch.tensor(indices, device=self.device)
        mask = self._mask[chosen]
        start = int(mask.any(0).long().argmax())  # padding that no row is left to need
        self._mask, self.logits = mask[:, start:], self.logits[chosen]
        self._cache = KeyValues(
            [
                (keys[chosen][:, :, start:], values[chosen][:, :, start:])
                for keys, values in self._cache.layers
            ]
        )

    def past_of(self, index: int) -> KeyValues:
        """A copy of the keys and values of one row, without padding."""
        end = self._mask.shape[1]
        return self._cache.row(index, end - int(self._mask[index].sum()), end)

    def _feed(self, embeddings: Tensor) -> None:
        """(rows, new tokens, dim), the last of those that the mask tells of."""
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
        cache = self._cache.as_cache() if self._cache else DynamicCache()
        hidden = self.model.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        self._cache = KeyValues([(layer.keys, layer.values) for layer in cache.layers])
        self.logits = self.model.language_model.lm_head(hidden).float()
        # A slot for a picture that does not exist is nothing to say, however hot the sampling.
        self.logits[:, self.model.placeholder_id] = float("-inf")

    def _join(self, other: Decoding[AnyRow]) -> None:
        """Take over the rows of another decoding, behind the own ones."""
        if not self.rows:
            self.rows, self._cache = other.rows, other._cache
            self._mask, self.logits = other._mask, other.logits
            return
        length = max(self._mask.shape[1], other._mask.shape[1])

        def both(mine: Tensor, theirs: Tensor, dimension: int) -> Tensor:
            padded = []
            for tensor in (mine, theirs):
                shape = list(tensor.shape)
                shape[dimension] = length - tensor.shape[dimension]
                padded.append(torch.cat([tensor.new_zeros(shape), tensor], dim=dimension))
            return torch.cat(padded)

        self.rows = [*self.rows, *other.rows]
        self._mask = both(self._mask, other._mask, 1)
        self.logits = torch.cat([self.logits, other.logits])
        self._cache = KeyValues(
            [
                (both(keys, more_keys, 2), both(values, more_values, 2))
                for (keys, values), (more_keys, more_values) in zip(
                    self._cache.layers, other._cache.layers, strict=True
                )
            ]
        )
