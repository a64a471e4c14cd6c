"""Every family of bases against transformers' own model and config, on random sizes and weights."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import (
    assert_logits_are_those_of_transformers,
    hub_model,
    logits_of,
    ours_of,
    pieces,
    some_ids,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from errors import PhiSightError
from model.base import read_family
from model.decoder import RotaryPositions
from model.families import FAMILIES

VOCABULARY = 61
KINDS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
LLAMA_32 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def small_config(
    kind: str, head_dim: int = 16, heads: int = 4, kv_heads: int = 2, hidden: int = 64,
    theta: float = 10000.0, epsilon: float = 1e-6, tied: bool = False, slowed: bool = False,
) -> PreTrainedConfig:  # fmt: skip
    """Two layers. head_dim need not be hidden / heads; slowed: Llama 3's positions."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if slowed:
        rope = LLAMA_32 | {"rope_theta": theta, "original_max_position_embeddings": 32}
    return KINDS[kind](
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=64, rms_norm_eps=epsilon, tie_word_embeddings=tied,
        rope_parameters=rope, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


configs = st.builds(
    small_config,
    kind=st.sampled_from(sorted(KINDS)),
    head_dim=st.sampled_from([16, 32, 64, 80, 128]),
    heads=st.sampled_from([4, 8]),
    kv_heads=st.sampled_from([1, 2, 4]),
    hidden=st.sampled_from([32, 64, 96]),
    theta=st.sampled_from([10000.0, 500000.0, 1000000.0]),
    epsilon=st.sampled_from([1e-6, 1e-5, 0.1]),
    tied=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(configs, st.booleans(), st.lists(st.integers(1, 60), min_size=1, max_size=4), st.data())
def test_logits_are_those_of_transformers(config, slowed, lengths, data):
    """Packed beside others, alone, and over a cache in pieces of any length."""
    if slowed and config.model_type == "llama":
        config.rope_parameters = LLAMA_32 | {"original_max_position_embeddings": 32}
    cut = data.draw(pieces(lengths[0]))
    assert_logits_are_those_of_transformers(config, VOCABULARY, lengths, cut)


def test_every_option_changes_the_logits():
    """What the comparisons would miss if an option had no effect on such a small model."""
    ids = some_ids(VOCABULARY, 40)

    def logits(**changes: Any) -> torch.Tensor:
        return logits_of(ours_of(hub_model(small_config(**{"kind": "llama"} | changes))), ids)

    plain = logits()
    for change in (
        {"slowed": True}, {"theta": 5e5}, {"epsilon": 0.1}, {"kind": "qwen2"}, {"kind": "qwen3"},
    ):  # fmt: skip
        assert (logits(**change) - plain).abs().max() > 1e-2, change


def llama_32(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        max_position_embeddings=131072, rope_parameters=dict(LLAMA_32), **more,
    )  # fmt: skip


def test_first_positions_beside_the_rotary_ones_count_as_in_transformers():
    raw = llama_32().to_dict() | {"original_max_position_embeddings": 64}
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(json.loads(json.dumps(raw))))
    ours = RotaryPositions(FAMILIES["llama"].decoder_config(raw).rope)
    assert torch.equal(ours.frequencies[0], theirs.inv_freq)
    plain = RotaryPositions(FAMILIES["llama"].decoder_config(llama_32().to_dict()).rope)
    assert not torch.equal(ours.frequencies[0], plain.frequencies[0])


def test_llama_32_turns_by_the_frequencies_of_transformers_to_the_bit():
    config = llama_32()
    decoder = FAMILIES["llama"].decoder_config(config.to_dict())
    ours, theirs = RotaryPositions(decoder.rope), LlamaRotaryEmbedding(config)
    assert torch.equal(ours.frequencies[0], theirs.inv_freq)
    plain = 1 / 500000 ** (torch.arange(0, 64, 2) / 64)
    slowed = plain / ours.frequencies[0]
    assert slowed[0] == 1 and math.isclose(slowed[-1], 32, rel_tol=1e-6) and slowed[16] < 32


@pytest.mark.parametrize("kind", FAMILIES)
def test_tensors_come_apart_as_they_were_stored(kind):
    family = FAMILIES[kind]
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    hub = AutoModelForCausalLM.from_config(config)
    assert type(hub).__name__ == family.architecture
    decoder, state = family.decoder_config(config.to_dict()), hub.state_dict()
    weights = family.from_stored(state, decoder)
    back = dict(family.to_stored(weights.items(), decoder))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


# -- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_key_that_is_absent_means_what_it_means_to_transformers(kind):
    family = FAMILIES[kind]
    full = AutoConfig.for_model(kind).to_dict()
    assert family.decoder_config({"model_type": kind}) == family.decoder_config(full)
    for key, value in family.defaults.items():
        assert full[key] == value, key


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_config_of_an_older_transformers_is_the_same(kind):
    """`rope_theta` at the top, with `rope_scaling` beside it or without; no head_dim."""
    old: dict[str, Any] = {
        "model_type": kind, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_theta": 75000.0, "rope_scaling": None,
    }  # fmt: skip
    scaled = {
        "phi3": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
        "llama": {key: value for key, value in LLAMA_32.items() if key != "rope_theta"},
    }
    olds = [old]
    if kind in scaled:
        olds.append(old | {"rope_scaling": scaled[kind], "original_max_position_embeddings": 4096})
    for raw in olds:
        config = AutoConfig.for_model(**json.loads(json.dumps(raw))).to_dict()
        if kind == "qwen3":
            raw = raw | {"head_dim": 128}
        found = FAMILIES[kind].decoder_config(raw)
        assert found == FAMILIES[kind].decoder_config(config)
        assert found.rope.theta == 75000.0
        assert bool(found.rope.stretch or found.rope.crossing) == bool(raw["rope_scaling"])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bias of attention": (
        "llama", {"attention_bias": True},
        "attention_bias: is True; Llama has it off, and so has this decoder",
    ),
    "bias of the MLP": (
        "llama", {"mlp_bias": True},
        "mlp_bias: is True; Llama has it off, and so has this decoder",
    ),
    "window": (
        "qwen2", {"use_sliding_window": True},
        "use_sliding_window: is True; Qwen2.5 has it off, and so has this decoder",
    ),
    "layers of two kinds": (
        "qwen3", {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types: are not all 'full_attention'; in this decoder every layer attends alike",
    ),
    "yarn": (
        "qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "rope_parameters: rope_type 'yarn' is not default",
    ),
    "linear": (
        "llama", {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_parameters: rope_type 'linear' is not default or llama3",
    ),
    "dynamic": (
        "phi3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_parameters: rope_type 'dynamic' is not default or longrope",
    ),
    "partial": (
        "qwen3", {"partial_rotary_factor": 0.5},
        "partial_rotary_factor: turns 64 of 128 dims of a head; Qwen3 turns all",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act: is 'gelu', Llama's is 'silu'"),
    "stretch": (
        "llama", {"rope_scaling": LLAMA_32 | {"high_freq_factor": 1.0}},
        "rope_parameters: high_freq_factor 1 is not above low_freq_factor 1",
    ),
}  # fmt: skip
REMEDY = "; restore the model's own config.json"
BASES = "'phi3' (Phi-3), 'llama' (Llama), 'qwen2' (Qwen2.5), 'qwen3' (Qwen3)"
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "no family": (
        {"model_type": "gpt_neox"},
        f"model_type is 'gpt_neox', which no family of bases has; give a model of {BASES}",
    ),
    "none at all": (
        {}, f"model_type is None, which no family of bases has; give a model of {BASES}",
    ),
    "pictures": (
        {"model_type": "qwen2_vl", "vision_config": {"depth": 32}},
        "model_type is 'qwen2_vl', a model that sees pictures itself, which no family of bases has;"
        f" give a model of {BASES}",
    ),
    "experts": (
        {"model_type": "qwen3_moe", "num_experts": 128},
        "model_type is 'qwen3_moe', a mixture of experts, which no family of bases has; give a"
        f" model of {BASES}",
    ),
    "gptq": (
        {"model_type": "qwen2", "quantization_config": {"quant_method": "gptq", "bits": 4}},
        "the weights are quantised already (quant_method 'gptq'); give the original 16-bit model",
    ),
    "awq": (
        {"model_type": "llama", "quantization_config": {"quant_method": "awq"}},
        "the weights are quantised already (quant_method 'awq'); give the original 16-bit model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [*REFUSED, *OTHERS])
def test_a_config_that_asks_for_something_else_is_one_line(case, tmp_path):
    if case in OTHERS:
        raw, message = OTHERS[case]
    else:
        kind, changes, message = REFUSED[case]
        raw, message = {"model_type": kind} | changes, message + REMEDY
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(PhiSightError) as caught:
        read_family(tmp_path)
    assert str(caught.value) == f"{path}: {message}"


def test_the_page_names_every_family_with_its_form_and_slot():
    rows = [
        line.replace("\\|", "|")
        for line in (runs.ROOT / "docs/members.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and "(`" in line
    ][1:]  # without its head
    forms = [(family, form) for family in FAMILIES.values() for form in family.chat_forms]
    assert len(rows) == len(forms)
    for row, (family, form) in zip(rows, forms, strict=True):
        assert f"(`{family.model_type}`)" in row and f"`{form.slots[0]}`" in row
        assert ("| fused |" in row) == family.is_fused
