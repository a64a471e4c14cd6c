"""4-bit layers: products with them, and their weights, dense and packed.

A layer is bitsandbytes' own `Linear4bit`, or a `PanelLinear`, whose codes lie in the order that the
CPU's kernels read (`ops.kernels`). Dense weights go into memory that is used again: most of what
bitsandbytes takes on a CPU goes into new memory, for the 8192 x 3072 weights of one layer of
Phi-3.5-mini 37 ms of 40 (see benchmarks/RESULTS.md). The numbers are the same to the bit.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import threading
from collections.abc import Callable
from typing import cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from ops import kernels
from ops.nf4_grid import FourBit, round_to_nearest, table, unpacked
from ops.products import product

_memory = threading.local()  # one for each thread: another may still multiply by what it holds


class PanelLinear(bnb.nn.Linear4bit):
    """A 4-bit layer on a CPU whose codes are in the order of the kernels.

    Its `weight` are the codes in the kernels' order, so what would read them as bitsandbytes' finds
    no `quant_state`; `bitsandbytes_form` gives these back, to the bit.
    """

    panels: kernels.PanelWeight
    by_integers = False
    """whether the forward of a training is that of answering; see `trained_product`"""

    @classmethod
    def of(cls, linear: bnb.nn.Linear4bit) -> PanelLinear:
        """From a quantised layer where `uses_panels`. Nested scales are taken as they come out."""
        weight = packed_weight(linear)
        state = weight.quant_state
        outputs, inputs = state.shape
        scales = block_scales(state)
        panels = kernels.panels_of(weight.data, scales, outputs, inputs, state.blocksize)
        return cls.made_of(panels, linear)

    @classmethod
    def made_of(cls, panels: kernels.PanelWeight, like: bnb.nn.Linear4bit) -> PanelLinear:
        """Of codes that are in order, with the bias of `like`."""
        layer = cls(panels.inputs, panels.outputs, bias=False, device="meta")
        layer.bias = like.bias
        layer.hold(panels)
        return layer

    def hold(self, panels: kernels.PanelWeight) -> None:
        """Take these for its own."""
        self.panels = panels
        self.weight = nn.Parameter(panels.codes, requires_grad=False)
        count = panels.outputs * panels.inputs
        self.weight.weight_count = count  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) float32 -> (…, outputs) float32, exact; without a gradient, for which
        `ops.frozen.FrozenProduct` is there."""
        if x.requires_grad and torch.is_grad_enabled():
            raise TypeError("PanelLinear: has no gradient by itself; call ops' linear")
        rows = product(x.flatten(0, -2), dense_weight(self, x.dtype), self.bias)
        return rows.unflatten(0, x.shape[:-1])


def trained_product(x: Tensor, linear: nn.Linear) -> Tensor:
    """(rows, inputs) -> (rows, outputs) by a frozen layer in a training: exact to float32, unless
    the layer is to multiply by integers; without a gradient."""
    if isinstance(linear, PanelLinear) and linear.by_integers:
        return quick_product(x, linear)
    return product(x, dense_weight(linear, x.dtype), linear.bias)


def quick_product(x: Tensor, linear: PanelLinear) -> Tensor:
    """(…, inputs) float32 -> (…, outputs) float32 without dequantising, within
    `ops.kernels.codebook.ERROR_BOUND`; without a gradient."""
    result = kernels.loaded().nf4_linear(x.flatten(0, -2), linear.panels)
    result = result.unflatten(0, x.shape[:-1])
    return result if linear.bias is None else result + linear.bias


def uses_panels(device: torch.device, compute_dtype: torch.dtype) -> bool:
    """Whether 4-bit layers are kept in the order of the kernels: on a CPU that has them."""
    return device.type == "cpu" and compute_dtype == torch.float32 and bool(kernels.available()[0])


def bitsandbytes_form(linear: bnb.nn.Linear4bit) -> tuple[Tensor, bnb.functional.QuantState]:
    """A 4-bit layer's packed codes, (weights / 2, 1) uint8, and their state, in bitsandbytes' own
    order; of a `PanelLinear` a copy, with scales that are not nested."""
    if not isinstance(linear, PanelLinear):
        return linear.weight.data, packed_weight(linear).quant_state
    codes, scales = kernels.bitsandbytes_order(linear.panels)
    shape = torch.Size((linear.panels.outputs, linear.panels.inputs))
    return codes, quant_state(scales, shape, torch.float32, linear.panels.block)


