"""Phi-3's layers for training on a CPU: the same numbers but for rounding, with fewer passes over
the memory and less kept for the backward. Weights and names stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.phi3.modeling_phi3 import Phi3MLP, Phi3RMSNorm

from model.attention import PackedAttention


def prepare_layers(language_model: nn.Module) -> None:
    """Give the layers of a Phi-3 the classes of this module and of `model.attention`."""
    for layer in language_model.model.layers:
        layer.self_attn.__class__ = PackedAttention
        # Another activation than silu stays with transformers' layer.
        if language_model.config.hidden_act == "silu":
            layer.mlp.__class__ = GatedMLP
    for module in language_model.modules():
        if isinstance(module, Phi3RMSNorm):
            module.__class__ = FrozenNorm


def trains_in_float32(module: nn.Module, x: Tensor) -> bool:
    """Whether this call is one that is made faster here; evaluation stays transformers' own."""
    return (
        module.training
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
    )


class FrozenNorm(Phi3RMSNorm):
    """RMSNorm (arXiv:1910.07467) whose weight is not trained."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not trains_in_float32(self, hidden_states) or self.weight.requires_grad:
            return super().forward(hidden_states)
        return Normed.apply(hidden_states, self.weight, self.variance_epsilon)


class Normed(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        squares = torch.linalg.vecdot(x, x).unsqueeze(-1)  # (…, 1)
        scale = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        weighted = gradient * weight
        # d/dx of x * scale(x): scale itself, less what x changes of it
        along = torch.linalg.vecdot(weighted, x).unsqueeze(-1).mul_(scale**3).div_(x.shape[-1])
        return weighted.mul_(scale).addcmul_(x, along, value=-1), None, None


class GatedMLP(Phi3MLP):
    """down(up * silu(gate)) (arXiv:2002.05202)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not trains_in_float32(self, hidden_states):
            return super().forward(hidden_states)
        return self.down_proj(Gated.apply(self.gate_up_proj(hidden_states)))


class Gated(torch.autograd.Function):
    """(…, gate and up) -> up * silu(gate), which is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        result = torch.empty_like(both)
        for_gate, for_up = result.chunk(2, -1)
        open_share = torch.sigmoid(gate)
        torch.mul(gradient, open_share, out=for_up)  # gradient * sigmoid
        # silu' = sigmoid * (1 + gate * (1 - sigmoid))
        torch.mul(for_up, up, out=for_gate)
        for_gate.mul_(open_share.neg_().add_(1).mul_(gate).add_(1))
        for_up.mul_(gate)
        return result
