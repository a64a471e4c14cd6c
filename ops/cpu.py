"""Operations for training in float32 on a CPU.

The same numbers as `ops.plain` but for rounding, with fewer passes over the memory and less kept
for the backward: what autograd would keep of each small operation is computed again instead.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional

from ops import plain
from ops.frozen import FrozenProduct, Once, at_once
from ops.nf4 import dense_weight, trained_product
from ops.plain import packed_attention
from ops.products import product

__all__ = ["adapted_linear", "gated", "linear", "packed_attention", "rms_norm", "rotate"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    if weight.requires_grad:  # the fused one has a gradient for x alone
        return plain.rms_norm(x, weight, epsilon)
    return RMSNorm.apply(x, weight, epsilon)


class RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        squares = torch.linalg.vecdot(x, x).unsqueeze(-1)  # (…, 1)
        scale = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        weighted = gradients[0] * weight
        # d/dx of x * scale(x): scale itself, less what x changes of it
        along = torch.linalg.vecdot(weighted, x).unsqueeze(-1).mul_(scale**3).div_(x.shape[-1])
        return weighted.mul_(scale).addcmul_(x, along, value=-1), None, None


def gated(both: Tensor) -> Tensor:
    return Gated.apply(both)


class Gated(torch.autograd.Function):
    """(…, gate and up) -> up * silu(gate), which is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        result = torch.empty_like(both)
        for_gate, for_up = result.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        torch.mul(gradients[0], sigmoid, out=for_up)  # gradient * sigmoid
        # silu' = sigmoid * (1 + gate * (1 - sigmoid))
        torch.mul(for_up, up, out=for_gate)
        for_gate.mul_(sigmoid.neg_().add_(1).mul_(gate).add_(1))
        for_up.mul_(gate)
        return result


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
    return Rotated.apply(x, cosines[:, None], sines[:, None], heads)


class Rotated(torch.autograd.Function):
    """The first `heads` heads of (tokens, heads, dim), turned by (tokens, 1, half) angles; its
    backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.heads = heads
        return rotated_copy(x, cosines, sines, heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        return rotated_copy(gradients[0], cosines, -sines, ctx.heads), None, None, None


def rotated_copy(x: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
    half = cosines.shape[-1]
    result = x.clone()
    first, second = x[:, :heads, :half], x[:, :heads, half : 2 * half]
    result[:, :heads, :half].mul_(cosines).addcmul_(second, sines, value=-1)
    result[:, :heads, half : 2 * half].mul_(cosines).addcmul_(first, sines)
    return result


def linear(x: Tensor, base: nn.Linear, once: Once = at_once) -> Tensor:
    if not isinstance(base, bnb.nn.Linear4bit):
        return plain.linear(x, base, once)

    def compute() -> Tensor:
        rows = trained_product(x.flatten(0, -2), base)
        return rows.unflatten(0, x.shape[:-1])

    return FrozenProduct.apply(x, base, compute, once)


def adapted_linear(
    x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scaling: Tensor, kept: Tensor | None,
    scale: float, once: Once = at_once,
) -> Tensor:  # fmt: skip
    result = AdaptedProduct.apply(
        x.flatten(0, -2), a, b, base, scaling.item() * scale,
        None if kept is None else kept.flatten(0, -2), once,
    )  # fmt: skip
    return result.unflatten(0, x.shape[:-1])


class AdaptedProduct(torch.autograd.Function):
    """base(x) + scaling * ((x where kept) A^T) B^T of rows of float32, as one node of the graph.

    x: (rows, inputs); A: (rank, inputs); B: (outputs, rank); kept: (rows, inputs) uint8 or None.
    Written as separate operations, it would keep the input, its mask as floats and the masked
    input, and make a tensor as large as its output four times. The weight of `base` is dequantised
    in the forward and again in the backward: kept in between, it would take eight times the memory
    of the 4-bit one.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: nn.Linear, scaling: float,
        kept: Tensor | None, once: Once,
    ) -> Tensor:  # fmt: skip
        for_a = masked(x, kept)
        low = product(for_a, a)  # (rows, rank)
        ctx.save_for_backward(for_a, a, b, low, kept)  # `x` itself is not needed again
        ctx.base, ctx.scaling = base, scaling

        def compute() -> Tensor:
            result = trained_product(x, base)
            return result.addmm_(low, b.T, alpha=scaling)

        return once(compute)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input_of_a, a, b, low, kept = ctx.saved_tensors
        (gradient,), scaling = gradients, ctx.scaling
        for_x, for_a, for_b, *_ = ctx.needs_input_grad
        low_gradient = product(gradient, b.T).mul_(scaling)  # (rows, rank)
        grad_x = grad_a = grad_b = None
        if for_b:
            grad_b = (gradient.T @ low).mul_(scaling)
        if for_a:
            grad_a = low_gradient.T @ input_of_a
        if for_x:
            grad_x = product(gradient, dense_weight(ctx.base, gradient.dtype).T)
            if kept is None:
                grad_x.addmm_(low_gradient, a)
            else:
                grad_x.addcmul_(low_gradient @ a, kept.to(grad_x.dtype))
        return grad_x, grad_a, grad_b, None, None, None, None


def masked(x: Tensor, kept: Tensor | None) -> Tensor:
    # Not `x * kept`: a product of two types makes a copy of each operand that it has to convert.
    return x if kept is None else kept.to(x.dtype).mul_(x)
