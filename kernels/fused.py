"""A frozen layer and its adapter as one node of the graph, for training in float32 on a CPU.

Written as separate operations, `LoRALinear` keeps the input, its dropout mask as floats and the
masked input for the backward, and makes a tensor as large as its output four times. As one node it
keeps the input and the mask in bytes, and the adapter adds into the output of the base.
"""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes as bnb
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


def dense_weight(linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The (outputs, inputs) weight that `linear` multiplies by."""
    if not isinstance(linear, bnb.nn.Linear4bit):
        return linear.weight.detach()
    state = linear.weight.quant_state
    return bnb.functional.dequantize_4bit(linear.weight.data, state).to(dtype)


class AdaptedProduct(torch.autograd.Function):
    """base(x) + scaling * ((x where kept) A^T) B^T of rows of float32.

    x: (rows, inputs); A: (rank, inputs); B: (outputs, rank); kept: (rows, inputs) uint8 or None.
    The weight of `base` is dequantised in the forward and again in the backward: kept in between,
    it would take eight times the memory of the 4-bit one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        base: nn.Linear,
        scaling: float,
        kept: Tensor | None,
    ) -> Tensor:
        result = product(x, dense_weight(base, x.dtype), base.bias)
        low = product(masked(x, kept), a)  # (rows, rank)
        ctx.save_for_backward(x, a, b, low, kept)
        ctx.base, ctx.scaling = base, scaling
        return result.addmm_(low, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low, kept = ctx.saved_tensors
        scaling, (for_x, for_a, for_b, *_) = ctx.scaling, ctx.needs_input_grad
        low_gradient = product(gradient, b.T).mul_(scaling)  # (rows, rank)
        grad_x = grad_a = grad_b = None
        if for_b:
            grad_b = (gradient.T @ low).mul_(scaling)
        if for_a:
            grad_a = low_gradient.T @ masked(x, kept)
        if for_x:
            grad_x = product(gradient, dense_weight(ctx.base, gradient.dtype).T)
            grad_x += masked(low_gradient @ a, kept)
        return grad_x, grad_a, grad_b, None, None, None


def masked(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x * kept
