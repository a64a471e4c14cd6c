"""A token of every row through all layers: one function that the threads of a crew run together.

Work on a row as a whole (norms, merging, quantising) is dealt out by row; products by panels of
16 outputs, for all rows at once, so that a weight is read once; attention by chunks of contexts. No
sum depends on how many rows or threads there are. See `ops.kernels.token` for the tables.
"""

from __future__ import annotations

import numpy

from ops.kernels.attention import CHUNK, ROW_FIRST_ITEM, attend, merge, normalise
from ops.kernels.compiling import compiled
from ops.kernels.crew import barrier, take_part
from ops.kernels.dense import OUTPUTS_AT_ONCE, dense_outputs
from ops.kernels.lanes import (
    FLOAT32,
    WIDTH,
    exponential,
    fused,
    lanes_at,
    over,
    plus,
    put_lanes,
    repeated,
    times,
)
from ops.kernels.layout import PANEL
from ops.kernels.products import product_of_panels, quantise_row
from ops.kernels.simd import float_at

# Sizes of the model and of the batch, and addresses of its memory, by their places in `plan`:
(
    LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY, HALF, MOST_RANK,
    HEAD, HEAD_KIND, ROWS, ITEMS, STATES, NORMED, WIDE, LOW, SCRATCH, COSINES, SINES, LOGITS,
) = range(21)  # fmt: skip
PLAN_FIELDS = 21
INPUT_NORM, OUTPUT_NORM, QUERY_NORM, KEY_NORM = range(4)  # in the table of norms; 0 for none
QKV, OUT, GATE_UP, DOWN = range(4)
# What is known of a product, by its place in the table `products` (layers, 4, fields):
# its weight, what it is handed out by, its adapter, where its quantised inputs lie, whether its
# result is added to the states, and its bias, or 0. (As numbers: numba compiles once more for a
# constant.)
(
    CODES, BLOCK_SCALES, PANELS, INPUTS, BLOCK, PART, RANK, FACTOR_A, FACTOR_B,
    QUANTISED, SCALES, RESIDUAL, BIAS,
) = range(13)  # fmt: skip
PRODUCT_FIELDS = 13
COUNTERS_OF_LAYER = 9  # of work that is handed out: four products, their adapters, attention
PADDING = 64  # bytes behind a row of quantised inputs: else rows would share lines of the cache


@compiled
def normalise_rows(plan, norm, epsilon, thread, threads):
    hidden = plan[HIDDEN]
    for row in range(thread, plan[ROWS], threads):
        normalise(
            plan[STATES] + 4 * row * hidden, norm, epsilon, hidden,
            plan[NORMED] + 4 * row * hidden,
        )  # fmt: skip


