"""One compiled call per token through all layers of a 4-bit model, for several sequences at once.

Compiled code reads sizes and addresses from tables of int64 that are made here, once per model and,
for what changes with a token, once per call. The tensors that they point to are held here too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from numba import types
from torch import Tensor

from ops.kernels import layers as code
from ops.kernels.attention import (
    CHUNK,
    ROW_FIELDS,
    ROW_OVERFLOW,
    ROW_PARTIALS,
)
from ops.kernels.crew import COUNTERS, crew_of
from ops.kernels.dense import KINDS
from ops.kernels.lanes import WIDTH
from ops.kernels.layout import PANEL, PanelWeight

MOST_ROWS = 16  # in one call; more are several calls
KEPT = {dtype: KINDS[dtype] for dtype in (torch.float32, torch.float16)}  # keys and values
PARTS_A_THREAD = 8  # pieces of a product that a thread takes, about: so that all end together


@dataclass(frozen=True)
class Product:
    """A 4-bit layer, its bias and its adapter, if it has them: W x + bias + scaling * B (A x)."""

    weight: PanelWeight
    a: Tensor | None = None
    """(rank, inputs) float32"""
    b: Tensor | None = None
    """(outputs, rank) float32"""
    scaling: float = 1.0
    bias: Tensor | None = None
    """(outputs,) float32"""


@dataclass(frozen=True)
class LayerWeights:
    """What a layer multiplies by; norms are (hidden,) float32, those of a head (head dim,)."""

    input_norm: Tensor
    qkv: Product
    out: Product
    output_norm: Tensor
    gate_up: Product
    down: Product
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


@dataclass(frozen=True)
class Sizes:
    """Of a model, as `DecoderConfig` names them."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    window: int | None
    epsilon: float
    half: int
    """of the dims of a head that turn"""


@dataclass
class Past:
    """The keys and values of one sequence, with a place for those of its newest token."""

    memory: Tensor
    """(layers, 2, kv heads, capacity, head dim) float16 or float32, contiguous"""
    length: int
    """tokens before the newest one"""


