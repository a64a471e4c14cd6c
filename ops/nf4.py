"""The dense weight of a 4-bit layer, into memory that is used again.

bitsandbytes dequantises into a new tensor each time. On a CPU most of that goes into the memory:
for the 8192 x 3072 weights of one layer of Phi-3.5-mini, 37 ms into a new tensor and 3 ms into one
that is there already (see benchmarks/RESULTS.md). The numbers are the same to the bit.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

_memory = threading.local()  # one for each thread: another may still multiply by what it holds


def dense_weight(linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The (outputs, inputs) weight that `linear` multiplies by, detached.

    That of a 4-bit layer is valid until this thread asks for the next one.
    """
    if not isinstance(linear, bnb.nn.Linear4bit):
        return linear.weight.detach()
    weight = packed_weight(linear)
    packed, state = weight.data, weight.quant_state
    dequantise = cpu_dequantiser()
    if packed.device.type != "cpu" or dtype != torch.float32 or dequantise is None:
        return bnb.functional.dequantize_4bit(packed, state).to(dtype)
    return dequantise(packed, block_scales(state), state.blocksize, *state.shape)


def packed_weight(linear: bnb.nn.Linear4bit) -> bnb.nn.Params4bit:
    """The weight of a 4-bit layer, which bitsandbytes' own annotations call a tensor."""
    return cast(bnb.nn.Params4bit, linear.weight)


def block_scales(state: bnb.functional.QuantState) -> Tensor:
    """(blocks,) float32, which nested quantisation keeps in 8 bits."""
    if not state.nested:
        return state.absmax
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def quantised_on_cpu(weight: Tensor, blocksize: int) -> tuple[Tensor, bnb.functional.QuantState]:
    """An (outputs, inputs) weight on the CPU, whose rows are whole blocks, in NF4: two codes a
    byte, (weights / 2, 1) uint8, and their scales.

    Bit for bit what `bitsandbytes.functional.quantize_4bit` gives. That loads torch's compiler at
    its first call, which takes longer than all else of a start on a small model.
    """
    code = bnb.functional.get_4bit_type("nf4", device="cpu")  # (16,), ascending
    blocks = weight.reshape(-1, blocksize).float()
    scales = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / scales.clamp(min=1e-38))[:, None]).clamp(-1, 1).reshape(-1)
    nearest = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    packed = ((nearest[::2] << 4) | nearest[1::2])[:, None]
    state = bnb.functional.QuantState(
        absmax=scales,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=blocksize,
        code=code,
        quant_type="nf4",
    )
    return packed, state


@functools.cache
def cpu_dequantiser() -> Callable[[Tensor, Tensor, int, int, int], Tensor] | None:
    """(packed, scales, block size, outputs, inputs) -> (outputs, inputs) float32 by the function
    that bitsandbytes itself calls, or None where this installation of it has none for a CPU."""
    library = getattr(bnb.cextension.lib, "_lib", None)
    function = getattr(library, "cdequantize_blockwise_cpu_nf4_fp32", None)
    if function is None:
        return None

    def dequantise(packed: Tensor, scales: Tensor, block: int, rows: int, columns: int) -> Tensor:
        memory = getattr(_memory, "tensor", None)
        if memory is None or memory.numel() < rows * columns:
            memory = _memory.tensor = torch.empty(rows * columns)
        result = memory[: rows * columns].view(rows, columns)
        function(
            *(ctypes.c_void_p(t.data_ptr()) for t in (packed, scales, result)),
            *map(ctypes.c_longlong, (block, rows, columns)),
        )
        return result

    return dequantise
