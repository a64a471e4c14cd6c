"""Qwen3 (arXiv:2505.09388): Llama's layout whose heads normalise queries and keys."""

from collections.abc import Mapping
from typing import Any

from data.chat_forms.chatml import QWEN3 as QWEN3_CHAT
from model.families.family import Family, refuse


def check(values: Mapping[str, Any]) -> None:
    refuse(values, "Qwen3", "attention_bias", "use_sliding_window")


QWEN3 = Family(
    model_type="qwen3",
    name="Qwen3",
    architecture="Qwen3ForCausalLM",
    chat_forms=(QWEN3_CHAT,),
    query_key_norm=True,
    has_window=False,  # its files name one that nothing uses
    check=check,
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
    },
)
