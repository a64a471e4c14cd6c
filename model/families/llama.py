"""Llama 3.1 and 3.2, and what has their layout, such as SmolLM2: an own weight for each part."""

from collections.abc import Mapping
from typing import Any

from data.chat_forms.chatml import SMOLLM2
from data.chat_forms.llama3 import LLAMA3
from model.families.family import Family, refuse


def check(values: Mapping[str, Any]) -> None:
    refuse(values, "Llama", "attention_bias", "mlp_bias", "sliding_window")


LLAMA = Family(
    model_type="llama",
    name="Llama",
    architecture="LlamaForCausalLM",
    chat_forms=(LLAMA3, SMOLLM2),
    check=check,
    rope_kinds={"default": "default", "llama3": "llama3"},
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    },
)
