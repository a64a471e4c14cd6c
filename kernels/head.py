"""Cross-entropy over a large vocabulary without the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.fused import product

CHUNK_LOGITS = 2**23  # logits held at a time; a chunk larger than the caches is no faster


class SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy summed over tokens: (tokens, dim) states, a frozen (vocabulary, dim) head.

    The gradient of the states is computed beside the loss, while the logits of a few tokens are at
    hand: logits, their softmax and its gradient are never kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden)
        size = max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(hidden), size):
            here = slice(start, start + size)
            wanted = targets[here, None]
            # (tokens of the chunk, vocabulary), float32 also under a 16-bit head
            scores = torch.log_softmax(product(hidden[here], weight).float(), -1)
            loss -= scores.gather(-1, wanted).sum()
            slope = scores.exp_()  # softmax - 1 at the target
            slope.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
            gradient[here] = product(slope.to(hidden.dtype), weight.T)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer).to(gradient.dtype), None, None
