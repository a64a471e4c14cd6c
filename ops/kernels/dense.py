"""Dequantising, and products with dense weights for a few rows: what is bound by reading memory."""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from ops.kernels.compiling import compiled
from ops.kernels.crew import take_part
from ops.kernels.layout import CHUNK, PANEL
from ops.kernels.products import CHUNK_BYTES, LANES, PARTS, TARGET
from ops.kernels.simd import (
    F32,
    I16,
    I32,
    I64,
    compiled_in_place,
    constant,
    fused_multiply_add,
    load,
    offset,
    store,
    vector,
)

SHIFTS = tuple(place % 2 * 16 + place // 2 * 4 for place in range(CHUNK))
"""the bit at which the code of each input of a chunk begins; see `layout`"""
PANELS_AT_ONCE = 16


@compiled_in_place((types.intp,) * 4, types.int64)
def _dequantise_chunk(
    builder: ir.IRBuilder, codes: ir.Value, scales: ir.Value, out: ir.Value, stride: ir.Value
) -> None:
    """16 outputs x 8 inputs, the inputs `stride` bytes apart."""
    for part in range(PARTS):
        at = part * LANES * 4
        scale = load(builder, offset(builder, scales, at), vector(F32, LANES))
        for place, shift in enumerate(SHIFTS):
            level = TARGET.exact_levels(builder, offset(builder, codes, at), shift)
            to = builder.add(out, builder.mul(stride, ir.Constant(I64, place)))
            store(builder, offset(builder, to, at), builder.fmul(level, scale))


@compiled
def dequantise_task(thread, threads, board, codes, scales, panels, blocks, block, out, stride):
    """Of a crew: the transposed weight, float32 (inputs, panels * 16), rows `stride` apart."""
    chunks = block // CHUNK
    parts = -(-panels // PANELS_AT_ONCE)
    while True:
        work = take_part(board, 0, 1)
        if work >= parts * blocks:
            break
        # One block of inputs of many panels: whole stretches of memory are written.
        number, first = work // parts, work % parts * PANELS_AT_ONCE
        for panel in range(first, min(first + PANELS_AT_ONCE, panels)):
            place = panel * blocks + number
            for chunk in range(chunks):
                _dequantise_chunk(
                    codes + (place * chunks + chunk) * CHUNK_BYTES,
                    scales + place * PANEL * 4,
                    out + (number * block + chunk * CHUNK) * stride + panel * PANEL * 4,
                    stride,
                )


def _widened(builder: ir.IRBuilder, address: ir.Value, kind: str) -> ir.Value:
    """16 numbers at `address` as float32."""
    if kind == "float32":
        return load(builder, address, vector(F32, 16))
    if kind == "float16":
        return builder.fpext(load(builder, address, vector(ir.HalfType(), 16)), vector(F32, 16))
    bits = builder.zext(load(builder, address, vector(I16, 16)), vector(I32, 16))
    return builder.bitcast(builder.shl(bits, constant(I32, [16] * 16)), vector(F32, 16))


def _dots(kind: str, rows: int, outputs: int) -> Any:
    """A compiled operation: some outputs of a dense weight of `kind` for some rows. A sum has two
    parts, every other 16 inputs each, however many outputs and rows there are."""
    size = 4 if kind == "float32" else 2

    @compiled_in_place((types.intp,) * 6, types.int64)
    def dots(
        builder: ir.IRBuilder, weight: ir.Value, inputs: ir.Value, x: ir.Value, x_stride: ir.Value,
        y: ir.Value, y_stride: ir.Value,
    ) -> None:  # fmt: skip
        def times(value: ir.Value, factor: int) -> ir.Value:
            return builder.mul(value, ir.Constant(I64, factor))

        floats = vector(F32, 16)
        places = [(row, output) for row in range(rows) for output in range(outputs)]
        sums = {place: [cgutils.alloca_once(builder, floats) for _ in range(2)] for place in places}
        rows_of_x = [builder.add(x, times(x_stride, row)) for row in range(rows)]
        weights = [builder.add(weight, times(inputs, output * size)) for output in range(outputs)]
        for group in sums.values():
            for one in group:
                builder.store(constant(F32, [0.0] * 16), one)
        with cgutils.for_range(builder, builder.udiv(inputs, ir.Constant(I64, STEP))) as step:
            for half in range(2):
                at = offset(builder, times(step.index, STEP * size), half * 16 * size)
                wide = [_widened(builder, builder.add(place, at), kind) for place in weights]
                at = offset(builder, times(step.index, STEP * 4), half * 64)
                for row in range(rows):
                    own = load(builder, builder.add(rows_of_x[row], at), floats)
                    for output in range(outputs):
                        one = sums[row, output][half]
                        total = fused_multiply_add(builder, wide[output], own, builder.load(one))
                        builder.store(total, one)
        for (row, output), group in sums.items():
            total = builder.fadd(*map(builder.load, group))
            for width in (8, 4, 2, 1):  # halves upon each other, always in this order
                moved = [(i + width) % 16 for i in range(16)]
                other = builder.shuffle_vector(total, total, constant(I32, moved))
                total = builder.fadd(total, other)
            to = offset(builder, builder.add(y, times(y_stride, row)), output * 4)
            store(builder, to, builder.extract_element(total, ir.Constant(I32, 0)), 4)

    return dots


# Of this module by name, as what is kept on the disk is found by it.
STEP = 32  # inputs: a dense weight has a multiple of them
ROWS, OUTPUTS = 2, 4  # at a time: more rows would not stay in the first cache
_float32_1, _float32_8 = _dots("float32", 1, 1), _dots("float32", ROWS, OUTPUTS)
_bfloat16_1, _bfloat16_8 = _dots("bfloat16", 1, 1), _dots("bfloat16", ROWS, OUTPUTS)
_float16_1, _float16_8 = _dots("float16", 1, 1), _dots("float16", ROWS, OUTPUTS)
KINDS: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OUTPUTS_AT_ONCE = 64


@compiled
def dense_outputs(kind, weight, inputs, x, x_stride, rows, y, y_stride, first, last):
    """Outputs `first` to `last` (exclusive) of a dense (outputs, inputs) weight of a kind of
    `KINDS` for `rows` rows of float32, summed in float32 in the same order for any number of rows;
    `inputs` is a multiple of `STEP`."""
    size = 4 if kind == 0 else 2
    output = first
    while output < last:
        at, row, count = weight + output * inputs * size, 0, 1
        if output + OUTPUTS <= last:
            count = OUTPUTS
            while row + ROWS <= rows:
                here, to = x + row * x_stride, y + row * y_stride + output * 4
                if kind == 0:
                    _float32_8(at, inputs, here, x_stride, to, y_stride)
                elif kind == 1:
                    _bfloat16_8(at, inputs, here, x_stride, to, y_stride)
                else:
                    _float16_8(at, inputs, here, x_stride, to, y_stride)
                row += ROWS
        for one in range(count):
            for left in range(row, rows):
                here, to = x + left * x_stride, y + left * y_stride + (output + one) * 4
                if kind == 0:
                    _float32_1(at, inputs, here, x_stride, to, y_stride)
                elif kind == 1:
                    _bfloat16_1(at, inputs, here, x_stride, to, y_stride)
                else:
                    _float16_1(at, inputs, here, x_stride, to, y_stride)
            at += inputs * size
        output += count


@compiled
def dense_task(
    thread, threads, board, kind, weight, outputs, inputs, x, x_stride, rows, y, y_stride
):
    """Of a crew: all outputs of a dense weight; see `dense_outputs`."""
    while True:
        first = take_part(board, 0, OUTPUTS_AT_ONCE)
        if first >= outputs:
            break
        last = min(first + OUTPUTS_AT_ONCE, outputs)
        dense_outputs(kind, weight, inputs, x, x_stride, rows, y, y_stride, first, last)
