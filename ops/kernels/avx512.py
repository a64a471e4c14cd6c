"""NF4 products with AVX-512: 16 outputs a vector, two inputs of each in its 32 bits."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from ops.kernels.codebook import LEVELS, NF4
from ops.kernels.simd import (
    F32,
    I16,
    I32,
    broadcast,
    call,
    constant,
    load,
    offset,
    vector,
)
from ops.kernels.target import processor_features

LANES = 16  # outputs
SUMS = 1
"""integer vectors whose sum over the vectors' pairs is one sum of `LANES` outputs"""
INPUT_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
"""in which `multiply` wants the activations of a chunk"""


def weights(builder: ir.IRBuilder, address: ir.Value) -> list[list[ir.Value]]:
    """The levels of 16 outputs x 8 inputs at `address`: by step, one vector for each of `SUMS`."""
    words = load(builder, address, vector(I16, 32))
    table = constant(I16, LEVELS * 2)  # 32 places, of which 5 bits choose: the fifth is not ours
    found = []
    for step in range(4):
        index = builder.lshr(words, constant(I16, [4 * step] * 32)) if step else words
        found.append([
            call(builder, "llvm.x86.avx512.permvar.hi.512", vector(I16, 32), [table, index])
        ])  # fmt: skip
    return found


def activations(builder: ir.IRBuilder, address: ir.Value, step: int) -> ir.Value:
    """The activations that a step multiplies by: a pair of int16, in every lane."""
    return broadcast(builder, load(builder, offset(builder, address, 4 * step), I32, 4), LANES)


def multiply(
    builder: ir.IRBuilder, total: ir.Value, weight: ir.Value, activation: ir.Value
) -> ir.Value:
    """total + weight * activation, summed over the pair in each lane, in int32."""
    wide = vector(I32, LANES)
    if "avx512vnni" in processor_features():
        pair = builder.bitcast(weight, wide)
        return call(builder, "llvm.x86.avx512.vpdpwssd.512", wide, [total, pair, activation])
    pairs = [weight, builder.bitcast(activation, vector(I16, 32))]
    return builder.add(total, call(builder, "llvm.x86.avx512.pmaddw.d.512", wide, pairs))


def finish(builder: ir.IRBuilder, sums: Sequence[ir.Value]) -> ir.Value:
    """The sums of the outputs in their order."""
    return sums[0]


def exact_levels(builder: ir.IRBuilder, address: ir.Value, shift: int) -> ir.Value:
    """The float32 levels of 16 outputs whose codes begin at bit `shift` of the 32 bits of each."""
    codes = load(builder, address, vector(I32, LANES))
    codes = builder.lshr(codes, constant(I32, [shift] * LANES))
    values = [constant(F32, NF4.tolist()), codes]  # 4 bits choose, the rest is ignored
    return call(builder, "llvm.x86.avx512.permvar.sf.512", vector(F32, LANES), values)
