"""Products of tensors by the kernels: `nf4_linear`, `nf4_dequantize`, `nf4_linear_backward`, and
`dense_linear` for what is not quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.kernels import dense, products
from ops.kernels.crew import crew_of
from ops.kernels.layout import PANEL, PanelWeight
from ops.products import product

PADDING = 64  # bytes between rows: those a power of two apart would share cache lines
SMALL = 2**21  # multiplications under which one thread is done before two have begun


def threads_for(multiplications: int) -> int:
    return 1 if multiplications < SMALL else torch.get_num_threads()


def nf4_linear(x: Tensor, weight: PanelWeight) -> Tensor:
    """(rows, inputs) float32 -> (rows, outputs) float32, within `codebook.ERROR_BOUND`; without a
    gradient. A row's result is the same to the bit whatever rows come with it, on every target."""
    rows, inputs = x.shape
    x = x.contiguous()
    width = weight.panels * PANEL
    q_stride = inputs * 2 + PADDING
    blocks = inputs // weight.block
    q = torch.empty(rows * q_stride, dtype=torch.uint8)
    s = torch.empty(rows * blocks)
    y = torch.empty(rows, width)
    crew_of(threads_for(rows * inputs * width)).run(
        products.linear_task, weight.codes.data_ptr(), weight.scales.data_ptr(), weight.panels,
        blocks, weight.block, x.data_ptr(), inputs * 4, rows, q.data_ptr(), q_stride,
        s.data_ptr(), blocks * 4, y.data_ptr(), width * 4,
    )  # fmt: skip
    return y[:, : weight.outputs]


def nf4_dequantize(weight: PanelWeight, memory: Tensor | None = None) -> Tensor:
    """(outputs, inputs) float32, a transposed view: what bitsandbytes gives, to the bit.

    memory: of at least inputs * panels * 16 float32, to be used for it; None for new memory.
    """
    width = weight.panels * PANEL
    count = weight.inputs * width
    memory = torch.empty(count) if memory is None else memory[:count]
    crew_of(threads_for(count)).run(
        dense.dequantise_task, weight.codes.data_ptr(), weight.scales.data_ptr(), weight.panels,
        weight.inputs // weight.block, weight.block, memory.data_ptr(), width * 4,
    )  # fmt: skip
    return memory.view(weight.inputs, width)[:, : weight.outputs].T


def nf4_linear_backward(
    gradient: Tensor, weight: PanelWeight, memory: Tensor | None = None
) -> Tensor:
    """The gradient of `nf4_linear`'s input: (rows, outputs) float32 -> (rows, inputs) float32, by
    the dequantised weight as it is. memory: see `nf4_dequantize`."""
    return product(gradient, nf4_dequantize(weight, memory).T)


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """(rows, inputs) float32 by a contiguous (outputs, inputs) weight of float32, bfloat16 or
    float16 -> (rows, outputs) float32: exact products, summed in float32. For a few rows; `inputs`
    is a multiple of 32."""
    rows, inputs = x.shape
    x = x.contiguous()
    y = torch.empty(rows, len(weight))
    crew_of(threads_for(weight.numel())).run(
        dense.dense_task, dense.KINDS[weight.dtype], weight.data_ptr(), len(weight), inputs,
        x.data_ptr(), inputs * 4, rows, y.data_ptr(), len(weight) * 4,
    )  # fmt: skip
    return y


def use_each_once() -> None:
    """Call every compiled function, so that all are compiled."""
    x, codes = torch.ones(16, 64), torch.zeros(2, 8, PANEL, 4, dtype=torch.uint8)
    weight = PanelWeight(codes, torch.ones(2, 1, PANEL), 32, 64)
    nf4_linear(x, weight)
    nf4_dequantize(weight)
    dense_linear(x, torch.ones(32, 64))
