"""The product with a frozen weight as one node of the graph, whose output may be known already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from ops.nf4 import dense_weight
from ops.products import product

Once = Callable[[Callable[[], Tensor]], Tensor]
"""Takes what computes the output of a product and gives that output: computed now, or kept from
when it was computed before. See `model.recompute`."""


def at_once(compute: Callable[[], Tensor]) -> Tensor:
    """The `Once` that keeps nothing."""
    return compute()


class FrozenProduct(torch.autograd.Function):
    """compute(), which is the product of (…, inputs) `x` with the frozen weight of `base`.

    Nothing is kept for the backward but the layer itself.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: nn.Linear, compute: Callable[[], Tensor], once: Once
    ) -> Tensor:
        ctx.base = base
        return once(compute)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (gradient,) = gradients
        rows = gradient.flatten(0, -2)
        weight = dense_weight(ctx.base, gradient.dtype)
        # Of an ordinary layer, as torch itself does it, to the bit.
        is_4_bit = isinstance(ctx.base, bnb.nn.Linear4bit)
        result = product(rows, weight.T) if is_4_bit else rows @ weight
        return result.unflatten(0, gradient.shape[:-1]), None, None, None
