"""Cross-entropy over a large vocabulary without the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops.products import product

CHUNK_LOGITS = 2**23  # logits held at a time; one larger than the caches gains nothing


def summed_cross_entropy(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over tokens, 0-dim float32.

    states: (tokens, dim); weight: the frozen (vocabulary, dim) head; targets: (tokens,) int64.
    """
    return SummedCrossEntropy.apply(states, weight, targets)


class SummedCrossEntropy(torch.autograd.Function):
    """The gradient of the states is computed beside the loss, while the logits of a few tokens are
    at hand: logits, their softmax and its gradient are never kept for the backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss = torch.zeros((), device=states.device)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        size = max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(states), size):
            here = slice(start, start + size)
            wanted = targets[here, None]
            # (tokens of the chunk, vocabulary), float32 also under a 16-bit head
            scores = torch.log_softmax(product(states[here], weight).float(), -1)
            loss -= scores.gather(-1, wanted).sum()
            if gradient is None:
                continue
            slope = scores.exp_()  # softmax - 1 at the target
            slope.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
            gradient[here] = product(slope.to(states.dtype), weight.T)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(gradient.dtype), None, None
