"""Wrap the named linear layers of a model in `LoRALinear`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from errors import PhiSightError
from lora.dropout import key_of
from lora.layer import LoRALinear
from lora.split import SplitLoRALinear

HEAD = "lm_head"
Fused = Mapping[str, Mapping[str, int]]
"""Last name component of a fused layer -> its parts and how many outputs each has, in order"""


def inject(
    model: nn.Module,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    dropout: float,
    generator: torch.Generator,
    rounds: bool = False,
    rank_stabilized: bool = False,
    fused: Fused | None = None,
) -> dict[str, LoRALinear]:
    """Wrap, in place, every layer whose last name component is one of `targets`, and every fused
    layer that has a part of such a name.

    Layers are wrapped in module order, and A is drawn from `generator` in that order, so a seed
    fixes every initial weight. Wrapping keeps names: `layers.0.o_proj` becomes a `LoRALinear` of
    the same name, with parameters `layers.0.o_proj.lora_A` and `.lora_B`; one of which parts are
    adapted has `layers.0.qkv_proj.q_proj.lora_A` and so on. rounds, rank_stabilized: see there.

    Returns:
        The wrapped layers by module name, in module order.

    Raises:
        PhiSightError: there are no targets, one matches nothing or no linear layer, a fused layer
            and a part of it are both named, the model has adapters already, or the rank is larger
            than every layer. Nothing is wrapped then.
    """
    fused = fused or {}
    found = find_targets(model, set(targets), fused)
    check_rank(model, found, rank, fused)
    wrapped: dict[str, LoRALinear] = {}
    for name, parts in found.items():
        parent_name, _, child_name = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        key = key_of("dropout", name)
        base = getattr(parent, child_name)
        given = (rank, alpha, dropout, generator, key, rounds, rank_stabilized)
        wrapped[name] = (
            SplitLoRALinear(base, *given, rows=fused[child_name], adapted=parts)
            if parts
            else LoRALinear(base, *given)
        )
        setattr(parent, child_name, wrapped[name])
    return wrapped


def find_targets(model: nn.Module, targets: set[str], fused: Fused) -> dict[str, set[str]]:
    """Names of the layers to wrap, in module order, each with those of its parts that are adapted;
    with none, the whole layer is. Raises as `inject` does."""
    modules = {name: module for name, module in model.named_modules() if name not in ("", HEAD)}
    adapted = [name for name, module in modules.items() if isinstance(module, LoRALinear)]
    if adapted:
        raise PhiSightError(
            f"LoRA injection: {adapted[0]} has an adapter already ({len(adapted)} layers have); "
            "inject once into a freshly loaded base model"
        )
    kinds = {name: name.rpartition(".")[2] for name in modules}
    parts = {kind: targets & fused.get(kind, {}).keys() for kind in set(kinds.values())}
    for kind in sorted(targets & {kind for kind in parts if parts[kind]}):
        raise PhiSightError(
            f"LoRA targets: {kind} and its part {min(parts[kind])} are both named; name the whole"
            f" layer, or of its parts ({', '.join(fused[kind])}) those that get an adapter"
        )
    chosen = {name: parts[kind] for name, kind in kinds.items() if kind in targets or parts[kind]}
    unmatched = targets - {kinds[name] for name in chosen} - set().union(*chosen.values())
    not_linear = [name for name in chosen if not isinstance(modules[name], nn.Linear)]
    if unmatched or not_linear or not targets:
        linear = {kinds[name] for name, m in modules.items() if isinstance(m, nn.Linear)}
        # A target that matches nothing trains nothing, and the loss curve does not show it.
        reason = f"{', '.join(sorted(unmatched)) or 'the empty list'} matches no layer"
        if HEAD in unmatched:
            reason = f"{HEAD} gets no adapter: the loss is computed from its weight as it is"
        if not_linear:
            reason = f"{not_linear[0]} is not a linear layer"
        listed = [
            f"{kind} (or its parts {', '.join(fused[kind])})" if kind in fused else kind
            for kind in sorted(linear)
        ]
        raise PhiSightError(
            f"LoRA targets: {reason}; the layers that can have one are {', '.join(listed)}"
        )
    return chosen


def check_rank(model: nn.Module, found: Mapping[str, set[str]], rank: int, fused: Fused) -> None:
    """Raise `PhiSightError` for a rank that no update of the layers can have."""
    largest = 0
    for name, parts in found.items():
        layer, rows = model.get_submodule(name), fused.get(name.rpartition(".")[2], {})
        assert isinstance(layer, nn.Linear)  # as `find_targets` made sure
        outputs = max((rows[part] for part in parts), default=layer.out_features)
        largest = max(largest, layer.in_features, outputs)
    if rank > largest:
        raise PhiSightError(
            f"--lora-rank {rank}: larger than every wrapped layer ({largest}), which no update is;"
            " give a smaller one, such as 16"
        )
