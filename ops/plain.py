"""Every operation as its formula says, in plain PyTorch, for any device and float dtype.

In the order of transformers' Phi-3, so that logits agree with it to the bit where the attention
kernel is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional

from ops.frozen import FrozenProduct, Once, at_once


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, computed in float32
    (RMSNorm, arXiv:1910.07467)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def gated(both: Tensor) -> Tensor:
    """(…, gate and up) -> up * silu(gate), half as wide (SwiGLU, arXiv:2002.05202)."""
    gate, up = both.chunk(2, -1)
    return up * functional.silu(gate)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
    """Rotary positions (arXiv:2104.09864) for the first `heads` heads of (tokens, heads, dim).

    cosines and sines: (tokens, half of the rotated dims). Dimension i of a head turns together with
    dimension i + half; dimensions past twice the half stay (partial rotary), and so do the heads
    from `heads` on, which are the values.
    """
    cosines, sines = cosines[:, None], sines[:, None]  # the same for every head
    half = cosines.shape[-1]
    turned, values = x[:, :heads], x[:, heads:]
    first, second, rest = turned.split([half, half, x.shape[-1] - 2 * half], -1)
    turned = torch.cat(
        [first * cosines - second * sines, second * cosines + first * sines, rest], -1
    )
    return torch.cat([turned, values], 1)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None = None
) -> Tensor:
    """Causal attention within each conversation of packed rows, (tokens, heads, dim) -> the same.

    `lengths`: tokens of each conversation, and of each stretch of padding, in the order of the
    flattened rows. One causal attention each: no mask as large as the square of a row is ever in
    memory, and nothing is computed for pairs that may not see each other.
    """
    by_head = (tensor.transpose(0, 1) for tensor in (query, key, value))  # (heads, tokens, dim)
    parts = zip(*(tensor.split(list(lengths), 1) for tensor in by_head), strict=True)
    return torch.cat([causal_attention(q, k, v, window).transpose(0, 1) for q, k, v in parts])


def causal_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """(heads, new tokens, dim) queries over (key-value heads, all tokens, dim) keys and values ->
    (heads, new tokens, dim). The queries belong to the last of the keys' tokens; each sees itself
    and what came before it, at most `window` tokens in all."""
    new, total = query.shape[1], key.shape[1]
    mask = None
    if (window and total > window) or 1 < new < total:
        positions = torch.arange(total, device=query.device)
        distance = positions[total - new :, None] - positions  # (new, total), 0 for itself
        mask = (distance >= 0) & (distance < (window or total))
    return functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None and new > 1,
        enable_gqa=len(query) != len(key),
    )[0]


def linear(x: Tensor, base: nn.Linear, once: Once = at_once) -> Tensor:
    """(…, inputs) -> (…, outputs) by a layer, which may be a 4-bit one. `once` keeps the output of
    a frozen one, or knows it already."""
    is_plain = once is at_once and not isinstance(base, bnb.nn.Linear4bit)  # its hooks see `x`
    if is_plain or base.weight.requires_grad or not torch.is_grad_enabled():
        return base(x)
    return FrozenProduct.apply(x, base, lambda: base(x), once)


def adapted_linear(
    x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scaling: Tensor, kept: Tensor | None,
    scale: float, once: Once = at_once,
) -> Tensor:  # fmt: skip
    """base(x) + scaling * ((x where kept, times scale) A^T) B^T (LoRA, arXiv:2106.09685).

    x: (…, inputs); a: (rank, inputs) float32; b: (outputs, rank) float32; kept: uint8 of the shape
    of x, or None for everywhere. The low-rank product is float32 whatever the dtype of x is.
    """
    result = linear(x, base, once)
    return result + low_rank_update(x, a, b, scaling, kept, scale).to(result.dtype)


def low_rank_update(
    x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, kept: Tensor | None, scale: float
) -> Tensor:
    """scaling * ((x where kept, times scale) A^T) B^T, (…, outputs) float32."""
    masked = x.to(a.dtype)
    if kept is not None:
        masked = masked * (kept * scale).to(a.dtype)
    return (masked @ a.T) @ b.T * scaling
