"""The language model, whole: a decoder-only transformer (arXiv:1706.03762) as Phi-3 has it,
with the options of the other families in `model.families`.

    embedding -> layers of (norm, attention, norm, gated MLP) -> norm -> head

Parameters have the names of the hub's files, so that checkpoints and exports need no translation.
Rows hold several conversations end to end (packed); attention and rotary positions are by
conversation. With `caches` the tokens go on from those whose keys and values are known. What is
computed by more than one formula for speed lies in `ops`; transformers is the reference in tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora.layer import LoRALinear
from model.cache import KeyValues
from model.recompute import LAYERS, NOTHING, KeptProducts
from ops import operations_for
from ops.frozen import Once, at_once
from ops.head import head_logits
from ops.nf4 import memory_for
from ops.plain import causal_attention
from tensors import sent_to

WIDENED = 2**24  # keys and values that are widened at a time, for 64 MB


@dataclass(frozen=True)
class Rope:
    """Rotary positions (arXiv:2104.09864): which dims turn, and how fast."""

    theta: float
    dims: int
    """of each head that turn; the rest stay (partial rotary)"""
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    """LongRoPE (arXiv:2402.13753): what the wavelengths are multiplied by, a factor for two dims;
    the long ones in conversations of more than `crossing` tokens"""
    crossing: int | None = None
    scaling: float = 1.0
    """of cosines and sines"""
    stretch: Stretch | None = None


@dataclass(frozen=True)
class Stretch:
    """Llama 3.1's way to more positions (arXiv:2407.21783): the wavelengths are multiplied by
    `factor` where fewer than `low` of them fit into `positions`, not at all where more than `high`
    do, and gradually in between."""

    factor: float
    low: float
    high: float
    positions: int

    def __call__(self, frequencies: Tensor) -> Tensor:
        fitting = self.positions / (2 * math.pi / frequencies)
        share = (fitting - self.low) / (self.high - self.low)  # of the frequency that stays
        between = (1 - share) * frequencies / self.factor + share * frequencies
        slowed = torch.where(fitting < self.low, frequencies / self.factor, between)
        return torch.where(fitting > self.high, frequencies, slowed)


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and options of a decoder, by their names in the hub's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    sliding_window: int | None
    """how many tokens a token sees, itself among them; None for all before it"""
    rope: Rope
    qkv_bias: bool = False
    query_key_norm: bool = False
    """of each head, before it is turned (as in arXiv:2302.05442)"""

    @property
    def numbers(self) -> int:
        """Of all weights of the decoder and its head."""
        width = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        attention = width + self.num_attention_heads * self.head_dim
        layer = self.hidden_size * (attention + 3 * self.intermediate_size + 2)
        layer += width * self.qkv_bias + 2 * self.head_dim * self.query_key_norm
        tables = 1 if self.tie_word_embeddings else 2
        ends = self.hidden_size * (tables * self.vocab_size + 1)
        return self.num_hidden_layers * layer + ends

    @property
    def product_values(self) -> int:
        """Numbers for each token and layer that `model.recompute` keeps as "products"."""
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        return heads * self.head_dim + 2 * self.hidden_size + 2 * self.intermediate_size


@dataclass(frozen=True)
class Tokens:
    """Where rows have tokens: nothing is computed for the padding behind them."""

    places: Tensor
    """(tokens of all rows,) int64: row x length + column"""
    row_tokens: Sequence[int]
    """of each row"""


@dataclass(frozen=True)
class Layout:
    """Which tokens belong together: what every layer needs to know beside the states."""

    lengths: Sequence[int]
    """new tokens of each conversation and stretch of padding, in the order of the flattened rows"""
    cosines: Tensor
    sines: Tensor
    """(tokens of all rows, half of the rotary dims)"""
    caches: Sequence[KeyValues] | None
    """of each conversation: tokens attend to these too, and are added to them"""
    row_keys: Sequence[int] | None
    """a key for each row, which dropout masks are drawn by; see `RowDropout`"""
    row_tokens: Sequence[int] | None = None
    """of each row, where the rows stand one behind the other without padding; see `RowDropout`"""
    products: KeptProducts | None = None
    """of the layer, where they are kept for the backward"""


def project(
    linear: nn.Linear | LoRALinear, x: Tensor, layout: Layout, is_last: bool = False
) -> Tensor:
    """`linear(x)`; an adapter's dropout draws by the keys of the rows. is_last: of the layer, so
    that its output is needed by no backward within."""
    answering = layout.caches is not None
    once: Once = at_once
    if layout.products:
        once = layout.products.shape_only if is_last else layout.products.kept
    if isinstance(linear, LoRALinear):
        return linear(x, layout.row_keys, layout.row_tokens, once, answering)
    return operations_for(x, answering).linear(x, linear, once)


class Embedding(nn.Embedding):
    """Token ids -> states. The table may be stored in fewer bits than the states have."""

    states_dtype: torch.dtype | None = None
    """None: that of the table"""

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows if self.states_dtype is None else rows.to(self.states_dtype)


class Head(nn.Linear):
    """States -> logits in their dtype. The weight may be stored in fewer bits."""

    def forward(self, states: Tensor) -> Tensor:
        return head_logits(states, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return operations_for(x).rms_norm(x, self.weight, self.epsilon)


class RotaryPositions(nn.Module):
    """Angles of each token by its position, with LongRoPE chosen by conversation.

    A long neighbour in the row or the batch changes nothing in a short conversation; transformers
    picks one set of factors for a whole batch, by its largest position.
    """

    frequencies: Tensor

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.scaling = rope.scaling
        self.crossing = rope.crossing
        # On the CPU where the model is made on the meta device too: no file holds these numbers.
        steps = torch.arange(0, rope.dims, 2, dtype=torch.float, device="cpu") / rope.dims
        factors = [rope.short_factors, rope.long_factors] if rope.crossing else [(1.0,)]
        scales = [torch.tensor(numbers, device="cpu") for numbers in factors]
        frequencies = [1.0 / (scale * rope.theta**steps) for scale in scales]
        if rope.stretch:
            frequencies = [rope.stretch(each) for each in frequencies]
        self.register_buffer("frequencies", torch.stack(frequencies), persistent=False)

    @torch.no_grad()
    def forward(
        self, position_ids: Tensor, lengths: Sequence[int], totals: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """(tokens,) positions -> cosines and sines, (tokens, rotary dims / 2) float32.

        lengths: tokens of each conversation here; totals: of the whole conversation.
        """
        frequencies = self.frequencies  # (1 or 2, dims / 2)
        if self.crossing:
            is_long = torch.tensor([total > self.crossing for total in totals])
            which = is_long.long().repeat_interleave(
                torch.tensor(lengths), output_size=len(position_ids)
            )  # (tokens,), on the CPU
            frequencies = frequencies[sent_to(position_ids.device, which)]  # (tokens, dims / 2)
        angles = position_ids[:, None].float() * frequencies
        return angles.cos() * self.scaling, angles.sin() * self.scaling


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with fused projections."""

    def __init__(self, config: DecoderConfig, number: int) -> None:
        super().__init__()
        self.number, self.window = number, config.sliding_window
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        # In the order of transformers' module: a seed draws the adapters in the layers' order.
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.normalises = config.query_key_norm
        if self.normalises:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.rms_norm_eps) for _ in "qk")

    def rotated(self, x: Tensor, layout: Layout) -> Tensor:
        """(rows, length, dim) normed states -> (tokens, heads, head dim): queries and keys, turned
        by their positions, and values; `heads` queries and `kv_heads` of either other."""
        qkv = project(self.qkv_proj, x, layout)  # (rows, length, width)
        qkv = qkv.view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        heads = self.heads + self.kv_heads
        if self.normalises:
            query, key, value = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
            qkv = torch.cat([self.q_norm(query), self.k_norm(key), value], 1)
        return operations_for(x).rotate(qkv, layout.cosines, layout.sines, heads)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        ops = operations_for(x)
        qkv = self.rotated(x, layout)
        if layout.caches is None:
            query, key, value = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
            mixed = ops.packed_attention(query, key, value, layout.lengths, self.window)
        else:
            mixed = self.attend_to_caches(qkv, layout.caches, layout.lengths)
        mixed = mixed.reshape(*x.shape[:-1], self.heads * self.head_dim)
        return project(self.o_proj, mixed, layout)

    def attend_to_caches(
        self, qkv: Tensor, caches: Sequence[KeyValues], lengths: Sequence[int]
    ) -> Tensor:
        """Each conversation's new tokens over its own cache, (tokens, heads, dim)."""
        mixed = []
        for cache, new in zip(caches, qkv.split(list(lengths)), strict=True):
            query, key_value = new[:, : self.heads], new[:, self.heads :]
            key_value = key_value.unflatten(1, (2, self.kv_heads))  # (new, 2, kv heads, dim)
            keys, values = cache.write(self.number, key_value)
            mixed.append(attention_over_kept(query.transpose(0, 1), keys, values, self.window))
        return torch.cat(mixed, 1).transpose(0, 1)


