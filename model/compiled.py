"""Decoding on a CPU by one compiled call per token, where a model is what the kernels take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora.layer import LoRALinear
from model.cache import KeyValues
from model.decoder import DecoderLayer, LanguageModel
from ops.kernels import PANEL, available
from ops.nf4 import PanelLinear

if TYPE_CHECKING:
    from ops.kernels.token import Product

CACHE_DTYPE = torch.float16
LANES = 16  # numbers of a head that are read at once
MOST_LAYERS = 100  # for which a crew has counters


class CompiledDecoder:
    """The newest tokens of several sequences through a whole model, without Python in between.

    It reads weights where they lie, and holds a copy of B of every adapter in another order: after
    an adapter was changed, `is_current` says so, and another one is to be made.
    """

    def __init__(self, model: LanguageModel) -> None:
        from ops.kernels.compiling import prepare  # numba takes a second to import
        from ops.kernels.linear import threads_for
        from ops.kernels.token import LayerWeights, Sizes, TokenDecoder

        config, decoder = model.config, model.model
        self.rotary, self.adapters = decoder.rotary, adapters_of(model)
        self._seen = [adapter.version() for adapter in self.adapters]
        layers = []
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            qkv, out, gate_up, down = (product_of(linear) for linear in linears_of(layer))
            attention = layer.self_attn
            first, second = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            of_heads = [attention.q_norm, attention.k_norm] if attention.normalises else []
            layers.append(LayerWeights(
                first.detach(), qkv, out, second.detach(), gate_up, down,
                *(norm.weight.detach() for norm in of_heads),
            ))  # fmt: skip
        self._work = sum(m.in_features * m.out_features for m in linear_layers(model))  # of a token
        sizes = Sizes(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            config.intermediate_size, config.sliding_window, config.rms_norm_eps,
            config.rope.dims // 2,
        )  # fmt: skip
        prepare("the decoder", TokenDecoder.compile)
        self._tokens = TokenDecoder(
            sizes, layers, decoder.norm.weight.detach(), model.lm_head.weight.detach(),
            threads_for(self._work),
        )  # fmt: skip

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a model makes its own: this one has the addresses of the weights."""

    @property
    def is_current(self) -> bool:
        """Whether adapters and the number of threads are those that it was made with."""
        from ops.kernels.linear import threads_for

        threads = threads_for(self._work)
        seen = [adapter.version() for adapter in self.adapters]
        return self._tokens.threads == threads and self._seen == seen

    @torch.no_grad()
    def step(
        self, embeddings: Tensor, caches: Sequence[KeyValues], totals: Sequence[int]
    ) -> Tensor:
        """(rows, dim) embeddings of a new token behind each of `caches`, to which it is added ->
        the logits of the next one, (rows, vocabulary) float32. totals: see `Decoder.forward`."""
        from ops.kernels.token import Past

        for cache in caches:
            cache.reserve(1)
        positions = torch.tensor([cache.length for cache in caches])
        cosines, sines = self.rotary(positions, [1] * len(caches), totals)
        overflown: list[int] | None = None
        while overflown is None or overflown:
            pasts = [Past(cache.memory.tensor, cache.length) for cache in caches]
            logits, overflown = self._tokens.step(embeddings, pasts, cosines, sines)
            for index in overflown:  # what was written is written again
                caches[index].widen()
        for cache in caches:
            cache.length += 1
        return logits


def compiled_for(model: LanguageModel) -> tuple[CompiledDecoder | None, str]:
    """The one place where decoding is chosen: by compiled code, or None for PyTorch; and the reason
    in words, for the log. From the first time on, the model's keys and values are in float16."""
    reason = obstacle(model)
    if reason:
        model.compiled, model.model.cache_dtype = None, None
        return None, f"a token by PyTorch, layer by layer: {reason}"
    if not isinstance(model.compiled, CompiledDecoder) or not model.compiled.is_current:
        model.compiled = CompiledDecoder(model)
    model.model.cache_dtype = CACHE_DTYPE
    return (
        model.compiled,
        f"a token in one compiled call: 4-bit weights on a CPU by {available()[1]}",
    )


def obstacle(model: LanguageModel) -> str:
    """Why compiled code cannot decode this model; empty if it can."""
    target, why = available()
    if not target:
        return why
    weight, config = model.model.norm.weight, model.config
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"computes in {weight.dtype} on {weight.device.type}, not in float32 on a CPU"
    for name, linear in model.model.layers.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if not isinstance(linear, PanelLinear):
            return f"{name} is not in the order of the 4-bit kernels"
        if linear.out_features % PANEL:
            return f"{name} has {linear.out_features} outputs, not a multiple of {PANEL}"
    if config.head_dim % LANES:
        return f"heads of {config.head_dim} numbers, not a multiple of {LANES}"
    if config.query_key_norm and config.head_dim % (2 * LANES):
        return f"normalised heads of {config.head_dim} numbers, not a multiple of {2 * LANES}"
    head = model.lm_head
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return "its head has a bias or an adapter"
    if config.num_hidden_layers > MOST_LAYERS:
        return f"{config.num_hidden_layers} layers are more than {MOST_LAYERS}"
    return ""


def linears_of(layer: DecoderLayer) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """In the order in which a token goes through them."""
    attention, mlp = layer.self_attn, layer.mlp
    return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj


def product_of(module: nn.Module) -> Product:
    """A layer's weight in the order of the kernels, with its adapter, which may be part of it."""
    from ops.kernels.token import Product

    if isinstance(module, LoRALinear) and not module.rounds:
        assert isinstance(module.base, PanelLinear)
        factors = *module.factors(), module.scaling.item()
        return Product(module.base.panels, *factors, bias=bias_of(module.base))
    linear = module.rounded() if isinstance(module, LoRALinear) else module
    assert isinstance(linear, PanelLinear)
    return Product(linear.panels, bias=bias_of(linear))


def bias_of(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def linear_layers(model: nn.Module) -> Iterator[nn.Linear]:
    return (module for module in model.modules() if isinstance(module, nn.Linear))


def adapters_of(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]
