"""Attention of one new token over the keys and values of its own sequence, in compiled code.

A sequence is cut into chunks of `CHUNK` positions, counted from its first token, whoever computes
them and however many threads there are: each chunk has its own softmax, and they are merged in
their order (flash decoding; the softmax that goes on, arXiv:1805.02867). So long contexts are
divided among threads also where there are few heads, and the numbers do not depend on it.
"""

from __future__ import annotations

import math

import numpy

from ops.kernels.compiling import compiled
from ops.kernels.crew import LINE
from ops.kernels.lanes import (
    FLOAT16,
    WIDTH,
    exponential,
    fetch,
    fused,
    lanes_at,
    lanes_of,
    larger,
    largest_of,
    magnitude,
    over,
    plus,
    put_half,
    put_lanes,
    repeated,
    sum_of,
    times,
    zeros,
)
from ops.kernels.simd import float_at, put_float

CHUNK = 256  # positions; their values are read twice, the second time from the cache
LARGEST_HALF = 65504.0
# What compiled code knows of a row, by its place in a table of int64:
(
    ROW_MEMORY, ROW_LAYER_BYTES, ROW_VALUES_BYTES, ROW_HEAD_BYTES, ROW_KIND, ROW_LENGTH,
    ROW_FIRST, ROW_CHUNKS, ROW_FIRST_ITEM, ROW_PARTIALS, ROW_OVERFLOW,
) = range(11)  # fmt: skip
ROW_FIELDS = 11


@compiled
def normalise(x, weight, epsilon, inputs, result):
    """weight * x / sqrt(mean(x^2) + epsilon) of one row of float32, in whole pairs of lanes."""
    even, odd = zeros(), zeros()
    for i in range(0, inputs, 2 * WIDTH):
        a, b = lanes_at(x + 4 * i), lanes_at(x + 4 * (i + WIDTH))
        even, odd = fused(a, a, even), fused(b, b, odd)
    mean = sum_of(plus(even, odd)) / numpy.float32(inputs)
    factor = repeated(numpy.float32(1) / numpy.sqrt(mean + epsilon))
    for i in range(0, inputs, WIDTH):
        put_lanes(
            result + 4 * i, times(lanes_at(weight + 4 * i), times(lanes_at(x + 4 * i), factor))
        )


@compiled
def rotate(source, cosines, sines, half, dims, scale, target):
    """One head of `dims` float32 turned by `half` angles, times `scale`; see `ops.plain.rotate`.
    `target` may be `source`."""
    factor, whole = repeated(scale), half - half % WIDTH
    for i in range(0, whole, WIDTH):
        cosine, sine = lanes_at(cosines + 4 * i), lanes_at(sines + 4 * i)
        first, second = lanes_at(source + 4 * i), lanes_at(source + 4 * (i + half))
        turned = plus(times(first, cosine), times(times(second, sine), repeated(numpy.float32(-1))))
        put_lanes(target + 4 * i, times(turned, factor))
        turned = plus(times(second, cosine), times(first, sine))
        put_lanes(target + 4 * (i + half), times(turned, factor))
    for i in range(whole, half):
        cosine, sine = float_at(cosines + 4 * i), float_at(sines + 4 * i)
        first, second = float_at(source + 4 * i), float_at(source + 4 * (i + half))
        put_float(target + 4 * i, (first * cosine - second * sine) * scale)
        put_float(target + 4 * (i + half), (second * cosine + first * sine) * scale)
    for i in range(2 * half, dims):
        put_float(target + 4 * i, float_at(source + 4 * i) * scale)


@compiled
def turned(source, norm, epsilon, cosines, sines, half, dims, scale, target):
    """`rotate`, of a head that is normalised before where `norm` is not 0."""
    if norm != 0:
        normalise(source, norm, epsilon, dims, target)
        source = target
    rotate(source, cosines, sines, half, dims, scale, target)


@compiled
def keep(source, dims, kind, target):
    """Store a head's key or value, `dims` float32; whether it fits what is stored."""
    most = zeros()
    for i in range(0, dims, WIDTH):
        lanes = lanes_at(source + 4 * i)
        if kind == FLOAT16:
            most = larger(magnitude(lanes), most)
            put_half(target + 2 * i, lanes)
        else:
            put_lanes(target + 4 * i, lanes)
    return kind != FLOAT16 or largest_of(most) <= LARGEST_HALF


