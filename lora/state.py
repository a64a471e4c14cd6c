"""The tensors that LoRA owns: out by name, and strictly in again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lora.layer import LoRALinear
from tensors import copy_into

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


def load_lora_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the wrapped layers of `model`, which must own exactly these tensors.

    Raises:
        PhiSightError: a tensor is missing, unexpected, or of another shape or dtype. All of them
            are named, and nothing has been changed.
    """
    copy_into(
        lora_state(model),
        state,
        "LoRA weights",
        "load them into the model, rank and targets that they were trained with",
    )
