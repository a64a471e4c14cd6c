"""Qwen2 and Qwen2.5 (arXiv:2412.15115): Llama's layout with biases for queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from data.chat_forms.chatml import QWEN25
from model.families.family import Family, refuse


def check(values: Mapping[str, Any]) -> None:
    refuse(values, "Qwen2.5", "use_sliding_window")


QWEN2 = Family(
    model_type="qwen2",
    name="Qwen2.5",
    architecture="Qwen2ForCausalLM",
    chat_forms=(QWEN25,),
    qkv_bias=True,
    has_window=False,  # its files name one that nothing uses
    check=check,
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
    },
)