def attention_over_kept(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """`causal_attention` over keys and values that may be kept in float16, by queries in float32:
    those of some heads at a time are widened, into memory that is used again."""
    if keys.dtype == query.dtype:
        return causal_attention(query, keys, values, window)
    heads, tokens, dim = keys.shape
    group, at_once = len(query) // heads, max(1, WIDENED // (2 * tokens * dim))
    mixed = []
    for first in range(0, heads, at_once):
        here = slice(first, first + at_once)
        count = keys[here].numel()
        wide = memory_for(2 * count)[: 2 * count].view(2, -1, tokens, dim)
        wide[0], wide[1] = keys[here], values[here]
        own = query[first * group : (first + at_once) * group]
        mixed.append(causal_attention(own, wide[0], wide[1], window))
    return torch.cat(mixed)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        both = project(self.gate_up_proj, x, layout)  # (rows, length, gate and up)
        return project(self.down_proj, operations_for(x).gated(both), layout, is_last=True)


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, number: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, number)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layout)
        return x + self.mlp(self.post_attention_layernorm(x), layout)


class Decoder(nn.Module):
    """Everything but the head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        # Not `Embedding(...)`: to draw its weights on the meta device, torch loads its compiler.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryPositions(config.rope)
        self.recomputing = NOTHING
        """in the backward of a training, layer by layer; see `model.recompute`"""
        self.cache_dtype: torch.dtype | None = None
        """of keys and values that are kept, where it is another one than that of the weights"""

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        lengths: Sequence[int],
        caches: Sequence[KeyValues] | None = None,
        row_keys: Sequence[int] | None = None,
        totals: Sequence[int] | None = None,
        tokens: Tokens | None = None,
    ) -> Tensor:
        """(rows, length, dim) embeddings -> states of the same shape, normalised for the head.

        position_ids: (rows, length); lengths, caches, row_keys: see `Layout`. Tokens that were fed
        with caches have been added to them afterwards. totals: tokens of each conversation,
        where it is fed in pieces and more are still to come; LongRoPE chooses its factors by them.
        tokens: where they stand, if `lengths` are those of conversations alone; the states of
        padding are then zeros, and nothing is computed for it.
        """
        padded = x.shape
        if tokens:
            x = x.flatten(0, 1).index_select(0, tokens.places)[None]  # (1, tokens, dim)
            position_ids = position_ids.flatten()[tokens.places]
        if totals is None:
            before = [cache.length for cache in caches] if caches else [0] * len(lengths)
            totals = [past + new for past, new in zip(before, lengths, strict=True)]
        angles = self.rotary(position_ids.flatten(), lengths, totals)
        cosines, sines = (part.to(x.dtype) for part in angles)
        row_tokens = tokens.row_tokens if tokens else None
        layout = Layout(lengths, cosines, sines, caches, row_keys, row_tokens)
        for cache, length in zip(caches or (), lengths):
            cache.reserve(length)
        for layer in self.layers:
            x = self.run_layer(layer, x, layout)
        for cache, length in zip(caches or (), lengths):
            cache.length += length
        x = self.norm(x)
        if tokens:
            empty = x.new_zeros(padded).flatten(0, 1)
            x = empty.index_copy(0, tokens.places, x[0]).view(padded)
        return x

    def run_layer(self, layer: nn.Module, x: Tensor, layout: Layout) -> Tensor:
        """`layer(x, layout)`, which keeps for its backward what `recomputing` says."""
        if self.recomputing == NOTHING or not (self.training and torch.is_grad_enabled()):
            return layer(x, layout)
        if self.recomputing == LAYERS:
            return checkpoint(layer, x, layout, use_reentrant=False)
        products = KeptProducts()
        layout = replace(layout, products=products)
        return checkpoint(layer, x, layout, use_reentrant=False, context_fn=products.contexts)

    def empty_cache(self, most: int | None = None) -> KeyValues:
        """For a sequence to be decoded, as `forward` takes it; `most`: see `KeyValues`."""
        config, weight = self.config, self.norm.weight
        return KeyValues.empty(
            config.num_hidden_layers, config.num_key_value_heads, config.head_dim,
            self.cache_dtype or weight.dtype, weight.device, most,
        )  # fmt: skip


class LanguageModel(nn.Module):
    """The decoder and its head: (…, dim) states -> (…, vocabulary) logits by `lm_head`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.compiled: object | None = None
        """what decodes it on a CPU, once it was made; see `model.compiled`"""
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding, where the two are one; after parameters were replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
