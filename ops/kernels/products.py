"""Products with NF4 weights on a CPU, without dequantising them.

A row of activations is rounded to 13 bits and a sign by block; see `codebook` for what that costs.
What a compiled function takes are addresses, so that it can call others without any object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ops.kernels import avx2, avx512
from ops.kernels.codebook import LEVEL_SCALE, MOST_ACTIVATION
from ops.kernels.compiling import compiled
from ops.kernels.crew import barrier, take_part
from ops.kernels.layout import CHUNK, PANEL
from ops.kernels.simd import (
    F32,
    I16,
    I32,
    I64,
    broadcast,
    call,
    compiled_in_place,
    constant,
    fused_multiply_add,
    load,
    offset,
    store,
    vector,
)
from ops.kernels.target import choose

TARGET: Any = {"avx512": avx512, "avx2": avx2}[choose()[0]]
LANES, PARTS = TARGET.LANES, PANEL // TARGET.LANES
CHUNK_BYTES = PANEL * 4
ROW_BLOCK = 96  # rows that stay in the second-level cache while all outputs are computed
SCALE_DIVISOR = float(MOST_ACTIVATION * LEVEL_SCALE)
TINY = 2.0**-100  # a block of activations under it counts as zeros


class _Writer:
    """Writes the LLVM IR of `rows` rows of activations by `panels` panels of weights."""

    def __init__(
        self, builder: ir.IRBuilder, rows: int, panels: int, values: Sequence[ir.Value]
    ) -> None:
        self.builder, self.rows, self.panels = builder, rows, panels
        (
            self.codes, self.scales, self.blocks, self.chunks, q, q_stride, s, s_stride,
            self.y, self.y_stride,
        ) = values  # fmt: skip
        # So many sums at a time that additions do not wait for one another.
        self.ways = 1 if rows * panels > 2 or TARGET.SUMS > 1 else 4 // rows
        self.floats, self.integers = vector(F32, LANES), vector(I32, LANES)
        self.panel_codes = self.times(builder.mul(self.blocks, self.chunks), CHUNK_BYTES)
        self.panel_scales = self.times(self.blocks, PANEL * 4)
        self.q_of = [builder.add(q, self.times(q_stride, row)) for row in range(rows)]
        self.s_of = [builder.add(s, self.times(s_stride, row)) for row in range(rows)]
        places = [(row, panel) for row in range(rows) for panel in range(panels)]
        self.totals = {place: cgutils.alloca_once(builder, self.floats) for place in places}
        self.sums = {
            (*place, way): [cgutils.alloca_once(builder, self.integers) for _ in range(TARGET.SUMS)]
            for place in places
            for way in range(self.ways)
        }
        self.code = cgutils.alloca_once(builder, I64)  # the address of the next chunk

    def times(self, value: ir.Value, factor: int) -> ir.Value:
        return self.builder.mul(value, ir.Constant(I64, factor))

    def write(self) -> None:
        builder = self.builder
        for part in range(PARTS):
            for total in self.totals.values():
                builder.store(constant(F32, [0.0] * LANES), total)
            builder.store(offset(builder, self.codes, part * LANES * 4), self.code)
            with cgutils.for_range(builder, self.blocks) as block:
                for group in self.sums.values():
                    for one in group:
                        builder.store(constant(I32, [0] * LANES), one)
                at = builder.mul(block.index, self.times(self.chunks, CHUNK * 2))
                with cgutils.for_range(builder, self.chunks) as chunk:
                    self.add_chunk(builder.add(at, self.times(chunk.index, CHUNK * 2)))
                for panel in range(self.panels):
                    self.add_block(block.index, panel, part)
            for (row, panel), total in self.totals.items():
                to = builder.add(self.y, self.times(self.y_stride, row))
                place = offset(builder, to, (panel * PANEL + part * LANES) * 4)
                store(builder, place, builder.load(total))

    def add_chunk(self, here: ir.Value) -> None:
        """The products of 8 inputs, whose activations begin at `here` of a row."""
        builder = self.builder
        first = builder.load(self.code)
        found = [
            TARGET.weights(builder, builder.add(first, self.times(self.panel_codes, panel)))
            for panel in range(self.panels)
        ]
        builder.store(offset(builder, first, CHUNK_BYTES), self.code)
        for step in range(len(found[0])):
            for row in range(self.rows):
                x = TARGET.activations(builder, builder.add(self.q_of[row], here), step)
                for panel in range(self.panels):
                    group = self.sums[row, panel, step % self.ways]
                    for one, weight in zip(group, found[panel][step], strict=True):
                        total = TARGET.multiply(builder, builder.load(one), weight, x)
                        builder.store(total, one)

    def add_block(self, block: ir.Value, panel: int, part: int) -> None:
        """The sums of a block times its scales."""
        builder = self.builder
        at = builder.add(self.scales, self.times(self.panel_scales, panel))
        at = builder.add(at, self.times(block, PANEL * 4))
        scale = load(builder, offset(builder, at, part * LANES * 4), self.floats)
        for row in range(self.rows):
            own = load(builder, builder.add(self.s_of[row], self.times(block, 4)), F32, 4)
            both = builder.fmul(scale, broadcast(builder, own, LANES))
            group = [builder.load(one) for one in self.sums[row, panel, 0]]
            for way in range(1, self.ways):
                more = self.sums[row, panel, way]
                group = [builder.add(a, builder.load(b)) for a, b in zip(group, more, strict=True)]
            whole = builder.sitofp(TARGET.finish(builder, group), self.floats)
            total = self.totals[row, panel]
            builder.store(fused_multiply_add(builder, whole, both, builder.load(total)), total)


def _product(rows: int, panels: int) -> Any:
    """A compiled operation: `rows` rows of activations by `panels` panels of weights."""

    @compiled_in_place((types.intp,) * 10, types.int64)
    def product(
        builder: ir.IRBuilder, codes: ir.Value, scales: ir.Value, blocks: ir.Value,
        chunks: ir.Value, q: ir.Value, q_stride: ir.Value, s: ir.Value, s_stride: ir.Value,
        y: ir.Value, y_stride: ir.Value,
    ) -> None:  # fmt: skip
        values = (codes, scales, blocks, chunks, q, q_stride, s, s_stride, y, y_stride)
        _Writer(builder, rows, panels, values).write()

    return product


_product_1 = _product(1, 1)
_product_2 = _product(2, 1)
_product_4 = _product(4, 1)
MOST_ROWS, MOST_PANELS = (8, 3) if LANES == 16 else (4, 1)  # as the registers allow
_product_8 = _product(MOST_ROWS, 1)
_product_most = _product(MOST_ROWS, MOST_PANELS)


ORDER_OF_16 = [start + place for start in (0, CHUNK) for place in TARGET.INPUT_ORDER]


@compiled_in_place((types.intp, types.int64, types.intp, types.intp), types.int64)
def _quantise_block(
    builder: ir.IRBuilder, x: ir.Value, block: ir.Value, q: ir.Value, scale: ir.Value
) -> None:
    """`block` float32 at `x` as int16 at `q`, in the target's order, and their float32 scale."""
    integers, floats = vector(I32, 16), vector(F32, 16)
    steps = builder.udiv(block, ir.Constant(I64, 16))
    largest = cgutils.alloca_once_value(builder, constant(I32, [0] * 16))
    with cgutils.for_range(builder, steps) as step:
        # As integers: the order is that of the floats, and NaN is larger than all of them.
        bits = load(
            builder, builder.add(x, builder.mul(step.index, ir.Constant(I64, 64))), integers
        )
        size = builder.and_(bits, constant(I32, [0x7FFFFFFF] * 16))
        both = [builder.load(largest), size]
        builder.store(call(builder, "llvm.smax.v16i32", integers, both), largest)
    most = call(builder, "llvm.vector.reduce.smax.v16i32", I32, [builder.load(largest)])
    most = builder.bitcast(most, F32)
    is_zero = builder.fcmp_ordered("<", most, ir.Constant(F32, TINY))
    limit = ir.Constant(F32, float(MOST_ACTIVATION))
    zero = ir.Constant(F32, 0.0)
    factor = builder.select(is_zero, zero, builder.fdiv(limit, most))
    own = builder.fdiv(most, ir.Constant(F32, SCALE_DIVISOR))
    store(builder, scale, builder.select(is_zero, zero, own), 4)
    factors = broadcast(builder, factor, 16)
    with cgutils.for_range(builder, steps) as step:
        values = load(
            builder, builder.add(x, builder.mul(step.index, ir.Constant(I64, 64))), floats
        )
        whole = call(builder, "llvm.rint.v16f32", floats, [builder.fmul(values, factors)])
        # NaN becomes 0 here: the scale is NaN then.
        whole = call(builder, "llvm.fptosi.sat.v16i32.v16f32", integers, [whole])
        narrow = builder.trunc(whole, vector(I16, 16))
        mixed = builder.shuffle_vector(narrow, narrow, constant(I32, ORDER_OF_16))
        store(builder, builder.add(q, builder.mul(step.index, ir.Constant(I64, 32))), mixed)


