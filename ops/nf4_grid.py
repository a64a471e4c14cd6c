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

from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import Tensor

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


def table(device: torch.device | str) -> Tensor:
    """The 16 values of NF4 in rising order, float32."""
    return bnb.functional.get_4bit_type("nf4", device=device)


def nearest(values: Tensor, grid: Tensor) -> Tensor:
    """Places of the nearest values of a rising `grid`, int32; of two as near, the lower one."""
    return torch.bucketize(values, (grid[:-1] + grid[1:]) / 2, out_int32=True)


def round_to_nearest(weight: Tensor, block: int) -> FourBit:
    """Every weight of an (outputs, inputs) float tensor, whose rows are whole blocks, to its
    nearest point.

    Bit for bit what `bitsandbytes.functional.quantize_4bit` gives on a CPU. That loads torch's
    compiler at its first call, which takes longer than all else of a start on a small model.
    """
    blocks = weight.reshape(-1, block).float()
    scales = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / scales.clamp(min=LEAST_SCALE))[:, None]).clamp(-1, 1)
    codes = nearest(scaled, table(weight.device)).to(torch.uint8)
    return FourBit(codes.view(weight.shape), scales.view(len(weight), -1))
