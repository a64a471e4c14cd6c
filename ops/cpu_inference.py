"""Operations for measuring in float32 on a CPU: plain PyTorch, and 4-bit weights that are unpacked
into memory that is used again."""

from __future__ import annotations

import bitsandbytes as bnb
from torch import Tensor, nn
from torch.nn import functional

from ops.frozen import Once, at_once
from ops.nf4 import dense_weight
from ops.plain import gated, low_rank_update, packed_attention, rms_norm, rotate

__all__ = ["adapted_linear", "gated", "linear", "packed_attention", "rms_norm", "rotate"]


def linear(x: Tensor, base: nn.Linear, once: Once = at_once) -> Tensor:
    if not isinstance(base, bnb.nn.Linear4bit):
        return base(x)
    return functional.linear(x, dense_weight(base, x.dtype), base.bias)


def adapted_linear(
    x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scaling: Tensor, kept: Tensor | None,
    scale: float, once: Once = at_once,
) -> Tensor:  # fmt: skip
    return linear(x, base) + low_rank_update(x, a, b, scaling, kept, scale)
