"""Rows of rendered conversations -> the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.chat import RenderedSample

IGNORED = -100  # label of a position that is not trained on


@dataclass(frozen=True)
class Batch:
    """Packed rows. `segment_ids` number the conversations of a row from 1; 0 is padding.

    input_ids, labels, position_ids, segment_ids: (rows, length) int64; labels are `IGNORED` where
    nothing is supervised, else the token that stands at that very position.
    image_features: (images, tokens, dim) float, in the order of their slots, row by row.
    row_keys: a number for each row that no other row of the run has, or None; dropout draws by it.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    image_features: Tensor
    row_keys: Sequence[int] | None = None

    @property
    def supervised_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def tokens(self) -> int:
        return int((self.segment_ids > 0).sum())

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            **{
                name: value.to(device)
                for name, value in vars(self).items()
                if isinstance(value, Tensor)
            },
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
