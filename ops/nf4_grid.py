"""Which point of the grid of NF4 (QLoRA, arXiv:2305.14314) each weight is rounded to.

A block of weights that follow each other in a row shares a scale, its largest magnitude; each
weight becomes the nearest of 16 multiples of it. The arithmetic is bitsandbytes' own, to the bit,
on every device: a base that is quantised, a merged weight that a training rounds again and one that
an export rounds are the same numbers.

Rounded again, a rounded weight stays as it is, to the bit: the largest magnitude of a block is a
point of the grid (-1 or 1 times the scale), so the scale comes out again, and the others are within
a few units in the last place of their points, far from the middle between two.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import Tensor

CELLS = 32  # in which a point is looked up, from 0 to 1
LEAST_SCALE = 1e-38  # that is divided by; a block of zeros has the scale 0


@dataclass(frozen=True)
class FourBit:
    """An (outputs, inputs) weight on the NF4 grid."""

    codes: Tensor
    """(outputs, inputs) uint8, 0 to 15: places in the table of NF4"""
    scales: Tensor
    """(outputs, blocks) float32: what a block's codes are multiplied by"""

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def weight(self) -> Tensor:
        """What the layer multiplies by, (outputs, inputs) float32."""
        scales = self.scales.repeat_interleave(self.block, 1)
        return table(self.codes.device)[self.codes.long()] * scales

    def packed(self) -> Tensor:
        """The codes as bitsandbytes stores them, two a byte: (weights / 2, 1) uint8."""
        pairs = self.codes.reshape(-1, 2)
        return (pairs[:, :1] << 4) | pairs[:, 1:]


def unpacked(packed: Tensor, scales: Tensor, shape: torch.Size) -> FourBit:
    """The inverse of `packed`: (weights / 2, 1) uint8 and (blocks,) float32 scales, by which each
    weight of an (outputs, inputs) layer was rounded. On any device."""
    pairs = packed.reshape(-1)
    codes = torch.stack([pairs >> 4, pairs & 15], -1)
    return FourBit(codes.view(shape), scales.view(shape[0], -1))


@functools.cache  # else a GPU would be waited for each time
def table(device: torch.device) -> Tensor:
    """The 16 values of NF4 in rising order, float32; not to be changed."""
    return bnb.functional.get_4bit_type("nf4", device=device)


def nearest(values: Tensor) -> Tensor:
    """Places in the table of the points nearest to `values` (float32, past -1 and 1 the last ones),
    uint8 of their shape; of two as near, the lower one.

    Looked up, in a seventh of the time that `torch.bucketize` takes for the same numbers: a cell of
    1 / CELLS has at most one middle between two points, and no middle is so near to its ends that
    rounding while a cell is found could matter.
    """
    below, middle = cells(values.device)
    # Of what is not a number any place will do that is one: its scale is not a number either.
    cell = values.clamp(-1, 1).add_(1).mul_(CELLS).to(torch.int32).clamp_(0, 2 * CELLS).flatten()
    above = values > middle.index_select(0, cell).view(values.shape)
    return below.index_select(0, cell).view(values.shape) + above


@functools.cache
def cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell of 1 / CELLS from -1 on: how many middles between two points lie before it,
    (2 * CELLS + 1,) uint8, and the first that does not, float32."""
    grid = table(device)
    middles = (grid[:-1] + grid[1:]) / 2
    starts = torch.arange(-CELLS, CELLS + 1, device=device) / CELLS
    before = torch.bucketize(starts, middles)
    after = torch.cat([middles, middles.new_tensor([torch.inf])])
    return before.to(torch.uint8), after[before]


def round_to_nearest(weight: Tensor, block: int) -> FourBit:
    """Every weight of an (outputs, inputs) float tensor, whose rows are whole blocks, to its
    nearest point.

    Bit for bit what `bitsandbytes.functional.quantize_4bit` gives on a CPU. That loads torch's
    compiler at its first call, which takes longer than all else of a start on a small model.
    """
    blocks = weight.reshape(-1, block).float()
    scales = blocks.abs().amax(-1)
    codes = nearest(blocks * (1.0 / scales.clamp(min=LEAST_SCALE))[:, None])
    return FourBit(codes.view(weight.shape), scales.view(len(weight), -1))
