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


def _dots(kind: str, rows: int) -> Any:
    """A compiled operation: one output of a dense weight of `kind` for `rows` rows."""
    size = 4 if kind == "float32" else 2

    @compiled_in_place((types.intp,) * 6, types.int64)
    def dots(
        builder: ir.IRBuilder, weight: ir.Value, inputs: ir.Value, x: ir.Value, x_stride: ir.Value,
        y: ir.Value, y_stride: ir.Value,
    ) -> None:  # fmt: skip
        floats = vector(F32, 16)
        zeros = constant(F32, [0.0] * 16)
        sums = [[cgutils.alloca_once(builder, floats) for _ in range(2)] for _ in range(rows)]
        starts = [builder.add(x, builder.mul(x_stride, ir.Constant(I64, r))) for r in range(rows)]
        for group in sums:
            for one in group:
                builder.store(zeros, one)
        with cgutils.for_range(builder, builder.udiv(inputs, ir.Constant(I64, 32))) as step:
            at = builder.add(weight, builder.mul(step.index, ir.Constant(I64, 32 * size)))
            here = builder.mul(step.index, ir.Constant(I64, 128))
            for half in range(2):
                values = _widened(builder, offset(builder, at, half * 16 * size), kind)
                for start, group in zip(starts, sums, strict=True):
                    own = load(
                        builder, offset(builder, builder.add(start, here), half * 64), floats
                    )
                    total = builder.load(group[half])
                    builder.store(fused_multiply_add(builder, values, own, total), group[half])
        for row, group in enumerate(sums):
            total = builder.fadd(*map(builder.load, group))
            for width in (8, 4, 2, 1):  # halves upon each other, always in this order
                moved = [(i + width) % 16 for i in range(16)]
                other = builder.shuffle_vector(total, total, constant(I32, moved))
                total = builder.fadd(total, other)
            to = builder.add(y, builder.mul(y_stride, ir.Constant(I64, row)))
            store(builder, to, builder.extract_element(total, ir.Constant(I32, 0)), 4)

    return dots


# Of this module by name, as what is kept on the disk is found by it.
_float32_1, _float32_4 = _dots("float32", 1), _dots("float32", 4)
_bfloat16_1, _bfloat16_4 = _dots("bfloat16", 1), _dots("bfloat16", 4)
_float16_1, _float16_4 = _dots("float16", 1), _dots("float16", 4)
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STEP = 32  # inputs: a dense weight has a multiple of them
OUTPUTS_AT_ONCE = 64


@compiled
def dense_outputs(kind, weight, inputs, x, x_stride, rows, y, y_stride, first, last):
    """Outputs `first` to `last` (exclusive) of a dense (outputs, inputs) weight of a kind of
    `KINDS` for `rows` rows of float32, summed in float32 in the same order for any number of rows;
    `inputs` is a multiple of `STEP`."""
    size = 4 if kind == 0 else 2
    for output in range(first, last):
        at, row = weight + output * inputs * size, 0
        while row < rows:
            here, to = x + row * x_stride, y + row * y_stride + output * 4
            if rows - row >= 4:
                if kind == 0:
                    _float32_4(at, inputs, here, x_stride, to, y_stride)
                elif kind == 1:
                    _bfloat16_4(at, inputs, here, x_stride, to, y_stride)
                else:
                    _float16_4(at, inputs, here, x_stride, to, y_stride)
                row += 4
            else:
                if kind == 0:
                    _float32_1(at, inputs, here, x_stride, to, y_stride)
                elif kind == 1:
                    _bfloat16_1(at, inputs, here, x_stride, to, y_stride)
                else:
                    _float16_1(at, inputs, here, x_stride, to, y_stride)
                row += 1


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