@compiled
def score(query, keys, ahead, kind, dims, count, scores):
    """The products of a query with `count` keys; behind them, up to whole lanes, minus infinity.
    Four keys at a time, each by itself, as one alone would be. What lies `ahead` bytes behind the
    keys is fetched meanwhile: the values, which would be waited for otherwise."""
    size = 2 if kind == FLOAT16 else 4
    stride = dims * size
    for place in range(0, count - count % 4, 4):
        first, second, third, fourth = zeros(), zeros(), zeros(), zeros()
        key = keys + place * stride
        for i in range(0, 4 * stride, LINE):
            fetch(key + ahead + i)
        for i in range(0, dims, WIDTH):
            lanes, at = lanes_at(query + 4 * i), key + i * size
            first = fused(lanes_of(at, kind), lanes, first)
            second = fused(lanes_of(at + stride, kind), lanes, second)
            third = fused(lanes_of(at + 2 * stride, kind), lanes, third)
            fourth = fused(lanes_of(at + 3 * stride, kind), lanes, fourth)
        put_float(scores + 4 * place, sum_of(first))
        put_float(scores + 4 * place + 4, sum_of(second))
        put_float(scores + 4 * place + 8, sum_of(third))
        put_float(scores + 4 * place + 12, sum_of(fourth))
    for place in range(count - count % 4, count):
        only = zeros()
        for i in range(0, dims, WIDTH):
            at = keys + place * stride + i * size
            only = fused(lanes_of(at, kind), lanes_at(query + 4 * i), only)
        put_float(scores + 4 * place, sum_of(only))
    for place in range(count, (count + WIDTH - 1) // WIDTH * WIDTH):
        put_float(scores + 4 * place, numpy.float32(-math.inf))


@compiled
def soften(scores, count):
    """Scores -> e^(score - largest) in place; (largest, their sum)."""
    most = lanes_at(scores)
    for place in range(WIDTH, count, WIDTH):
        most = larger(lanes_at(scores + 4 * place), most)
    largest = largest_of(most)
    below, total = repeated(-largest), zeros()
    for place in range(0, count, WIDTH):
        weights = exponential(plus(lanes_at(scores + 4 * place), below))
        put_lanes(scores + 4 * place, weights)
        total = plus(total, weights)
    return largest, sum_of(total)


@compiled
def mix(weights, values, kind, dims, count, result):
    """The sum of `count` values, each times its weight; `WIDTH` dims at a time, even and odd places
    by themselves."""
    size = 2 if kind == FLOAT16 else 4
    stride = dims * size
    for i in range(0, dims, WIDTH):
        even, odd, value = zeros(), zeros(), values + i * size
        for place in range(0, count - 1, 2):
            at, weight = value + place * stride, weights + 4 * place
            even = fused(lanes_of(at, kind), repeated(float_at(weight)), even)
            odd = fused(lanes_of(at + stride, kind), repeated(float_at(weight + 4)), odd)
        if count % 2:
            at, weight = value + (count - 1) * stride, weights + 4 * (count - 1)
            even = fused(lanes_of(at, kind), repeated(float_at(weight)), even)
        put_lanes(result + 4 * i, plus(even, odd))


@compiled
def attend(
    row, layer, local, qkv, cosines, sines, half, heads, kv_heads, dims, query_norm, key_norm,
    epsilon, scratch,
):  # fmt: skip
    """One chunk of one key-value head of a row, for all of its query heads.

    row: its line of the table; local: which chunk of which head; qkv: its projections, (heads + 2
    kv heads) * dims float32; query_norm, key_norm: weights that heads are normalised by, or 0;
    scratch: `dims` + `CHUNK` float32 of this thread. The item that has
    the newest position keeps the new key and value first. What each query head has of the chunk
    goes to the row's partial results: `dims` sums, the largest score, the sum of the weights.
    """
    kind, length, chunks = row[ROW_KIND], row[ROW_LENGTH], row[ROW_CHUNKS]
    kv_head, part = local // chunks, local % chunks
    size = 2 if kind == FLOAT16 else 4
    keys = row[ROW_MEMORY] + layer * row[ROW_LAYER_BYTES] + kv_head * row[ROW_HEAD_BYTES]
    values = keys + row[ROW_VALUES_BYTES]
    scores = scratch + 4 * dims
    one = numpy.float32(1)
    if part == chunks - 1:
        place = length * dims * size
        turned(
            qkv + 4 * (heads + kv_head) * dims, key_norm, epsilon, cosines, sines, half, dims, one,
            scratch,
        )  # fmt: skip
        fits = keep(scratch, dims, kind, keys + place)
        new_value = qkv + 4 * (heads + kv_heads + kv_head) * dims
        if not (keep(new_value, dims, kind, values + place) and fits):
            row[ROW_OVERFLOW] = 1
    chunk = row[ROW_FIRST] // CHUNK + part
    start, end = max(row[ROW_FIRST], chunk * CHUNK), min(length + 1, (chunk + 1) * CHUNK)
    count, skipped = end - start, start * dims * size
    group, scale = heads // kv_heads, numpy.float32(1 / math.sqrt(dims))
    for head in range(kv_head * group, (kv_head + 1) * group):
        turned(
            qkv + 4 * head * dims, query_norm, epsilon, cosines, sines, half, dims, scale, scratch
        )
        score(scratch, keys + skipped, values - keys, kind, dims, count, scores)
        largest, total = soften(scores, count)
        partial = row[ROW_PARTIALS] + 4 * (head * chunks + part) * (dims + WIDTH)
        mix(scores, values + skipped, kind, dims, count, partial)
        put_float(partial + 4 * dims, largest)
        put_float(partial + 4 * dims + 4, total)


@compiled
def merge(row, heads, dims, result):
    """The chunks of every head of a row brought together: heads * dims float32."""
    chunks, stride = row[ROW_CHUNKS], 4 * (dims + WIDTH)
    for head in range(heads):
        partials = row[ROW_PARTIALS] + head * chunks * stride
        largest = float_at(partials + 4 * dims)
        for part in range(1, chunks):
            largest = max(largest, float_at(partials + part * stride + 4 * dims))
        total = numpy.float32(0)
        for part in range(chunks):
            above = partials + part * stride + 4 * dims
            part_total = float_at(above + 4)
            put_lanes(above, exponential(repeated(float_at(above) - largest)))
            total += float_at(above) * part_total
        for i in range(0, dims, WIDTH):
            mixed = zeros()
            for part in range(chunks):
                partial = partials + part * stride
                mixed = fused(lanes_at(partial + 4 * i), lanes_at(partial + 4 * dims), mixed)
            put_lanes(result + 4 * (head * dims + i), over(mixed, repeated(total)))
