"""The product with a rounded merged weight, whose gradient goes straight through the rounding.

Rounding has no useful derivative: it is 0 almost everywhere. The straight-through estimator
(arXiv:1308.3432) takes it for the identity, as quantisation-aware training with adapters does
(L4Q, arXiv:2402.04902, which merges and rounds as here; LR-QAT, arXiv:2406.06385). The slope of a
block's scale, which is its largest weight, is left out with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ops.frozen import Once
from ops.nf4 import dense_weight
from ops.products import product


def rounded_linear(
    x: Tensor, rounded: nn.Linear, a: Tensor, b: Tensor, scaling: Tensor,
    linear: Callable[[Tensor, nn.Linear], Tensor], once: Once,
) -> Tensor:  # fmt: skip
    """(…, inputs) -> (…, outputs) by the layer `rounded`, whose weight is base + scaling * B A,
    rounded; `linear` computes it.

    With a gradient, that of `x` is by the rounded weight, and those of a, (rank, inputs) float32,
    and b, (outputs, rank) float32, are as if their product had not been rounded.
    """
    if not torch.is_grad_enabled():
        return linear(x, rounded)
    return StraightThrough.apply(x, a, b, scaling, rounded, lambda: linear(x, rounded), once)


class StraightThrough(torch.autograd.Function):
    """compute(), the product of `x` with the weight of `rounded`, as one node of the graph.

    With G the gradient of W = base + scaling * B A that the product alone has, y^T x over its rows,
    that of B is scaling * G A^T and that of A is scaling * B^T G. G, as large as the weight, is
    never made: both are computed through the rank, as LoRA's are. Kept is the input; the weight is
    dequantised in the forward and again in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, rounded: nn.Linear,
        compute: Callable[[], Tensor], once: Once,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, a, b, scaling)
        ctx.rounded = rounded
        return once(compute)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, scaling = ctx.saved_tensors
        for_x, for_a, for_b, *_ = ctx.needs_input_grad
        gradient = gradients[0].flatten(0, -2)
        grad_x = grad_a = grad_b = None
        if for_x:
            weight = dense_weight(ctx.rounded, gradient.dtype)
            grad_x = product(gradient, weight.T).unflatten(0, x.shape[:-1])
        if for_a or for_b:
            rows, wide = x.flatten(0, -2).to(a.dtype), gradient.to(a.dtype)
            if for_b:
                grad_b = (wide.T @ product(rows, a)).mul_(scaling)
            if for_a:
                grad_a = product(wide, b.T).mul_(scaling).T @ rows
        return grad_x, grad_a, grad_b, None, None, None, None