class TokenDecoder:
    """Tables of addresses for `next_logits`, and the memory that it works in; for one thread of
    callers at a time, which a lock sees to."""

    def __init__(
        self,
        sizes: Sizes,
        layers: Sequence[LayerWeights],
        norm: Tensor,
        head: Tensor,
        threads: int,
    ) -> None:
        """norm: (hidden,) float32, of the last states; head: (vocabulary, hidden) float32, bfloat16
        or float16. All of it stays where it is."""
        self.sizes, self.threads, self.layers, self.head = sizes, threads, layers, head
        assert len(layers) * code.COUNTERS_OF_LAYER < COUNTERS and head.is_contiguous()
        self._lock = threading.Lock()
        self._norms: list[tuple[Tensor | None, ...]] = [
            (one.input_norm, one.output_norm, one.query_norm, one.key_norm) for one in layers
        ]  # in the order of the names in `ops.kernels.layers`
        self._norms.append((norm, None, None, None))
        self._kept: list[Tensor] = []  # what the tables point to and nobody else holds
        self._products = numpy.zeros((len(layers), 4, code.PRODUCT_FIELDS), numpy.int64)
        for row, layer in zip(self._products, layers, strict=True):
            for line, product in zip(row, (layer.qkv, layer.out, layer.gate_up, layer.down)):
                self._describe(line, product)
            blocks = -(-layer.down.weight.block // PANEL)  # panels of gate that fill a block
            row[[code.OUT, code.DOWN], code.RESIDUAL] = 1
            row[code.GATE_UP, code.PART] = self._part(sizes.intermediate // PANEL, blocks)
        self._norm_addresses = numpy.array(
            [[0 if part is None else part.data_ptr() for part in line] for line in self._norms]
        )
        self._plan = numpy.zeros(code.PLAN_FIELDS, numpy.int64)
        self._rows = numpy.zeros((MOST_ROWS, ROW_FIELDS), numpy.int64)
        self._partials = torch.empty(0)
        self._allocate(norm.shape[0], head)

    def _describe(self, line: numpy.ndarray, product: Product) -> None:
        """Fill a line of the table of products."""
        weight = product.weight
        line[code.CODES], line[code.BLOCK_SCALES] = (
            weight.codes.data_ptr(), weight.scales.data_ptr(),
        )  # fmt: skip
        line[code.PANELS], line[code.INPUTS] = weight.panels, weight.inputs
        line[code.BLOCK] = weight.block
        line[code.PART] = self._part(weight.panels, 1)
        if product.bias is not None:
            assert product.bias.dtype == torch.float32 and product.bias.is_contiguous()
            line[code.BIAS] = product.bias.data_ptr()
        if product.a is None or product.b is None:
            return
        # B by panels, (panels, rank, outputs of a panel), so that it is read as it lies.
        factor = (product.b.detach().float() * product.scaling).view(weight.panels, PANEL, -1)
        self._kept += [product.a.detach(), factor.transpose(1, 2).contiguous()]
        line[code.RANK] = product.a.shape[0]
        line[code.FACTOR_A], line[code.FACTOR_B] = (part.data_ptr() for part in self._kept[-2:])

    def _part(self, panels: int, multiple: int) -> int:
        """Panels that a thread takes at a time, a multiple of `multiple`."""
        parts = self.threads * PARTS_A_THREAD
        return max(1, panels // parts // multiple) * multiple

    def _allocate(self, hidden: int, head: Tensor) -> None:
        """Memory to work in, and what of the plan stays as it is."""
        sizes, plan = self.sizes, self._plan
        inputs = int(self._products[..., code.INPUTS].max())
        outputs = int(self._products[..., code.PANELS].max()) * PANEL
        rank = int(self._products[..., code.RANK].max())
        scratch = self.threads * (sizes.head_dim + CHUNK)
        self.states = torch.empty(MOST_ROWS, hidden)
        wanted = {
            code.NORMED: MOST_ROWS * inputs, code.WIDE: MOST_ROWS * outputs,
            code.LOW: MOST_ROWS * rank, code.SCRATCH: scratch,
        }  # fmt: skip
        for field, count in wanted.items():
            self._kept.append(torch.empty(count))
            plan[field] = self._kept[-1].data_ptr()
        # Two of them: what the last product takes is written while that before it is read.
        for products in (self._products[:, :3], self._products[:, 3:]):
            blocks = int((products[..., code.INPUTS] // products[..., code.BLOCK]).max())
            self._kept.append(
                torch.empty(MOST_ROWS * (2 * inputs + code.PADDING), dtype=torch.uint8)
            )
            self._kept.append(torch.empty(MOST_ROWS, blocks))
            products[..., code.QUANTISED] = self._kept[-2].data_ptr()
            products[..., code.SCALES] = self._kept[-1].data_ptr()
        plan[code.LAYERS], plan[code.HIDDEN] = len(self.layers), hidden
        plan[code.HEADS], plan[code.KV_HEADS] = sizes.heads, sizes.kv_heads
        plan[code.HEAD_DIM], plan[code.INTERMEDIATE] = sizes.head_dim, sizes.intermediate
        plan[code.VOCABULARY], plan[code.HALF] = head.shape[0], sizes.half
        plan[code.MOST_RANK], plan[code.STATES] = rank, self.states.data_ptr()
        plan[code.HEAD], plan[code.HEAD_KIND] = head.data_ptr(), KINDS[head.dtype]

    @staticmethod
    def compile() -> None:
        """Compile what `step` calls, or read it from the disk."""
        whole = types.int64
        code.next_logits.compile((
            whole, whole, whole, types.Array(whole, 1, "C"), types.Array(whole, 3, "C"),
            types.Array(whole, 2, "C"), types.Array(whole, 2, "C"), types.float32,
        ))  # fmt: skip

    def step(
        self, embeddings: Tensor, pasts: Sequence[Past], cosines: Tensor, sines: Tensor
    ) -> tuple[Tensor, list[int]]:
        """The newest token of each row -> logits of the next one, (rows, vocabulary) float32; its
        keys and values are in their place behind those of `pasts`.

        embeddings: (rows, hidden) float32; cosines, sines: (rows, half of the rotary dims) float32.
        Also returns the rows of which a key or value is beyond float16 and `memory` is of it: their
        logits are of no use, and they are to be fed again with `memory` in float32.
        """
        logits = torch.empty(len(pasts), self.head.shape[0])
        overflown: list[int] = []
        with self._lock:
            for start in range(0, len(pasts), MOST_ROWS):
                here = slice(start, start + MOST_ROWS)
                turns = cosines[here].contiguous(), sines[here].contiguous()
                self._run(embeddings[here], pasts[here], *turns, logits[here])
                flags = self._rows[: len(pasts[here]), ROW_OVERFLOW]
                overflown += (start + numpy.flatnonzero(flags)).tolist()
        return logits, overflown

    def _run(
        self, embeddings: Tensor, pasts: Sequence[Past], cosines: Tensor, sines: Tensor,
        logits: Tensor,
    ) -> None:  # fmt: skip
        plan, rows = self._plan, self._rows[: len(pasts)]
        self.states[: len(pasts)].copy_(embeddings)
        plan[code.ROWS], plan[code.ITEMS] = len(pasts), self._describe_rows(rows, pasts)
        plan[code.COSINES], plan[code.SINES] = cosines.data_ptr(), sines.data_ptr()
        plan[code.LOGITS] = logits.data_ptr()
        crew_of(self.threads).run(  # this process's own: none of another comes with a fork
            code.next_logits, plan, self._products, self._norm_addresses, rows,
            numpy.float32(self.sizes.epsilon),
        )  # fmt: skip

    def _describe_rows(self, rows: numpy.ndarray, pasts: Sequence[Past]) -> int:
        """Fill the table of rows; returns the pieces of work that attention has."""
        sizes = self.sizes
        items = chunks_of_all = 0
        for row, past in zip(rows, pasts, strict=True):
            memory, last = past.memory, past.length
            _, _, heads, capacity, dim = memory.shape
            head_bytes = capacity * dim * memory.itemsize
            first = max(0, last + 1 - sizes.window) if sizes.window else 0
            chunks = last // CHUNK - first // CHUNK + 1
            row[:] = (  # in the order of the names in `ops.kernels.attention`
                memory.data_ptr(), 2 * heads * head_bytes, heads * head_bytes, head_bytes,
                KEPT[memory.dtype], last, first, chunks, items, chunks_of_all, 0,
            )  # fmt: skip
            items += sizes.kv_heads * chunks
            chunks_of_all += chunks
        size = sizes.heads * (sizes.head_dim + WIDTH)  # of a chunk's partial results
        if self._partials.numel() < chunks_of_all * size:
            self._partials = torch.empty(chunks_of_all * size * 5 // 4)
        rows[:, ROW_PARTIALS] *= 4 * size
        rows[:, ROW_PARTIALS] += self._partials.data_ptr()
        return items
