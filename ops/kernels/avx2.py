"""NF4 products with AVX2: 8 outputs a vector, looked up as the two bytes of each level."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from ops.kernels.codebook import LEVELS, NF4
from ops.kernels.simd import F32, I8, I16, I32, I64, broadcast, call, constant, load, offset, vector

LANES = 8
SUMS = 2
INPUT_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)

_TWICE = (0, 16)  # the shuffles work in each half of a register by itself
_FIRST = [half + i + part for half in _TWICE for i in range(8) for part in (0, 32)]
_SECOND = [half + 8 + i + part for half in _TWICE for i in range(8) for part in (0, 32)]


def weights(builder: ir.IRBuilder, address: ir.Value) -> list[list[ir.Value]]:
    """The levels of 8 outputs x 8 inputs at `address`: by step, one vector for each of `SUMS`."""
    table = vector(I8, 32)
    low_bytes = constant(I8, [level & 255 for level in LEVELS] * 2)
    high_bytes = constant(I8, [level >> 8 & 255 for level in LEVELS] * 2)
    codes = load(builder, address, table)
    nibbles = (
        builder.and_(codes, constant(I8, [15] * 32)),
        builder.lshr(codes, constant(I8, [4] * 32)),
    )
    found = []
    for nibble in nibbles:
        low, high = (
            call(builder, "llvm.x86.avx2.pshuf.b", table, [part, nibble])
            for part in (low_bytes, high_bytes)
        )
        found.append([
            builder.bitcast(
                builder.shuffle_vector(low, high, constant(I32, order)), vector(I16, 16)
            )
            for order in (_FIRST, _SECOND)
        ])  # fmt: skip
    return found


def activations(builder: ir.IRBuilder, address: ir.Value, step: int) -> ir.Value:
    """The activations that a step multiplies by: four int16, in every 64 bits."""
    four = load(builder, offset(builder, address, 8 * step), I64, 8)
    return builder.bitcast(broadcast(builder, four, 4), vector(I16, 16))


def multiply(
    builder: ir.IRBuilder, total: ir.Value, weight: ir.Value, activation: ir.Value
) -> ir.Value:
    """total + weight * activation, summed over the pair in each lane, in int32."""
    wide = vector(I32, 8)
    return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", wide, [weight, activation]))


def finish(builder: ir.IRBuilder, sums: Sequence[ir.Value]) -> ir.Value:
    """The sums of the outputs in their order: each is in two lanes of one of `sums`."""
    return call(builder, "llvm.x86.avx2.phadd.d", vector(I32, 8), list(sums))


def exact_levels(builder: ir.IRBuilder, address: ir.Value, shift: int) -> ir.Value:
    """The float32 levels of 8 outputs whose codes begin at bit `shift` of the 32 bits of each."""
    codes = load(builder, address, vector(I32, LANES))
    codes = builder.lshr(codes, constant(I32, [shift] * LANES))
    halves = [
        call(
            builder, "llvm.x86.avx2.permps", vector(F32, LANES), [constant(F32, part), codes]
        )  # 3 bits choose, the rest is ignored
        for part in (NF4[:8].tolist(), NF4[8:].tolist())
    ]
    bit = builder.and_(codes, constant(I32, [8] * LANES))
    return builder.select(builder.icmp_signed("!=", bit, constant(I32, [0] * LANES)), *halves[::-1])
