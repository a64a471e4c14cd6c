"""Where to compute and in which type, chosen and explained in one place.

"mps" is Apple's GPU, which torch reaches by Metal Performance Shaders.
"""

from __future__ import annotations

import os
import platform

import torch
from torch.nn import functional

from errors import PhiSightError
from ops.nf4_grid import round_to_nearest, unpacked

AGREES = 1e-3  # relative: float32 sums in any order are far closer, 16 bits are not


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device that `name` asks for, and what is to be told of the choice ("" for nothing).

    "auto" is a CUDA GPU where there is one, then Apple's GPU where it computes what the model
    needs (see `fault_of_mps`), else the CPU.

    Raises:
        PhiSightError: there is no such device here, or it does not compute rightly.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise PhiSightError("--device cuda: no CUDA device is visible; use --device cpu")
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    if name not in ("auto", "mps"):
        return torch.device(name), ""
    if not torch.backends.mps.is_available():
        if name == "mps":
            raise PhiSightError("--device mps: this machine has no Metal GPU; use --device cpu")
        return torch.device("cpu"), ""
    fault = fault_of_mps()
    if not fault:
        return torch.device("mps"), ""
    if name == "mps":
        raise PhiSightError(f"--device mps: {fault}; use --device cpu")
    return torch.device("cpu"), f"Apple's GPU is not used: {fault}"


def fault_of_mps() -> str:
    """Why Apple's GPU is not computed on; empty where it can be. What a training needs is tried on
    it in small, and held against the CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "torch sums no gradients of several processes there"
    try:
        here, there = probe(torch.device("cpu")), probe(torch.device("mps"))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return f"it does not compute what a training needs ({str(error).splitlines()[0]:.150})"
    for what, expected in here.items():
        found = there[what]
        if not torch.allclose(found, expected, rtol=AGREES, atol=AGREES):  # also where it is NaN
            difference = (found - expected).abs().max().item()
            return f"its {what} is off by {difference:.3g} from the CPU's"
    return ""


def probe(device: torch.device) -> dict[str, torch.Tensor]:
    """What a training does, in small, on a device, as CPU tensors: a gathered embedding, a product
    with NF4 weights, attention with a mask, the loss, and the gradient of all that."""
    generator = torch.Generator().manual_seed(0)
    table, weight = (torch.randn(shape, generator=generator) for shape in ((32, 64), (64, 64)))
    ids = torch.randint(32, (16,), generator=generator).to(device)
    rounded = round_to_nearest(weight, 64)
    packed, scales = rounded.packed().to(device), rounded.scales.flatten().to(device)
    table = table.to(device).requires_grad_()
    frozen = unpacked(packed, scales, weight.shape).weight()
    states = functional.linear(functional.silu(table[ids]), frozen)
    heads = (states * states.pow(2).mean(-1, keepdim=True).rsqrt()).view(16, 4, 16).transpose(0, 1)
    places = torch.arange(16, device=device)
    seen = functional.scaled_dot_product_attention(
        heads[None], heads[None], heads[None], attn_mask=places[:, None] >= places
    )[0]
    scores = torch.log_softmax(seen.transpose(0, 1).flatten(1) @ table.T, -1)
    loss = -scores.gather(-1, ids[:, None]).sum()
    loss.backward()
    assert table.grad is not None
    found = {"4-bit product": states, "attention": seen, "loss": loss, "gradient": table.grad}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def choose_compute_dtype(device: torch.device | str) -> tuple[torch.dtype, str]:
    """The dtype to compute in on `device`, and the reason in words for the log.

    Raises:
        PhiSightError: the device is neither a CPU nor a GPU of CUDA or Apple.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return torch.float32, "no GPU: 16-bit backward through NF4 takes a scalar path on a CPU"
    if device.type == "mps":
        return torch.float32, "Apple's GPU: float32, as nothing narrower was measured there"
    if device.type != "cuda":
        raise PhiSightError(f"device: {device.type} is not supported; choose cuda, mps or cpu")
    # Asked by capability, as `torch.cuda.is_bf16_supported` also says yes to slow emulation.
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "the GPU has bfloat16, which needs no loss scaler"
    return torch.float16, "the GPU has no bfloat16: float16 needs a loss scaler"


def name_of(device: torch.device) -> str:
    """What computes: another instruction set, or another card, rounds otherwise."""
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()}, macOS {platform.mac_ver()[0]}"
    return torch.cuda.get_device_name(device)
