"""Norms of gradients, and clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from errors import PhiSightError


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients as one vector: 0-dim float32, 0 where there are none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients, in place, so that their joint norm is at most `max_norm`.

    Returns:
        The norm before clipping, a 0-dim float32 tensor. If it is not finite, the gradients are
        left as they are and the caller must not step: there is nothing to rescue by scaling.

    Raises:
        PhiSightError: `max_norm` is not above 0.
    """
    if not max_norm > 0:
        raise PhiSightError(f"gradient clipping: {max_norm} is not a norm; give a number above 0")
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = torch.where(torch.isfinite(norm), factor, 1.0)  # without waiting for the GPU
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
    return norm


def owner_gradient_norms(
    named_parameters: Iterable[tuple[str, nn.Parameter]], owner_of: Callable[[str], str]
) -> dict[str, Tensor]:
    """Gradient norm by owner ("lora", "image_projector", …), 0-dim float32 each, as first seen.

    Args:
        owner_of: parameter name -> owner name.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        groups.setdefault(owner_of(name), []).append(parameter)
    return {owner: gradient_norm(parameters) for owner, parameters in groups.items()}