@compiled
def quantise_row(x, inputs, block, q, scales):
    """`inputs` float32 at `x` as int16 at `q`, with a float32 scale for each block at `scales`.

    A block with NaN or infinity has such a scale, and so every product with it is not finite.
    """
    for number in range(inputs // block):
        _quantise_block(x + number * block * 4, block, q + number * block * 2, scales + number * 4)


@compiled
def product_of_panels(
    codes, scales, blocks, block, q, q_stride, s, s_stride, rows, y, y_stride, first, last
):
    """Rows of activations by the panels `first` to `last` (exclusive) of a weight.

    codes, scales: of a `PanelWeight`; q, s: what `quantise_row` wrote, rows `q_stride` and
    `s_stride` bytes apart; y: float32, rows `y_stride` bytes apart, 16 outputs a panel.
    """
    chunks = block // CHUNK
    panel_codes, panel_scales = blocks * chunks * CHUNK_BYTES, blocks * PANEL * 4
    panel = first
    while panel < last:
        c, w, out = (
            codes + panel * panel_codes,
            scales + panel * panel_scales,
            y + panel * PANEL * 4,
        )
        count, row = 1, 0
        if panel + MOST_PANELS <= last and rows >= MOST_ROWS:
            count = MOST_PANELS
            while row + MOST_ROWS <= rows:
                _product_most(
                    c, w, blocks, chunks, q + row * q_stride, q_stride, s + row * s_stride,
                    s_stride, out + row * y_stride, y_stride,
                )  # fmt: skip
                row += MOST_ROWS
        for one in range(count):
            _remaining_rows(
                c + one * panel_codes, w + one * panel_scales, blocks, chunks, q, q_stride, s,
                s_stride, rows, row, out + one * PANEL * 4, y_stride,
            )  # fmt: skip
        panel += count


@compiled
def _remaining_rows(c, w, blocks, chunks, q, q_stride, s, s_stride, rows, row, out, y_stride):
    """The rows from `row` on by one panel."""
    while row < rows:
        x, own, to, left = q + row * q_stride, s + row * s_stride, out + row * y_stride, rows - row
        if left >= MOST_ROWS:
            _product_8(c, w, blocks, chunks, x, q_stride, own, s_stride, to, y_stride)
            row += MOST_ROWS
        elif left >= 4:
            _product_4(c, w, blocks, chunks, x, q_stride, own, s_stride, to, y_stride)
            row += 4
        elif left >= 2:
            _product_2(c, w, blocks, chunks, x, q_stride, own, s_stride, to, y_stride)
            row += 2
        else:
            _product_1(c, w, blocks, chunks, x, q_stride, own, s_stride, to, y_stride)
            row += 1


@compiled
def linear_task(
    thread, threads, board, codes, scales, panels, blocks, block, x, x_stride, rows, q, q_stride,
    s, s_stride, y, y_stride,
):  # fmt: skip
    """Of a crew: `rows` float32 rows at `x` by a whole weight, to `y`."""
    while True:
        row = take_part(board, 0, 4)
        if row >= rows:
            break
        for here in range(row, min(row + 4, rows)):
            quantise_row(
                x + here * x_stride, blocks * block, block, q + here * q_stride,
                s + here * s_stride,
            )  # fmt: skip
    barrier(board, threads)
    # All panels by a few rows, then by the next ones: those rows stay in the cache.
    at_once = max(MOST_PANELS, min(15, panels // (8 * threads) // MOST_PANELS * MOST_PANELS))
    parts = -(-panels // at_once)
    row_blocks = -(-rows // ROW_BLOCK)
    while True:
        part = take_part(board, 1, 1)
        if part >= parts * row_blocks:
            break
        row = part // parts * ROW_BLOCK
        first = part % parts * at_once
        product_of_panels(
            codes, scales, blocks, block, q + row * q_stride, q_stride, s + row * s_stride,
            s_stride, min(ROW_BLOCK, rows - row), y + row * y_stride, y_stride, first,
            min(first + at_once, panels),
        )  # fmt: skip
