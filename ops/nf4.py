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
    packed, state = linear.weight.data, linear.weight.quant_state
    dequantise = cpu_dequantiser()
    if packed.device.type != "cpu" or dtype != torch.float32 or dequantise is None:
        return bnb.functional.dequantize_4bit(packed, state).to(dtype)
    return dequantise(packed, block_scales(state), state.blocksize, *state.shape)


def block_scales(state: bnb.functional.QuantState) -> Tensor:
    """(blocks,) float32, which nested quantisation keeps in 8 bits."""
    if not state.nested:
        return state.absmax
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


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
