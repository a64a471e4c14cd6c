"""Rows of rendered conversations -> the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from data.chat import RenderedSample
from tensors import pinned

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
    """(images, tokens, dim) float32, in the order of their slots, row by row"""
    slots: Tensor
    """(picture tokens,) int64: their places, in the order of `image_features`"""
    predicting: Tensor
    """(supervised,) int64: the places whose states predict a token that is learnt"""
    targets: Tensor
    """(supervised,) int64: those tokens"""
    lengths: Sequence[int]
    """tokens of every conversation, row after row"""
    there: Tensor
    """(tokens,) int64: the places of all that is not padding"""
    row_tokens: Sequence[int]
    """of each row, padding not counted"""
    row_keys: Sequence[int] | None = None
    """for each row a number that no other row of the run has: dropout draws by it; or None"""

    @property
    def tokens(self) -> int:
        """Padding not counted."""
        return sum(self.row_tokens)

    @property
    def has_padding(self) -> bool:
        return self.tokens < self.input_ids.numel()

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
    return Batch(
        input_ids,
        labels,
        position_ids,
        segment_ids,
        image_features,
        slots=places_of(input_ids, image_id),
        predicting=row * labels.shape[1] + column,  # the state at t predicts the token at t + 1
        targets=labels[:, 1:][learnt],
        lengths=segment_lengths(segment_ids),
        there=(segment_ids.flatten() > 0).nonzero()[:, 0],
        row_tokens=(segment_ids > 0).sum(1).tolist(),
        row_keys=row_keys,
    )


def places_of(input_ids: Tensor, image_id: int) -> Tensor:
    """Where the picture tokens of (rows, length) ids stand in the flattened rows, (n,) int64. A GPU
    has to be waited for, as their number is not known before."""
    return (input_ids.flatten() == image_id).nonzero()[:, 0]


def segment_lengths(segment_ids: Tensor) -> list[int]:
    """Tokens of every conversation, row after row."""
    rows = torch.arange(len(segment_ids), device=segment_ids.device)[:, None]
    # Two rows may end and begin with the same number, as rows of one conversation do.
    numbers = (segment_ids + rows * (segment_ids.max() + 1))[segment_ids > 0]
    return torch.unique_consecutive(numbers, return_counts=True)[1].tolist()


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