def dense_weight(linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The (outputs, inputs) weight that `linear` multiplies by, detached.

    That of a 4-bit layer is valid until this thread asks for the next one, and of a `PanelLinear`
    it is a transposed view.
    """
    if not isinstance(linear, bnb.nn.Linear4bit):
        return linear.weight.detach()
    if isinstance(linear, PanelLinear):
        count = linear.panels.inputs * linear.panels.panels * kernels.PANEL
        return kernels.loaded().nf4_dequantize(linear.panels, memory_for(count)).to(dtype)
    weight = packed_weight(linear)
    packed, state = weight.data, weight.quant_state
    if packed.device.type == "mps":
        return unpacked(packed, block_scales(state), state.shape).weight().to(dtype)
    dequantise = cpu_dequantiser()
    if packed.device.type != "cpu" or dtype != torch.float32 or dequantise is None:
        return bnb.functional.dequantize_4bit(packed, state).to(dtype)
    return dequantise(packed, block_scales(state), state.blocksize, *state.shape)


def memory_for(count: int) -> Tensor:
    """This thread's memory for a dense weight, at least `count` float32."""
    memory = getattr(_memory, "tensor", None)
    if memory is None or memory.numel() < count:
        memory = _memory.tensor = torch.empty(count)
    return memory


def is_four_bit(parameter: Tensor) -> bool:
    """Whether it holds 4-bit codes."""
    return hasattr(parameter, "weight_count") or getattr(parameter, "quant_state", None) is not None


def weight_count(parameter: Tensor) -> int:
    """How many weights a parameter stands for: a packed 4-bit one holds two a byte."""
    if count := getattr(parameter, "weight_count", None):  # of a `PanelLinear`
        return count
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def packed_weight(linear: bnb.nn.Linear4bit) -> bnb.nn.Params4bit:
    """The weight of a 4-bit layer, which bitsandbytes' own annotations call a tensor."""
    return cast(bnb.nn.Params4bit, linear.weight)


def block_scales(state: bnb.functional.QuantState) -> Tensor:
    """(blocks,) float32, which nested quantisation keeps in 8 bits."""
    if not state.nested:
        return state.absmax
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def quantised(
    weight: Tensor, block: int, device: torch.device
) -> tuple[Tensor, bnb.functional.QuantState]:
    """An (outputs, inputs) weight, whose rows are whole blocks, in NF4: two codes a byte,
    (weights / 2, 1) uint8, and their state, as `ops.nf4_grid` rounds it where the weight lies; sent
    to a device afterwards."""
    rounded = round_to_nearest(weight, block)
    scales = rounded.scales.flatten().to(device)
    return rounded.packed().to(device), quant_state(scales, weight.shape, weight.dtype, block)


def layer_like(linear: bnb.nn.Linear4bit, rounded: FourBit) -> bnb.nn.Linear4bit:
    """A frozen layer of these weights, kept and multiplied by as `linear` is, with its bias."""
    scales, shape = rounded.scales.flatten(), rounded.codes.shape
    if isinstance(linear, PanelLinear):
        outputs, inputs = shape
        panels = kernels.panels_of(rounded.packed(), scales, outputs, inputs, rounded.block)
        layer = PanelLinear.made_of(panels, linear)
        layer.by_integers = linear.by_integers
        return layer
    plain = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=linear.compute_dtype,
        compress_statistics=False, quant_type="nf4", device="meta",
    )  # fmt: skip
    plain.bias = linear.bias
    # A new layer is repacked by bitsandbytes when it answers, where `linear` is kept from it.
    plain.support_avx512bf16_for_cpu = linear.support_avx512bf16_for_cpu
    state = quant_state(scales, shape, packed_weight(linear).quant_state.dtype, rounded.block)
    plain.quant_state = state
    plain.weight = bnb.nn.Params4bit(
        rounded.packed(), requires_grad=False, quant_state=state, blocksize=rounded.block,
        compress_statistics=False, quant_type="nf4", module=plain, bnb_quantized=True,
    )  # fmt: skip
    return plain


@torch.no_grad()
def base_weight(linear: nn.Linear) -> Tensor:
    """The (out_features, in_features) float32 weight that `linear` multiplies by, dequantised: a
    new tensor."""
    if not isinstance(linear, bnb.nn.Linear4bit):
        return linear.weight.detach().float()
    # float32 holds code * scale without a second rounding, whatever the compute dtype is.
    packed, state = bitsandbytes_form(linear)
    if packed.device.type == "mps":
        return unpacked(packed, block_scales(state), state.shape).weight()
    state = copy.copy(state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(packed, state)


def block_of(linear: bnb.nn.Linear4bit) -> int:
    """How many weights of a 4-bit layer share a scale."""
    if isinstance(linear, PanelLinear):
        return linear.panels.block
    return packed_weight(linear).blocksize


def quant_state(
    scales: Tensor, shape: torch.Size, dtype: torch.dtype, block: int
) -> bnb.functional.QuantState:
    """bitsandbytes' description of NF4 codes with (blocks,) float32 scales, on their device."""
    return bnb.functional.QuantState(
        absmax=scales,
        shape=shape,
        dtype=dtype,
        blocksize=block,
        code=table(scales.device).clone(),  # files are refused whose tensors share memory
        quant_type="nf4",
    )


@functools.cache
def cpu_dequantiser() -> Callable[[Tensor, Tensor, int, int, int], Tensor] | None:
    """(packed, scales, block size, outputs, inputs) -> (outputs, inputs) float32 by the function
    that bitsandbytes itself calls, or None where this installation of it has none for a CPU."""
    library = getattr(bnb.cextension.lib, "_lib", None)
    function = getattr(library, "cdequantize_blockwise_cpu_nf4_fp32", None)
    if function is None:
        return None

    def dequantise(packed: Tensor, scales: Tensor, block: int, rows: int, columns: int) -> Tensor:
        result = memory_for(rows * columns)[: rows * columns].view(rows, columns)
        function(
            *(ctypes.c_void_p(t.data_ptr()) for t in (packed, scales, result)),
            *map(ctypes.c_longlong, (block, rows, columns)),
        )
        return result

    return dequantise
