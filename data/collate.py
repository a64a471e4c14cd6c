"""Rows of rendered conversations -> the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.chat import RenderedSample

IGNORED = -100  # label of a position that is not trained on


@dataclass(frozen=True)
class Batch:
    """Packed rows: all that a model is given. `segment_ids` number the conversations of a row."""

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
    row_keys: Sequence[int] | None = None
    """for each row a number that no other row of the run has: dropout draws by it; or None"""

    @property
    def supervised_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Padding not counted."""
        return int((self.segment_ids > 0).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            self.input_ids.to(device),
            self.labels.to(device),
            self.position_ids.to(device),
            self.segment_ids.to(device),
            self.image_features.to(device),
            self.row_keys,
        )


def collate(
    rows: Sequence[Sequence[RenderedSample]],
    features_of: Callable[[str], Tensor],
    padding_id: int,
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
    return Batch(input_ids, labels, position_ids, segment_ids, stacked, row_keys)
