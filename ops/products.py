"""Matrix products by the fastest kernel there is."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

FEW_ROWS = 32  # under so many, another kernel gains nothing


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 products should go through oneDNN: where there is AVX-512.

    torch takes MKL's, which on processors that are not Intel's stays with AVX2: half the speed.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(rows, inputs) by (outputs, inputs), which may be a transposed view -> (rows, outputs).

    The same as `linear` but for rounding, by the fastest kernel. It has no backward.
    """
    if (
        len(x) >= FEW_ROWS
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and onednn_is_faster()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)
