"""Patches of a picture as the grid that they are: row by row, as many rows as columns."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def side_of(tokens: int) -> int | None:
    """How many rows and columns so many patches make, or None where they make no square."""
    side = math.isqrt(tokens)
    return side if side * side == tokens else None


def blocks_of(patches: Tensor, side: int) -> Tensor:
    """(pictures, patches, dim), row by row -> each block of `side` by `side` neighbours,
    (pictures, blocks, side * side, dim), both row by row. `side` divides the grid's."""
    pictures, count, dim = patches.shape
    across = math.isqrt(count) // side
    grid = patches.reshape(pictures, across, side, across, side, dim).transpose(2, 3)
    return grid.reshape(pictures, across * across, side * side, dim)


@lru_cache(maxsize=8)
def positions(side: int, dim: int, device: torch.device) -> Tensor:
    """(side * side, dim) float32: sines and cosines (arXiv:1706.03762) of the column in the first
    half of the numbers and of the row in the second, row by row, as MAE (arXiv:2111.06377) has
    them."""
    rates = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    along = torch.cat([angles.sin(), angles.cos()], 1)  # (side, dim / 2)
    both = torch.cat([along.repeat(side, 1), along.repeat_interleave(side, 0)], 1)
    return both.float().to(device)
