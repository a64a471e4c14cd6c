"""Fold an adapter into the weight that it was trained over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from lora.layer import LoRALinear
from ops.nf4 import base_weight


@torch.no_grad()
def merged_weight(layer: LoRALinear) -> Tensor:
    """dequantise(base) + scaling * B A, as a new (out_features, in_features) float32 tensor; where
    the layer rounds, that rounded to NF4, as it was trained.

    A and B were trained to correct the model that ran, and that one multiplied by the rounded NF4
    weights (arXiv:2305.14314). Merged into the original weights instead, the rounding error that
    they learned to cancel is not there, and the cancellation becomes an error of its own.
    """
    if layer.rounds:
        return base_weight(layer.rounded())
    a, b = layer.factors()
    return base_weight(layer.base) + layer.scaling * (b @ a)


def merged_state(model: nn.Module, adapter: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of every weight of `model`, as if it had never been quantised or
    wrapped: `layers.0.o_proj.weight` in place of a base, A and B. One at a time, as each is as
    large as its layer in full precision. Without `adapter`, the base alone: what A and B were
    trained over.
    """
    for name, computed in merged_weights(model, adapter):
        yield name, computed()


def merged_weights(
    model: nn.Module, adapter: bool = True
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The names of `merged_state` in its order, each with what computes its tensor."""
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, module in model.named_modules():
        if name.rpartition(".")[0] in wrapped:
            continue  # the base and the dropout of a layer that came before it
        linear = module.base if name in wrapped else module
        if isinstance(linear, nn.Linear):
            merged = adapter and name in wrapped
            yield (
                f"{name}.weight",
                partial(merged_weight, module) if merged else partial(base_weight, linear),
            )
            if linear.bias is not None:
                yield f"{name}.bias", linear.bias.detach().float
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{parameter_name}", parameter.detach().float
