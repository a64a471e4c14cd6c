"""Sixteen float32 numbers at a time, for the parts of a token that are not 4-bit products.

LLVM splits what is wider than the processor's registers, so the same sums are made in the same
order with AVX2 and with AVX-512. Nothing here may be reordered by the compiler: a row must have
the same numbers alone and beside others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from ops.kernels.dense import KINDS
from ops.kernels.simd import (
    F32,
    I8,
    I32,
    I64,
    broadcast,
    call,
    compiled_in_place,
    constant,
    fused_multiply_add,
    load,
    pointer,
    store,
    vector,
)

WIDTH = 16
FLOAT32, FLOAT16 = KINDS[torch.float32], KINDS[torch.float16]
F16 = ir.HalfType()
F32_LANES, I32_LANES = vector(F32, WIDTH), vector(I32, WIDTH)
EXP_LEAST, EXP_MOST = -87.3, 88.3  # beyond them exp leaves the range of normal float32
# exp(r) = 1 + r + r^2 * polynomial, |r| <= ln(2) / 2 (Cephes, expf)
EXP_POLYNOMIAL = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3,
    4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
)  # fmt: skip
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4


class LanesType(types.Type):
    """Sixteen float32 in a register, or in two."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


@register_model(LanesType)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend: Any) -> None:
        super().__init__(manager, frontend, F32_LANES)


LANES = LanesType()
ADDRESS, NUMBER = types.intp, types.float32


def every(value: float) -> ir.Constant:
    return constant(F32, [value] * WIDTH)


@compiled_in_place((), LANES)
def zeros(builder: ir.IRBuilder) -> ir.Value:
    return every(0.0)


@compiled_in_place((NUMBER,), LANES)
def repeated(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """`value` in every lane."""
    return broadcast(builder, value, WIDTH)


@compiled_in_place((ADDRESS,), LANES)
def lanes_at(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return load(builder, address, F32_LANES, 4)


@compiled_in_place((ADDRESS, LANES), types.int64)
def put_lanes(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    store(builder, address, value, 4)


@compiled_in_place((ADDRESS, types.int64), LANES)
def lanes_of(builder: ir.IRBuilder, address: ir.Value, kind: ir.Value) -> ir.Value:
    """Sixteen numbers stored as float16 or float32, by their `kind`, as float32."""
    result = cgutils.alloca_once(builder, F32_LANES)
    is_half = builder.icmp_signed("==", kind, ir.Constant(I64, FLOAT16))
    with builder.if_else(is_half) as (half, single):
        with half:
            stored = load(builder, address, vector(F16, WIDTH), 2)
            builder.store(builder.fpext(stored, F32_LANES), result)
        with single:
            builder.store(load(builder, address, F32_LANES, 4), result)
    return builder.load(result)


@compiled_in_place((ADDRESS, LANES), types.int64)
def put_half(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Store as float16, rounded to the nearest."""
    store(builder, address, builder.fptrunc(value, vector(F16, WIDTH)), 2)


@compiled_in_place((LANES, LANES), LANES)
def plus(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fadd(a, b)


@compiled_in_place((LANES, LANES), LANES)
def times(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fmul(a, b)


@compiled_in_place((LANES, LANES), LANES)
def over(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.fdiv(a, b)


@compiled_in_place((LANES, LANES, LANES), LANES)
def fused(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, rounded once."""
    return fused_multiply_add(builder, a, b, c)


@compiled_in_place((LANES, LANES), LANES)
def larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The larger of each two; what is not a number stays."""
    return builder.select(builder.fcmp_unordered(">", a, b), a, b)


@compiled_in_place((LANES,), LANES)
def magnitude(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    return call(builder, "llvm.fabs.v16f32", F32_LANES, [a])


def folded(builder: ir.IRBuilder, value: ir.Value, combine: Any) -> ir.Value:
    """All lanes combined to one number: halves with halves, in one fixed order."""
    width = WIDTH
    while width > 1:
        width //= 2
        low = builder.shuffle_vector(value, value, constant(I32, list(range(width))))
        high = builder.shuffle_vector(value, value, constant(I32, list(range(width, 2 * width))))
        value = combine(low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


@compiled_in_place((LANES,), NUMBER)
def sum_of(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return folded(builder, value, builder.fadd)


@compiled_in_place((LANES,), NUMBER)
def largest_of(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return folded(
        builder, value, lambda a, b: builder.select(builder.fcmp_unordered(">", a, b), a, b)
    )


@compiled_in_place((LANES,), LANES)
def exponential(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x within 2 units in the last place; what is not a number stays; x is held within
    `EXP_LEAST` and `EXP_MOST`."""
    least, most = every(EXP_LEAST), every(EXP_MOST)
    x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    x = builder.select(builder.fcmp_ordered(">", x, most), most, x)
    scaled = builder.fmul(x, every(1 / math.log(2)))
    count = call(builder, "llvm.rint.v16f32", F32_LANES, [scaled])
    rest = fused_multiply_add(builder, count, every(-LN2_HIGH), x)
    rest = fused_multiply_add(builder, count, every(-LN2_LOW), rest)
    value: ir.Value = every(EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        value = fused_multiply_add(builder, value, rest, every(coefficient))
    value = fused_multiply_add(builder, value, builder.fmul(rest, rest), rest)
    value = builder.fadd(value, every(1.0))
    # times 2^count, by its bits: -126 <= count <= 127
    exponent = builder.add(builder.fptosi(count, I32_LANES), constant(I32, [127] * WIDTH))
    power = builder.bitcast(builder.shl(exponent, constant(I32, [23] * WIDTH)), F32_LANES)
    return builder.fmul(value, power)


@compiled_in_place((ADDRESS,), types.int64)
def fetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Have the cache line of `address` brought to the second-level cache."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    numbers = [ir.Constant(I32, number) for number in (0, 2, 1)]  # to read, locality, data
    builder.call(function, [pointer(builder, address, I8), *numbers])
