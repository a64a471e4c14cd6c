"""Rows of rendered conversations -> the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from data.chat import RenderedSample
from tensors import pinned

ROUND = 64
"""Tokens: what is computed comes in multiples of it. A library that has compiled its products for a
shape keeps them, so that a new shape in each step would take time and memory without an end."""
IGNORED = -100  # label of a position that is not trained on


@dataclass(frozen=True)
class Batch:
    """Packed rows: all that a model is given. `segment_ids` number the conversations of a row.

    `batch_of` makes one. How many, how long and where are found out when it is made, on the CPU:
    to ask a tensor on a GPU is to wait for all that the GPU has still to do. Places are those in
    the flattened rows, row x length + column.
    """

    input_ids: Tensor
    """(rows, length) int64; what stands behind a row's last conversation is padding"""
    labels: Tensor
    """(rows, length) int64: the token that stands at that very position where it is learnt to be
    predicted, else `IGNORED`"""
    position_ids: Tensor
    """(rows, length) int64, from 0 in every conversation; 0 on padding"""
    segment_ids: Tensor
    """(rows, length) int64: 1, 2... for a row's conversations, 0 for padding"""
    image_features: Tensor
    """(images, features, dim) float32, in the order of their slots, row by row; the projector makes
    as many tokens of each picture as it has slots"""
    slots: Tensor
    """(picture tokens,) int64: their places, in the order of `image_features`"""
    row_slots: Sequence[int]
    """of each row, how many picture tokens it has"""
    predicting: Tensor
    """(supervised,) int64: the places whose states predict a token that is learnt"""
    targets: Tensor
    """(supervised,) int64: those tokens"""
    computed: Tensor
    """(tokens,) int64: the places for which states are computed, row by row: all that is not
    padding, and as much of that as makes a multiple of `ROUND`"""
    row_tokens: Sequence[int]
    """of each row, how many places those are, from its first one on"""
    lengths: Sequence[int]
    """tokens of every conversation, and of the padding that is computed, row after row"""
    tokens: int
    """padding not counted"""
    row_keys: Sequence[int] | None = None
    """for each row a number that no other row of the run has: dropout draws by it; or None"""

    @property
    def leaves_out(self) -> bool:
        """Whether there is padding for which nothing is computed."""
        return len(self.computed) < self.input_ids.numel()

    @property
    def supervised_tokens(self) -> int:
        return self.targets.numel()

    def pinned(self) -> Batch:
        """The same batch, on the CPU, in memory from which a GPU copies while the host goes on."""
        return self._with(pinned)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; if it is `pinned`, nobody waits for that."""
        on_gpu = device.type == "cuda"  # the other way, a tensor could be read too early
        return self._with(lambda tensor: tensor.to(device, non_blocking=on_gpu))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        changed: dict[str, Any] = {n: change(v) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)


def batch_of(
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    segment_ids: Tensor,
    image_features: Tensor,
    image_id: int,
    row_keys: Sequence[int] | None = None,
) -> Batch:
    """The batch of these tensors on the CPU, as `Batch` has them; `image_id` stands in the slots of
    pictures. A token in the first column is never learnt: nothing stands before it."""
    learnt = labels[:, 1:] != IGNORED  # (rows, length - 1)
    row, column = learnt.nonzero(as_tuple=True)
    row_tokens = rows_to_compute(segment_ids)
    length = labels.shape[1]
    return Batch(
        input_ids,
        labels,
        position_ids,
        segment_ids,
        image_features,
        slots=places_of(input_ids, image_id),
        row_slots=(input_ids == image_id).sum(1).tolist(),
        predicting=row * length + column,  # the state at t predicts the token at t + 1
        targets=labels[:, 1:][learnt],
        computed=torch.cat(
            [
                torch.arange(length * number, length * number + count)
                for number, count in enumerate(row_tokens)
            ]
        ),
        row_tokens=row_tokens,
        lengths=segment_lengths(segment_ids, row_tokens),
        tokens=int((segment_ids > 0).sum()),
        row_keys=row_keys,
    )


def places_of(input_ids: Tensor, image_id: int) -> Tensor:
    """Where the picture tokens of (rows, length) ids stand in the flattened rows, (n,) int64. A GPU
    has to be waited for, as their number is not known before."""
    return (input_ids.flatten() == image_id).nonzero()[:, 0]


def rows_to_compute(segment_ids: Tensor) -> list[int]:
    """How many places of each row of (rows, length) are computed: its tokens, and padding behind
    them until all together are a multiple of `ROUND`, as far as there is any."""
    rows = (segment_ids > 0).sum(1).tolist()
    missing = -sum(rows) % ROUND
    for number, tokens in enumerate(rows):
        more = min(missing, segment_ids.shape[1] - tokens)
        rows[number], missing = tokens + more, missing - more
    return rows


def segment_lengths(segment_ids: Tensor, row_tokens: Sequence[int]) -> list[int]:
    """Tokens of every conversation, and of the padding behind the last one, in the first
    `row_tokens` places of each row."""
    lengths: list[int] = []
    for row, count in zip(segment_ids, row_tokens, strict=True):
        lengths += torch.unique_consecutive(row[:count], return_counts=True)[1].tolist()
    return lengths


def collate(
    rows: Sequence[Sequence[RenderedSample]],
    features_of: Callable[[str], Tensor],
    padding_id: int,
    image_id: int,
    feature_shape: tuple[int, int],
    row_tokens: int = 0,
    row_keys: Sequence[int] | None = None,
) -> Batch:
    """Lay conversations end to end in their rows and pad to `row_tokens`, or to the longest row.

    `features_of` gives the (tokens, dim) features of a picture by its name; `feature_shape` is that
    shape, needed where a batch has no picture at all.
    """
    length = row_tokens or max(sum(len(sample.input_ids) for sample in row) for row in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, padding_id)
    labels = torch.full(shape, IGNORED)
    position_ids = torch.zeros(shape, dtype=torch.long)
    segment_ids = torch.zeros(shape, dtype=torch.long)
    features: list[Tensor] = []
    for row, samples in enumerate(rows):
        start = 0
        for segment, sample in enumerate(samples, start=1):
            ids = torch.tensor(sample.input_ids)
            here = slice(start, start + len(ids))
            input_ids[row, here] = ids
            labels[row, here] = ids.where(torch.tensor(sample.supervised), torch.tensor(IGNORED))
            position_ids[row, here] = torch.arange(len(ids))
            segment_ids[row, here] = segment
            features += [features_of(name) for name in sample.images]
            start += len(ids)
    stacked = torch.stack(features) if features else torch.zeros(0, *feature_shape)
    return batch_of(input_ids, labels, position_ids, segment_ids, stacked, image_id, row_keys)
