"""Wrap the named linear layers of a model in `LoRALinear`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from errors import PhiSightError
from lora.dropout import key_of
from lora.layer import LoRALinear


def inject(
    model: nn.Module,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    dropout: float,
    generator: torch.Generator,
    rounds: bool = False,
) -> dict[str, LoRALinear]:
    """Wrap, in place, every layer whose last name component is one of `targets`.

    Layers are wrapped in module order, and A is drawn from `generator` in that order, so a seed
    fixes every initial weight. Wrapping keeps names: `layers.0.o_proj` becomes a `LoRALinear` of
    the same name, with parameters `layers.0.o_proj.lora_A` and `.lora_B`. rounds: see there.

    Returns:
        The wrapped layers by module name, in module order.

    Raises:
        PhiSightError: there are no targets, one matches nothing or no linear layer, the model has
            adapters already, or the rank is larger than every layer. Nothing is wrapped then.
    """
    targets = set(targets)
    names = find_targets(model, targets)
    layers = [layer for layer in map(model.get_submodule, names) if isinstance(layer, nn.Linear)]
    largest = max(max(layer.in_features, layer.out_features) for layer in layers)
    if rank > largest:
        raise PhiSightError(
            f"--lora-rank {rank}: larger than every wrapped layer ({largest}), which no update is;"
            " give a smaller one, such as 16"
        )
    wrapped: dict[str, LoRALinear] = {}
    for name in names:
        parent_name, _, child_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        key = key_of("dropout", name)
        wrapped[name] = LoRALinear(
            getattr(parent, child_name), rank, alpha, dropout, generator, key, rounds
        )
        setattr(parent, child_name, wrapped[name])
    return wrapped


def find_targets(model: nn.Module, targets: set[str]) -> list[str]:
    """Names of the layers to wrap, in module order. Raises as `inject` does."""
    modules = {name: module for name, module in model.named_modules() if name}
    adapted = [name for name, module in modules.items() if isinstance(module, LoRALinear)]
    if adapted:
        raise PhiSightError(
            f"LoRA injection: {adapted[0]} has an adapter already ({len(adapted)} layers have); "
            "inject once into a freshly loaded base model"
        )
    chosen = [name for name in modules if name.rpartition(".")[2] in targets]
    unmatched = targets - {name.rpartition(".")[2] for name in chosen}
    not_linear = [name for name in chosen if not isinstance(modules[name], nn.Linear)]
    if unmatched or not_linear or not targets:
        linear = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)}
        # A target that matches nothing trains nothing, and the loss curve does not show it.
        reason = f"{', '.join(sorted(unmatched)) or 'the empty list'} matches no layer"
        if not_linear:
            reason = f"{not_linear[0]} is not a linear layer"
        raise PhiSightError(
            f"LoRA targets: {reason}; "
            f"the linear layers of this model are {', '.join(sorted(linear))}"
        )
    return chosen
