"""The tensors that LoRA owns: out by name, and strictly in again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from errors import PhiSightError
from lora.layer import LoRALinear

OWNED = ("lora_A", "lora_B", "scaling")


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """A, B and scaling of every wrapped layer, as "<module name>.lora_A", ".lora_B", ".scaling".

    Returns:
        Detached views in module order, not copies: they change with the next optimiser step.
    """
    return {
        f"{name}.{owned}": getattr(module, owned).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for owned in OWNED
    }


@torch.no_grad()
def load_lora_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the wrapped layers of `model`, which must own exactly these tensors.

    Raises:
        PhiSightError: a tensor is missing, unexpected, or of another shape or dtype. All of them
            are named, and nothing has been changed.
    """
    own = lora_state(model)
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    for name in own.keys() & state.keys():
        if describe(own[name]) != describe(state[name]):
            problems.append(f"{name} is {describe(state[name])}, not {describe(own[name])}")
    if problems:
        raise PhiSightError(
            f"LoRA weights: {', '.join(sorted(problems))}; "
            "load them into the model, rank and targets that they were trained with"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def describe(tensor: Tensor) -> str:
    """Shape and dtype as people read them: "(8, 64) float32"."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
