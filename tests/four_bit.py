"""Language models of random 4-bit weights and adapters, and the same in plain float32."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Phi3Config, PreTrainedConfig

from lora.inject import inject
from lora.merge import merged_state
from model.base import finish, language_model, put, swap_linear_layers
from model.decoder import LanguageModel
from model.families import FAMILIES
from model.families.fused import fused_parts

VOCABULARY = 83
LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def small_config(kind: type[PreTrainedConfig] = Phi3Config, **options: object) -> PreTrainedConfig:
    """Two layers of four heads of 16 numbers."""
    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,  # no multiple of 64: blocks of 32
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "original_max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "sliding_window": None,
    }
    return kind(**given | options)


def four_bit_model(
    config: PreTrainedConfig, targets: tuple[str, ...] = (), nested: bool = False,
    value_scale: float = 1.0, rounds: bool = False,
) -> LanguageModel:  # fmt: skip
    """Of random weights; `targets`: layers with an adapter, which is not zero; `value_scale`: of
    the values that are kept; `rounds`: as `--merge-rounding nf4`."""
    generator = torch.Generator().manual_seed(0)
    decoder = FAMILIES[config.model_type].decoder_config(config.to_dict())
    with torch.device("meta"):
        model = LanguageModel(decoder)
    swap_linear_layers(model, torch.float32, nested)
    for name, parameter in list(model.named_parameters()):
        module = model.get_submodule(name.rpartition(".")[0])
        linear = isinstance(module, nn.Linear) and name.endswith("_proj.weight")
        shape = (module.out_features, module.in_features) if linear else parameter.shape
        drawn = torch.randn(*shape, generator=generator) * 0.13
        if "norm" in name:
            drawn += 1
        if "qkv_proj" in name:
            drawn[-decoder.num_key_value_heads * decoder.head_dim :] *= value_scale
        put(model, name, drawn, torch.float32, torch.device("cpu"))
    finish(model, torch.device("cpu"))
    if targets:
        dropout = 0.0 if rounds else 0.1
        parts = fused_parts(decoder)
        made = inject(model, targets, 5, 10, dropout, generator, rounds, fused=parts)
        for layer in made.values():
            for name, parameter in layer.named_parameters():
                if name.endswith("lora_B"):
                    nn.init.normal_(parameter, std=0.1, generator=generator)
        model.requires_grad_(False)
        model.eval()
    return model


def plain_model(model: LanguageModel) -> LanguageModel:
    """The same with its weights dequantised and its adapters merged: nothing of the kernels."""
    tied = model.config.tie_word_embeddings
    state = {n: t for n, t in merged_state(model) if not (tied and n == "lm_head.weight")}
    return language_model(model.config, state.items())
