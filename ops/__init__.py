"""The decoder's operations, each by the implementation that fits where it runs.

One file a target, all with the same functions (`Operations`), and one choice: `operations_for`.

    plain.py   any device and dtype: the formulas as they are written, which the others equal
    cpu.py     training in float32 on a CPU: fewer passes over the memory, less memory
    cpu_inference.py  measuring in float32 on a CPU: 4-bit weights unpacked in place
    cpu_answering.py  answering in float32 on a CPU: 4-bit weights multiplied as they are
    cuda.py    CUDA GPUs: attention over packed rows in one kernel
    mps.py     Apple's GPUs: 4-bit weights unpacked in plain PyTorch

The room is not called "kernels": that is the name of a package that bitsandbytes and transformers
look for, and they would find this folder instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ops import cpu, cpu_answering, cpu_inference, cuda, kernels, mps, plain
from ops.frozen import Once, at_once


class Operations(Protocol):
    """What a target has to offer; see `ops.plain` for what each function computes."""

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor: ...
    def gated(self, both: Tensor) -> Tensor: ...
    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> Tensor: ...
    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None
    ) -> Tensor: ...
    def linear(self, x: Tensor, base: nn.Linear, once: Once = at_once) -> Tensor: ...
    def adapted_linear(
        self, x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scaling: Tensor,
        kept: Tensor | None, scale: float, once: Once = at_once,
    ) -> Tensor: ...  # fmt: skip


def operations_for(x: Tensor, answering: bool = False) -> Operations:
    """The operations for an input like `x`."""
    return choose(x.device, x.dtype, torch.is_grad_enabled(), answering)[0]


def choose(
    device: torch.device, dtype: torch.dtype, training: bool, answering: bool = False
) -> tuple[Operations, str]:
    """The one place where a target is chosen: the operations for a device and a dtype of
    activations, with or without a gradient; and the reason in words, for the log.

    answering: rounding may be that of the kernels (`ops.kernels.codebook`), which is finer than
    bfloat16's. What is trained and measured is exact to float32.
    """
    if device.type == "cpu" and dtype == torch.float32:
        if training:
            return cpu, "fused for float32 on a CPU"
        if answering and kernels.available()[0]:
            return cpu_answering, f"4-bit products on a CPU: {kernels.available()[1]}"
        return cpu_inference, "float32 on a CPU"
    if cuda.runs_on(device, dtype):
        return cuda, "attention by torch.nn.attention.varlen: 16 bits on a GPU of 8.0 or newer"
    if mps.runs_on(device, dtype):
        return mps, "plain PyTorch on Apple's GPU, 4-bit weights unpacked for each product"
    return plain, "plain PyTorch: nothing faster for this device and type"
