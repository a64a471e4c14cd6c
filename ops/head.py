"""The head: states -> logits over a large vocabulary, and their cross-entropy without the logits of
all tokens at once.

A head in 16 bits under float32 states is multiplied as float32: every 16-bit number is one, so that
nothing is rounded but the sums. It is widened slice by slice into memory that is used again, and so
is read from the memory at half of what a float32 head would take, and held in half.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ops.products import product

CHUNK_LOGITS = 2**23  # logits held at a time; one larger than the caches gains nothing
SLICE_WEIGHTS = 2**20  # of a head that are widened at a time: 4 MiB, which stay in the caches

_memory = threading.local()  # one for each thread: another may still multiply by what it holds


def head_logits(states: Tensor, weight: Tensor) -> Tensor:
    """(…, dim) states -> (…, vocabulary) logits in the states' dtype.

    weight: the (vocabulary, dim) head, in the states' dtype, or frozen in 16 bits under float32
    states. Exact to the rounding of float32 sums.
    """
    if states.dtype == weight.dtype:
        return functional.linear(states, weight)
    return WidenedProduct.apply(states.flatten(0, -2), weight).unflatten(0, states.shape[:-1])


class WidenedProduct(torch.autograd.Function):
    """(rows, dim) float32 by a frozen (vocabulary, dim) head of 16 bits -> (rows, vocabulary)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return times_head(states, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        assert not ctx.needs_input_grad[1], "a head in 16 bits is frozen"
        return times_transposed_head(gradients[0], *ctx.saved_tensors), None


def widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(which rows, these rows in `dtype`) of a (vocabulary, dim) head; valid until the next ones.
    A head that has the dtype comes whole."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    dim, rows = weight.shape[1], max(1, SLICE_WEIGHTS // weight.shape[1])
    rows = min(rows, len(weight))
    memory = getattr(_memory, "tensor", torch.empty(0))
    if memory.numel() < rows * dim or (memory.dtype, memory.device) != (dtype, weight.device):
        memory = _memory.tensor = torch.empty(rows * dim, dtype=dtype, device=weight.device)
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        yield slice(start, start + rows), memory[: part.numel()].view_as(part).copy_(part)


def times_head(states: Tensor, weight: Tensor) -> Tensor:
    """(rows, dim) -> (rows, vocabulary), in the states' dtype; it has no backward."""
    if states.dtype == weight.dtype:
        return product(states, weight)
    result = states.new_empty(len(states), len(weight))
    if not len(states):  # a piece of a prompt that ends nowhere: the head is not read for it
        return result
    for here, wide in widened(weight, states.dtype):
        result[:, here] = product(states, wide)
    return result


def times_transposed_head(gradient: Tensor, weight: Tensor) -> Tensor:
    """(rows, vocabulary) -> (rows, dim), in the gradient's dtype; it has no backward."""
    if gradient.dtype == weight.dtype:
        return product(gradient, weight.T)
    result = gradient.new_zeros(len(gradient), weight.shape[1])
    for here, wide in widened(weight, gradient.dtype):
        result.addmm_(gradient[:, here], wide)
    return result


def summed_cross_entropy(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over tokens, 0-dim float32.

    states: (tokens, dim); weight: the frozen (vocabulary, dim) head, see `head_logits`; targets:
    (tokens,) int64.
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
            scores = torch.log_softmax(times_head(states[here], weight).float(), -1)
            loss -= scores.gather(-1, wanted).sum()
            if gradient is None:
                continue
            slope = scores.exp_()  # softmax - 1 at the target
            slope.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=slope.dtype))
            gradient[here] = times_transposed_head(slope.to(states.dtype), weight)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(gradient.dtype), None, None
