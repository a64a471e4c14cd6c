"""The merged weight, rounded to NF4 again: what a merge-aware training computes with.

An adapter's update is smaller than the steps of the grid, so rounding a merged weight afterwards
throws away much of what was learnt. Here every forward multiplies by

    NF4(dequantise(NF4 base) + scaling * B A)

with the blocks of the base and a new scale for each, so that what is trained, measured and asked is
what `export.py --requantize` writes: nothing is left to be lost. (QA-LoRA, arXiv:2309.14717, gets
there by an adapter that a group's zero point can hold, and LoftQ, arXiv:2310.08659, only begins
nearer to it; L4Q, arXiv:2402.04902, merges and rounds as here, over integers.) The gradient is that
of `ops.straight_through`.

At first B is 0, the merged weight is the base, which is on the grid already, and rounding changes
no bit of it: such a run begins where every other does.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from errors import PhiSightError
from ops.nf4 import PanelLinear, base_weight, block_of, dense_weight, layer_like
from ops.nf4_grid import FourBit, round_to_nearest
from tensors import widest

WEIGHTS_AT_ONCE = 2**21  # that are merged in float64


def check_can_round(base: nn.Linear, dropout: float) -> None:
    """Raise `PhiSightError` for a layer whose merged weight cannot be rounded in every forward.

    Dropout hides inputs from the adapter and not from the base: another weight for every row, of
    which none is the merged one.
    """
    if not isinstance(base, bnb.nn.Linear4bit):
        raise PhiSightError(
            f"--merge-rounding nf4: {type(base).__name__} is no 4-bit layer, which this is for;"
            " use --quantization nf4, or --merge-rounding none"
        )
    if dropout:
        raise PhiSightError(
            f"--merge-rounding nf4: --lora-dropout {dropout:g} makes another weight of every row;"
            " give --lora-dropout 0"
        )


@torch.no_grad()
def rounded_merge(base: bnb.nn.Linear4bit, a: Tensor, b: Tensor, scaling: Tensor) -> FourBit:
    """NF4(base + scaling * B A).

    a: (rank, inputs) float32; b: (outputs, rank) float32; scaling: 0-dim float32. Merged in float64
    and rounded to float32 before it is rounded to the grid: sums taken in another order, on another
    number of threads or another machine, then give the same codes (a weight in the middle between
    two points could fall to either side otherwise).
    """
    is_panel = isinstance(base, PanelLinear)
    weight = dense_weight(base, torch.float32) if is_panel else base_weight(base)
    if widest(a.device) != torch.float64:  # then the CPU merges
        made = _rounded(weight.cpu(), base, a.cpu(), b.cpu(), scaling.cpu())
        return FourBit(made.codes.to(a.device), made.scales.to(a.device))
    return _rounded(weight, base, a, b, scaling)


def _rounded(
    weight: Tensor, base: bnb.nn.Linear4bit, a: Tensor, b: Tensor, scaling: Tensor
) -> FourBit:
    rows = max(1, WEIGHTS_AT_ONCE // base.in_features)
    wide_a, wide_b = a.double(), b.double() * scaling
    parts = [
        round_to_nearest(torch.addmm(some.double(), factor, wide_a).float(), block_of(base))
        for some, factor in zip(weight.split(rows), wide_b.split(rows), strict=True)
    ]
    codes, scales = zip(*((part.codes, part.scales) for part in parts), strict=True)
    return FourBit(torch.cat(codes), torch.cat(scales))


def rounded_layer(base: nn.Linear, a: Tensor, b: Tensor, scaling: Tensor) -> nn.Linear:
    """A frozen 4-bit layer of `rounded_merge`, kept as `base` is: 0.56 bytes a weight (4 bits, and
    a float32 for 64 of them)."""
    assert isinstance(base, bnb.nn.Linear4bit)  # see `check_can_round`
    return layer_like(base, rounded_merge(base, a, b, scaling)).requires_grad_(False)
