"""Phi-3's attention over packed rows in training on a CPU: each conversation by itself.

A mask over a row costs the square of the row, most of it for pairs that may not see each other.
Here each conversation is a causal attention of its own, which costs half its own square and needs
no mask. Queries, keys and values are turned in one operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.phi3.modeling_phi3 import Phi3Attention


class PackedAttention(Phi3Attention):
    """Phi3Attention, which takes `segment_lengths` as well: the tokens of each conversation, of the
    padding too, in the order of the flattened rows. Without them nothing is different."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        segment_lengths: Sequence[int] | None = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if segment_lengths is None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **settings
            )
        heads, keys = self.config.num_attention_heads, self.config.num_key_value_heads
        projected = self.qkv_proj(hidden_states)
        projected = projected.view(-1, heads + 2 * keys, self.head_dim)  # (tokens, heads, dim)
        cos, sin = (part.flatten(0, 1)[:, None] for part in position_embeddings)
        turned = Turned.apply(projected, cos, sin, heads + keys)
        mixed = [
            scaled_dot_product_attention(
                *(part[None].transpose(1, 2) for part in segment.split([heads, keys, keys], 1)),
                is_causal=True,
                scale=self.scaling,
                enable_gqa=heads != keys,
            )[0].transpose(0, 1)  # (tokens of the segment, heads, dim)
            for segment in turned.split(list(segment_lengths))
        ]
        mixed = torch.cat(mixed).view(*hidden_states.shape[:-1], heads * self.head_dim)
        return self.o_proj(mixed), None


class Turned(torch.autograd.Function):
    """Rotary positions (arXiv:2104.09864) for the first `count` heads of (tokens, heads, dim).

    cos and sin: (tokens, 1, turned dim), the second half like the first; dims past it stay.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.count = count
        return turn(x, cos, sin, count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turn(gradient, cos, -sin, ctx.count), None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, count: int) -> Tensor:
    """x with the first `count` heads turned by the angle of these cos and sin."""
    half = cos.shape[-1] // 2
    turned = x.clone()
    first, second = x[:, :count, :half], x[:, :count, half : 2 * half]
    cos, sin = cos[..., :half], sin[..., :half]
    turned[:, :count, :half].mul_(cos).addcmul_(second, sin, value=-1)
    turned[:, :count, half : 2 * half].mul_(cos).addcmul_(first, sin)
    return turned
