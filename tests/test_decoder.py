"""The decoder against transformers' Phi-3, on random configs and weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import (
    assert_logits_are_those_of_transformers,
    hub_model,
    logits_of,
    ours_of,
    packed_logits,
    pieces,
    some_ids,
)
from transformers import Phi3Config

import ops
from model.cache import BLOCK, KeyValues
from ops import cpu, cpu_inference, kernels, plain
from ops.nf4 import dense_weight

VOCABULARY = 61


def small_config(
    head_dim: int = 16, heads: int = 4, kv_heads: int = 4, partial: float = 1.0, tied: bool = False,
    longrope: bool = False, window: int | None = None, layers: int = 2,
) -> Phi3Config:  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": partial}
    turned = int(head_dim * partial) // 2
    if longrope:
        rope |= {
            "rope_type": "longrope",
            "short_factor": [1.0 + n / 7 for n in range(turned)],
            "long_factor": [3.0 + n for n in range(turned)],
        }
    return Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=head_dim * heads,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        tie_word_embeddings=tied,
        sliding_window=window,
        rope_parameters=rope,
        pad_token_id=0,
    )


configs = st.builds(
    small_config,
    head_dim=st.sampled_from([16, 64, 80, 96, 128]),
    heads=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([1, 2, 4]),
    partial=st.sampled_from([0.5, 0.75, 1.0]),
    tied=st.booleans(),
    longrope=st.booleans(),
    window=st.sampled_from([None, 5, 64]),
)


@settings(max_examples=60, deadline=None)
@given(configs, st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
def test_logits_are_those_of_transformers(config, lengths, data):
    """Packed beside others, alone, and over a cache in pieces of any length."""
    # transformers' cache keeps keys that were turned by other factors; so one side of the crossing
    one_factor = config.rope_parameters["rope_type"] == "default" or lengths[0] <= 16
    cut = data.draw(pieces(lengths[0])) if one_factor else None
    assert_logits_are_those_of_transformers(config, VOCABULARY, lengths, cut)


@pytest.mark.parametrize("longrope", [False, True])
def test_logits_of_one_conversation_are_equal_to_the_bit(longrope):
    config = small_config(longrope=longrope)
    hub = hub_model(config)
    for length in (1, 2, 16, 17, 40):
        with torch.no_grad():
            expected = hub(some_ids(VOCABULARY, length)[None]).logits[0]
        assert torch.equal(logits_of(ours_of(hub), some_ids(VOCABULARY, length)), expected)


def test_parameters_have_the_names_and_the_order_of_transformers():
    """The order too: a seed draws the adapters in it, and so means the same as ever."""
    for tied in (False, True):
        hub = hub_model(small_config(tied=tied))
        assert [n for n, _ in ours_of(hub).named_parameters()] == [
            n for n, _ in hub.named_parameters()
        ]


def test_a_neighbour_changes_nothing():
    ours = ours_of(hub_model(small_config(longrope=True, kv_heads=2)))
    short, long, other = (some_ids(VOCABULARY, *given) for given in ((9,), (33,), (33, 1)))
    first, second = packed_logits(ours, short, long), packed_logits(ours, short, other)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_every_option_changes_the_logits():
    """What the comparisons above would miss if an option had no effect on such a small model."""
    ids = some_ids(VOCABULARY, 30)
    plain_one = logits_of(ours_of(hub_model(small_config())), ids)
    for option in ({"partial": 0.5}, {"longrope": True}, {"window": 5}, {"kv_heads": 2}):
        changed = logits_of(ours_of(hub_model(small_config(**option))), ids)
        assert (changed - plain_one).abs().max() > 1e-2, option


# -- the cache ------------------------------------------------------------------------------------


def filled(length: int) -> KeyValues:
    cache = KeyValues.empty(1, 2, 4, torch.float32, torch.device("cpu"))
    extend(cache, length, 1.0)
    return cache


def extend(cache: KeyValues, count: int, value: float) -> torch.Tensor:
    cache.reserve(count)
    keys, _ = cache.write(0, torch.full((count, 2, 2, 4), value))
    cache.length += count
    return keys


def test_memory_grows_by_blocks_and_is_seldom_copied():
    cache, copies, before = filled(1), 0, None
    for _ in range(2000):
        extend(cache, 1, 2.0)
        copies += cache.memory is not before
        before = cache.memory
    assert cache.memory.capacity % BLOCK == 0
    assert copies < 25 and cache.memory.capacity <= 2001 * 1.25 + BLOCK


def test_the_first_to_go_on_shares_and_the_second_copies():
    kept = filled(10)
    first, second = kept.prefix(10), kept.prefix(10)
    assert extend(first, 2, 5.0)[0, -1, 0] == 5 and first.memory is kept.memory
    assert extend(second, 2, 7.0)[0, -1, 0] == 7 and second.memory is not kept.memory
    keys = extend(first, 1, 6.0)
    assert keys[0, :, 0].tolist() == [1.0] * 10 + [5.0, 5.0, 6.0]
    assert extend(second, 1, 8.0)[0, :, 0].tolist() == [1.0] * 10 + [7.0, 7.0, 8.0]
    assert kept.length == 10


def test_a_shorter_beginning_never_writes_over_what_follows_it():
    kept = filled(10)
    extend(kept.prefix(6), 3, 9.0)
    assert extend(kept, 1, 3.0)[0, :, 0].tolist() == [1.0] * 10 + [3.0]


# -- the fast operations --------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.integers(1, 4), st.integers(0, 99)
)
def test_fast_operations_are_the_plain_ones_with_their_gradients(tokens, heads, values, half, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    angles = draw(tokens, half)
    weight = draw(2 * half + 1)
    calls = {
        "rms_norm": (draw(tokens, heads, 2 * half + 1), (weight, 1e-5)),
        "gated": (draw(tokens, heads, 2 * half), ()),
        "rotate": (draw(tokens, heads + values, 2 * half + 1), (angles.cos(), angles.sin(), heads)),
    }
    for name, (x, more) in calls.items():
        results = []
        for target in (plain, cpu):
            own = x.clone().requires_grad_()
            result = getattr(target, name)(own, *more)
            outer = torch.linspace(-1, 1, result.numel()).view(result.shape)
            (result * outer).sum().backward()
            results.append((result.detach(), own.grad))
        for expected, found in zip(*results):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_choice_of_operations_and_its_reason(monkeypatch):
    cpu_device, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert ops.choose(cpu_device, torch.float32, True) == (ops.cpu, "fused for float32 on a CPU")
    assert ops.choose(cpu_device, torch.float32, False)[0] is ops.cpu_inference
    answering = ops.choose(cpu_device, torch.float32, False, True)
    if kernels.available()[0]:
        assert answering[0] is ops.cpu_answering and kernels.available()[1] in answering[1]
    monkeypatch.setattr(kernels, "available", lambda: ("", "switched off"))
    assert ops.choose(cpu_device, torch.float32, False, True)[0] is ops.cpu_inference
    assert ops.choose(cpu_device, torch.bfloat16, True)[0] is ops.plain
    for capability, expected in (((7, 5), ops.plain), ((8, 0), ops.cuda), ((9, 0), ops.cuda)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert ops.choose(gpu, torch.float16, True)[0] is expected
        assert ops.choose(gpu, torch.float32, True)[0] is ops.plain


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_attention_of_a_gpu_is_asked_for_what_the_plain_one_computes(
    window, kv_heads, monkeypatch
):
    """Its kernel is written out here as flash attention is defined; no GPU has run this test."""
    lengths, generator = [5, 1, 9, 3], torch.Generator().manual_seed(0)

    def varlen_attn(query, key, value, begins, key_begins, longest, longest_key, **options):
        assert begins.dtype == torch.int32 and begins is key_begins
        assert longest == longest_key == max(lengths) and query.is_contiguous()
        left, right = options["window_size"]
        assert options["enable_gqa"] == (kv_heads < 4) and right == 0
        place = torch.arange(len(query))
        which = torch.bucketize(place, begins[1:], right=True)
        back = place[:, None] - place  # how far behind a query a key lies
        seen = (which[:, None] == which) & (back >= 0) & ((back <= left) | (left < 0))
        by_head = [part.transpose(0, 1) for part in (query, key, value)]
        return torch.nn.functional.scaled_dot_product_attention(
            *by_head, attn_mask=seen, enable_gqa=options["enable_gqa"]
        ).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    shapes = [(sum(lengths), heads, 8) for heads in (4, kv_heads, kv_heads)]
    qkv = [torch.randn(shape, generator=generator) for shape in shapes]
    expected = plain.packed_attention(*qkv, lengths, window)
    for _ in range(2):  # the second time, where the conversations begin is known
        found = ops.cuda.packed_attention(*qkv, lengths, window)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (128, 40), (192, 65)])
def test_a_dense_weight_is_the_one_of_bitsandbytes_in_memory_of_its_thread(inputs, outputs, nested):
    layers = []
    for seed in range(2):
        layer = bnb.nn.Linear4bit(
            inputs, outputs, bias=False, compress_statistics=nested, quant_type="nf4",
            compute_dtype=torch.float32,
        )  # fmt: skip
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
        layer.load_state_dict({"weight": weight})
        layers.append(layer.to("cpu"))
    expected = [
        bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for layer in layers
    ]
    first = dense_weight(layers[0], torch.float32)
    assert torch.equal(first, expected[0])
    with ThreadPoolExecutor(1) as other:  # what it asks for does not touch what this thread holds
        there = other.submit(lambda: dense_weight(layers[1], torch.float32).clone()).result()
    assert torch.equal(there, expected[1]) and torch.equal(first, expected[0])
    assert torch.equal(dense_weight(layers[1], torch.float32), expected[1])
    x = torch.randn(3, 2, inputs, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        torch.testing.assert_close(cpu_inference.linear(x, layers[0]), layers[0](x))