@compiled
def quantise(plan, product, row, start, end):
    """Inputs `start` to `end` of one row, whole blocks of them, as the 4-bit product takes them."""
    inputs, block = product[INPUTS], product[BLOCK]
    quantise_row(
        plan[NORMED] + 4 * (row * inputs + start), end - start, block,
        product[QUANTISED] + row * (2 * inputs + PADDING) + 2 * start,
        product[SCALES] + 4 * ((row * inputs + start) // block),
    )  # fmt: skip


@compiled
def quantise_whole_rows(plan, product, thread, threads):
    for row in range(thread, plan[ROWS], threads):
        quantise(plan, product, row, numpy.int64(0), product[INPUTS])


@compiled
def lower(plan, product, counter, threads, board):
    """The inputs of all rows times A of the product's adapter; nothing where it has none."""
    rank, inputs = product[RANK], product[INPUTS]
    if rank == 0:
        return
    while True:
        line = take_part(board, counter, 1)
        if line >= rank:
            break
        dense_outputs(
            numpy.int64(FLOAT32), product[FACTOR_A], inputs, plan[NORMED], 4 * inputs, plan[ROWS],
            plan[LOW], 4 * plan[MOST_RANK], line, line + 1,
        )  # fmt: skip
    barrier(board, threads)


@compiled
def finish_panels(plan, product, width, start, end):
    """Add the bias and what the adapter has for these panels, and the states where they are to be
    added to."""
    rank, residual, bias = product[RANK], product[RESIDUAL] != 0, product[BIAS]
    if rank == 0 and bias == 0 and not residual:
        return
    for row in range(plan[ROWS]):
        low = plan[LOW] + 4 * row * plan[MOST_RANK]
        for panel in range(start, end):
            at = plan[WIDE] + 4 * (row * width + panel * PANEL)
            lanes = lanes_at(at)
            if bias != 0:
                lanes = plus(lanes, lanes_at(bias + 4 * panel * PANEL))
            factor = product[FACTOR_B] + 4 * panel * rank * PANEL
            for i in range(rank):
                lanes = fused(lanes_at(factor + 64 * i), repeated(float_at(low + 4 * i)), lanes)
            if residual:
                state = plan[STATES] + 4 * (row * width + panel * PANEL)
                put_lanes(state, plus(lanes_at(state), lanes))
            else:
                put_lanes(at, lanes)


@compiled
def multiply_panels(plan, product, start, end):
    """Outputs of these panels for all rows."""
    width, inputs, blocks = (
        product[PANELS] * PANEL,
        product[INPUTS],
        product[INPUTS] // product[BLOCK],
    )
    product_of_panels(
        product[CODES], product[BLOCK_SCALES], blocks, product[BLOCK],
        product[QUANTISED], 2 * inputs + PADDING, product[SCALES], 4 * blocks, plan[ROWS],
        plan[WIDE], 4 * width, start, end,
    )  # fmt: skip
    finish_panels(plan, product, width, start, end)


@compiled
def gate(plan, width, start, end):
    """up * silu(gate) of columns `start` to `end`, for all rows."""
    for row in range(plan[ROWS]):
        both, to = plan[WIDE] + 8 * row * width, plan[NORMED] + 4 * row * width
        for i in range(start, end, WIDTH):
            gates, up = lanes_at(both + 4 * i), lanes_at(both + 4 * (width + i))
            negated = times(gates, repeated(numpy.float32(-1)))
            below = plus(exponential(negated), repeated(numpy.float32(1)))
            put_lanes(to + 4 * i, times(up, over(gates, below)))


@compiled
def multiply(plan, product, counter, board, threads):
    part, panels = product[PART], product[PANELS]
    while True:
        start = take_part(board, counter, part)
        if start >= panels:
            break
        multiply_panels(plan, product, start, min(panels, start + part))
    barrier(board, threads)


@compiled
def multiply_gated(plan, products, layer, counter, board, threads):
    """Gate and up of the same columns, block by block, and at once what the next product takes."""
    product, following = products[layer, GATE_UP], products[layer, DOWN]
    width, part = plan[INTERMEDIATE], products[layer, GATE_UP, PART] * PANEL
    up = width // PANEL
    while True:
        start = take_part(board, counter, part)
        if start >= width:
            break
        end = min(width, start + part)
        multiply_panels(plan, product, start // PANEL, end // PANEL)
        multiply_panels(plan, product, up + start // PANEL, up + end // PANEL)
        gate(plan, width, start, end)
        for row in range(plan[ROWS]):
            quantise(plan, following, row, start, end)
    barrier(board, threads)


@compiled
def attend_all(plan, rows, norms, epsilon, layer, counter, thread, board, threads):
    heads, kv_heads, dims, half = plan[HEADS], plan[KV_HEADS], plan[HEAD_DIM], plan[HALF]
    scratch = plan[SCRATCH] + 4 * thread * (dims + CHUNK)
    width = (heads + 2 * kv_heads) * dims
    while True:
        item = take_part(board, counter, 1)
        if item >= plan[ITEMS]:
            break
        row = plan[ROWS] - 1
        while rows[row, ROW_FIRST_ITEM] > item:
            row -= 1
        attend(
            rows[row], layer, item - rows[row, ROW_FIRST_ITEM], plan[WIDE] + 4 * row * width,
            plan[COSINES] + 4 * row * half, plan[SINES] + 4 * row * half,
            half, heads, kv_heads, dims, norms[layer, QUERY_NORM],
            norms[layer, KEY_NORM], epsilon, scratch,
        )  # fmt: skip
    barrier(board, threads)


@compiled
def prepare_out(plan, rows, product, thread, threads):
    """What the heads found, as the output product takes it."""
    for row in range(thread, plan[ROWS], threads):
        at = plan[NORMED] + 4 * row * product[INPUTS]
        merge(rows[row], plan[HEADS], plan[HEAD_DIM], at)
        quantise(plan, product, row, numpy.int64(0), product[INPUTS])


@compiled
def logits(plan, counter, board):
    hidden, vocabulary = plan[HIDDEN], plan[VOCABULARY]
    while True:
        start = take_part(board, counter, OUTPUTS_AT_ONCE)
        if start >= vocabulary:
            break
        dense_outputs(
            plan[HEAD_KIND], plan[HEAD], hidden, plan[NORMED], 4 * hidden, plan[ROWS],
            plan[LOGITS], 4 * vocabulary, start, min(vocabulary, start + OUTPUTS_AT_ONCE),
        )  # fmt: skip


@compiled
def next_logits(thread, threads, board, plan, products, norms, rows, epsilon):
    """States of the newest token of every row -> logits of the next one.

    All int64: plan (PLAN_FIELDS,); products (layers, 4, PRODUCT_FIELDS); norms (layers + 1, 4),
    addresses of their weights, of which the last line has that of the last states;
    rows (rows, ROW_FIELDS).
    """
    for layer in range(plan[LAYERS]):
        counter = layer * COUNTERS_OF_LAYER
        qkv, out, down = products[layer, QKV], products[layer, OUT], products[layer, DOWN]
        normalise_rows(plan, norms[layer, INPUT_NORM], epsilon, thread, threads)
        quantise_whole_rows(plan, qkv, thread, threads)
        barrier(board, threads)
        lower(plan, qkv, counter, threads, board)
        multiply(plan, qkv, counter + 1, board, threads)
        attend_all(plan, rows, norms, epsilon, layer, counter + 2, thread, board, threads)
        prepare_out(plan, rows, out, thread, threads)
        barrier(board, threads)
        lower(plan, out, counter + 3, threads, board)
        multiply(plan, out, counter + 4, board, threads)
        normalise_rows(plan, norms[layer, OUTPUT_NORM], epsilon, thread, threads)
        quantise_whole_rows(plan, products[layer, GATE_UP], thread, threads)
        barrier(board, threads)
        lower(plan, products[layer, GATE_UP], counter + 5, threads, board)
        multiply_gated(plan, products, layer, counter + 6, board, threads)
        lower(plan, down, counter + 7, threads, board)
        multiply(plan, down, counter + 8, board, threads)
    normalise_rows(plan, norms[plan[LAYERS], INPUT_NORM], epsilon, thread, threads)
    barrier(board, threads)
    logits(plan, plan[LAYERS] * COUNTERS_OF_LAYER, board)
