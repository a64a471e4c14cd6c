"""Operations for answering in float32 on a CPU: products with 4-bit weights by the kernels, which
do not dequantise them; the rest is as in `ops.cpu_inference`."""

from __future__ import annotations

from torch import Tensor, nn

from ops import cpu_inference
from ops.cpu_inference import gated, packed_attention, rms_norm, rotate
from ops.frozen import Once, at_once
from ops.nf4 import PanelLinear, quick_product
from ops.plain import low_rank_update

__all__ = ["adapted_linear", "gated", "linear", "packed_attention", "rms_norm", "rotate"]


def linear(x: Tensor, base: nn.Linear, once: Once = at_once) -> Tensor:
    if isinstance(base, PanelLinear):
        return quick_product(x, base)
    return cpu_inference.linear(x, base)


def adapted_linear(
    x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scaling: Tensor, kept: Tensor | None,
    scale: float, once: Once = at_once,
) -> Tensor:  # fmt: skip
    return linear(x, base) + low_rank_update(x, a, b, scaling, kept, scale)
