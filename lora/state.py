"""The tensors that LoRA owns: out by name, and strictly in again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lora.layer import LoRALinear
from tensors import copy_into


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """A, B and scaling of every wrapped layer, as "<module name>.lora_A", ".lora_B", ".scaling";
    where parts of it are adapted, "<module name>.q_proj.lora_A" and so on, and one scaling.

    Returns:
        Detached views in module order, not copies: they change with the next optimiser step.
    """
    return {
        f"{name}.{owned}": tensor.detach()
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for owned, tensor in module.owned().items()
    }


Named = tuple[str, str, str]
"""Names of A, of B and of the scaling of one adapter in a state"""


def adapters_in(state: Mapping[str, Tensor]) -> dict[str, Named]:
    """Name of each adapted layer or part of one -> the names of its tensors in `lora_state`'s form,
    in the order of the state. Whether they are there is for the caller to see."""
    names = dict.fromkeys(
        name.rpartition(".")[0] for name in state if name.endswith((".lora_A", ".lora_B"))
    )
    found = {}
    for name in names:
        of_layer = f"{name.rpartition('.')[0]}.scaling"  # that all parts of the layer have
        scaling = of_layer if of_layer in state else f"{name}.scaling"
        found[name] = f"{name}.lora_A", f"{name}.lora_B", scaling
    return found


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
