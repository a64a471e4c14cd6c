"""Gradients of adapters through a frozen base, for each family: against autograd in transformers'
model, whose weights are there what the adapters make of them."""

from __future__ import annotations

import pytest
import torch
from four_bit import LINEAR, VOCABULARY, four_bit_model, small_config
from random_model import assert_near, hub_model, ours_of, some_ids
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig, Qwen2Config, Qwen3Config

import ops
from lora.inject import inject
from lora.layer import LoRALinear
from lora.merge import merged_state
from model.decoder import LanguageModel
from model.families import FAMILIES
from model.recompute import LAYERS, NOTHING, PRODUCTS
from ops import kernels
from ops.nf4 import base_weight

KINDS = {
    "phi3": (Phi3Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, {"num_key_value_heads": 1}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 32}),
}


def config_of(kind: str) -> PreTrainedConfig:
    own, options = KINDS[kind]
    return small_config(own, **options)


def adapted(kind: str, quantised: bool) -> LanguageModel:
    if quantised:
        return four_bit_model(config_of(kind), targets=LINEAR)
    model, generator = ours_of(hub_model(config_of(kind))), torch.Generator().manual_seed(0)
    for layer in inject(model, LINEAR, 5, 10, 0.0, generator).values():
        nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
    return model.eval()


def factors_of(model: LanguageModel) -> dict[str, Tensor]:
    """A and B of every adapter, which are to have gradients."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert len(layers) == 2 * len(LINEAR)
    factors = {f"{n}.{part}": getattr(m, part) for n, m in layers.items()
               for part in ("lora_A", "lora_B")}  # fmt: skip
    return {name: factor.requires_grad_() for name, factor in factors.items()}


def gradients_of(model: LanguageModel, lengths: list[int], **options: object) -> dict[str, Tensor]:
    """Of the adapters and of the embeddings, by a sum over all logits."""
    factors = factors_of(model)
    ids = torch.cat([some_ids(VOCABULARY, length) for length in lengths])[None]
    x = model.model.embed_tokens(ids).detach().requires_grad_()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    loss = loss_of(model.lm_head(model.model(x, positions, lengths, **options))[0].float())
    found = torch.autograd.grad(loss, [*factors.values(), x])
    return dict(zip([*factors, "embeddings"], found, strict=True))


def loss_of(logits: Tensor) -> Tensor:
    return -logits.log_softmax(-1)[:, 7].sum()


def expected_gradients(model: LanguageModel, kind: str, length: int) -> dict[str, Tensor]:
    """By transformers' model with weights that are computed from A and B."""
    family, config, hub = FAMILIES[kind], config_of(kind), hub_model(config_of(kind))
    factors, weights = factors_of(model), {}
    for name, tensor in merged_state(model):
        weights[name] = tensor.detach()
        if f"{name.removesuffix('weight')}lora_A" in factors and name.endswith("weight"):
            layer = model.get_submodule(name.removesuffix(".weight"))
            delta = layer.scaling * layer.lora_B @ layer.lora_A
            weights[name] = base_weight(layer.base) + delta
    x = model.model.embed_tokens(some_ids(VOCABULARY, length)[None]).detach().requires_grad_()
    stored = dict(family.to_stored(weights.items(), family.decoder_config(config.to_dict())))
    logits = functional_call(hub, stored, (), {"inputs_embeds": x}, tie_weights=False).logits[0]
    found = torch.autograd.grad(loss_of(logits), [*factors.values(), x])
    return dict(zip([*factors, "embeddings"], found, strict=True))


@pytest.mark.parametrize("target", ["cpu", "plain"])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_transformers(kind, quantised, target, monkeypatch):
    if target == "plain":
        monkeypatch.setattr(kernels, "available", lambda: ("", "switched off"))
        monkeypatch.setattr(ops, "choose", lambda *_: (ops.plain, "for this test"))
    model = adapted(kind, quantised)
    expected = expected_gradients(model, kind, 30)
    found = gradients_of(model, [30])
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3, name
        assert_near(found[name], gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_for_the_backward_changes_no_gradient(kind):
    """With dropout, two conversations in a row, and 4-bit weights."""
    model = adapted(kind, quantised=True).train()
    found = {}
    for mode in (NOTHING, PRODUCTS, LAYERS):
        model.model.recomputing = mode
        found[mode] = gradients_of(model, [9, 20], row_keys=[3])
    for mode in (PRODUCTS, LAYERS):
        for name, gradient in found[NOTHING].items():
            assert torch.equal(found[mode][name], gradient), (mode, name)
    other = gradients_of(model, [9, 20], row_keys=[4])
    assert not torch.equal(other["embeddings"], found[NOTHING]["embeddings"])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_computed_as_transformers_does(kind):
    hub = hub_model(config_of(kind)).bfloat16()
    ours = ours_of(hub)
    ids = some_ids(VOCABULARY, 40)
    with torch.no_grad():
        expected, states = hub(ids[None]).logits[0], ours.model.embed_tokens(ids[None])
        found = ours.lm_head(ours.model(states, torch.arange(40)[None], [40]))[0]
    assert found.dtype == expected.dtype == torch.bfloat16
    exact = hub.float()(ids[None]).logits[0]
    error, own = (found - exact).norm(), (expected - exact).norm()
    assert error < 1.2 * own and own / exact.norm() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_and_answering_are_near_to_the_formulas(kind):
    """Whole conversations by `cpu_inference`, and prompts read into a cache by `cpu_answering`."""
    model = adapted(kind, quantised=True)
    ids = some_ids(VOCABULARY, 40)
    x, positions = model.model.embed_tokens(ids[None]), torch.arange(40)[None]
    exact = model.lm_head(model.model(x, positions, [40])).detach()  # `cpu`: with a gradient
    with torch.no_grad():
        assert_near(model.lm_head(model.model(x, positions, [40])), exact)
        answering = model.lm_head(model.model(x, positions, [40], [model.model.empty_cache()]))
    assert (answering - exact).abs().max() < 3e-3 * exact.abs().max()
    if kernels.available()[0]:
        assert not torch.equal(answering, exact)
