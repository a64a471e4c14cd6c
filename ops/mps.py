"""Operations for Apple's GPUs: 4-bit weights unpacked in plain PyTorch; the rest is as it is.

bitsandbytes would fetch a kernel from the hub for them where the package `kernels` is installed.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional

from ops import plain
from ops.frozen import FrozenProduct, Once, at_once
from ops.nf4 import dense_weight
from ops.plain import gated, low_rank_update, packed_attention, rms_norm, rotate

__all__ = ["adapted_linear", "gated", "linear", "packed_attention", "rms_norm", "rotate", "runs_on"]


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device is one of Apple's GPUs, whatever it computes in."""
    return device.type == "mps" and dtype.is_floating_point


def linear(x: Tensor, base: nn.Linear, once: Once = at_once) -> Tensor:
    """As `ops.plain.linear`."""
    if not isinstance(base, bnb.nn.Linear4bit):
        return plain.linear(x, base, once)

    def compute() -> Tensor:
        return functional.linear(x, dense_weight(base, x.dtype), base.bias)

    return FrozenProduct.apply(x, base, compute, once)


def adapted_linear(
    x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scaling: Tensor, kept: Tensor | None,
    scale: float, once: Once = at_once,
) -> Tensor:  # fmt: skip
    """As `ops.plain.adapted_linear`."""
    result = linear(x, base, once)
    return result + low_rank_update(x, a, b, scaling, kept, scale).to(result.dtype)
