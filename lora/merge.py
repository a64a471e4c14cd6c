"""Fold an adapter into the weight that it was trained over."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from lora.layer import LoRALinear


@torch.no_grad()
def merged_weight(layer: LoRALinear) -> Tensor:
    """dequantise(base) + scaling * B A, as a new (out_features, in_features) float32 tensor.

    A and B were trained to correct the model that ran, and that one multiplied by the rounded NF4
    weights (arXiv:2305.14314). Merged into the original weights instead, the rounding error that
    they learned to cancel is not there, and the cancellation becomes an error of its own.
    """
    return base_weight(layer.base) + layer.scaling * (layer.lora_B @ layer.lora_A)


@torch.no_grad()
def base_weight(linear: nn.Linear) -> Tensor:
    """The (out_features, in_features) float32 weight that `linear` multiplies by, dequantised."""
    if not isinstance(linear, bnb.nn.Linear4bit):
        return linear.weight.detach().float()
    # A copy of the state, because dequantisation takes its output dtype from there, and the layer
    # goes on with its own; float32 holds code * scale without a second rounding.
    state = copy.copy(linear.weight.quant_state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(linear.weight.data, state)
