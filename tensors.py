"""Tensors as bytes, on their way to a device, and the one strict way to copy named tensors into
others.

Named tensors fit when the names are the same both ways, and each has the shape and the dtype of the
one that it is copied into. Nothing is copied otherwise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy
import torch
from torch import Tensor

from errors import PhiSightError


def raw_bytes(tensor: Tensor) -> numpy.ndarray:
    """The bytes of a CPU tensor in row-major order, (bytes,) uint8."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def sha256_of(tensor: Tensor) -> str:
    """The sha256 of a CPU tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor).data).hexdigest()


def pinned(tensor: Tensor) -> Tensor:
    """A CPU tensor in memory that the system does not move, from which a GPU copies by itself."""
    return tensor.pin_memory() if tensor.numel() else tensor


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A CPU tensor on `device`. The host does not wait until a GPU has finished what it has to do
    and copied the tensor, as `tensor.to(device)` does."""
    if device.type != "cuda":
        return tensor.to(device)
    return pinned(tensor).to(device, non_blocking=True)


def widest(device: torch.device) -> torch.dtype:
    """The type that sums are taken in: float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def dtype_name(tensor: Tensor) -> str:
    """ "float32", not "torch.float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def shape_and_dtype(tensor: Tensor) -> str:
    """As people read them: "(8, 64) float32"."""
    return f"{tuple(tensor.shape)} {dtype_name(tensor)}"


def as_float64(tensor: Tensor) -> Tensor:
    """A copy to compute with; a complex one gets a last dimension of 2."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(torch.float64)


def finite(value: float) -> float | None:
    """None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floats has no NaN and no infinity, found without a copy of its size."""
    return not tensor.numel() or all(math.isfinite(end.item()) for end in tensor.aminmax())


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float | None:
    """The L2 norm of the differences of the tensors of the same names; None if it is not finite."""
    squares = [
        (as_float64(tensor) - as_float64(first[name])).square().sum().item()
        for name, tensor in second.items()
    ]
    return finite(math.sqrt(sum(squares)))


def mismatches(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Why `given` cannot be copied into `own`: each name that is missing or unexpected, and each
    tensor of another shape or dtype. Empty where it can."""
    problems = [f"missing {name}" for name in own if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in own]
    for name in own.keys() & given.keys():
        mine, theirs = shape_and_dtype(own[name]), shape_and_dtype(given[name])
        if mine != theirs:
            problems.append(f"{name} is {theirs}, not {mine}")
    return sorted(problems)


def check_fit(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, remedy: str
) -> None:
    """Raise `PhiSightError`, "WHAT: every mismatch; REMEDY", unless `given` fits into `own`."""
    if problems := mismatches(own, given):
        raise PhiSightError(f"{what}: {', '.join(problems)}; {remedy}")


@torch.no_grad()
def copy_into(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, remedy: str
) -> None:
    """Copy each tensor of `given`, from any device, into the one of its name in `own`, in place.

    Raises:
        PhiSightError: they do not fit, see `check_fit`; nothing has been changed.
    """
    check_fit(own, given, what, remedy)
    for name, tensor in own.items():
        tensor.copy_(given[name])
