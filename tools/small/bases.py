"""Bases of every family, small and with random weights, in the hub's own folder layout.

They are for tests, and for trying each base with each encoder. What a family's real models have is
here too: its rotary positions, heads that share keys and values, a tied head, biases, norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from documents import read_json
from tools.small.tokenizers import write_tokenizer

SIZES = {
    "vocab_size": 576,  # as of the real ones, some more than the tokenizer has
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class SmallBase:
    """What the real models of this name have, over `SIZES`."""

    config: type[PreTrainedConfig]
    chat: str
    """the name of its chat form"""
    options: Mapping[str, Any]


def longrope(turned: int, **more: float) -> dict[str, Any]:
    """LongRoPE as Phi's files have it, for heads of which `turned` dims turn."""
    pairs = range(turned // 2)
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + pair / 16 for pair in pairs],
        "long_factor": [1.0 + 4.0 * pair for pair in pairs],
        "original_max_position_embeddings": 4096,
        **more,
    }


PHI = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 262144,
    "rms_norm_eps": 1e-5,
}
BASES: Mapping[str, SmallBase] = {
    "phi-3.5": SmallBase(
        Phi3Config,
        "phi3",
        PHI | {"num_key_value_heads": 4, "rope_parameters": longrope(16)},
    ),
    "phi-4-mini": SmallBase(
        Phi3Config,
        "phi4",
        PHI
        | {
            "tie_word_embeddings": True,
            "rope_parameters": longrope(12, partial_rotary_factor=0.75),
        },
    ),
    "llama-3.2": SmallBase(
        LlamaConfig,
        "llama3",
        {
            "tie_word_embeddings": True,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "smollm2": SmallBase(
        LlamaConfig,
        "smollm2",
        {
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "qwen2.5": SmallBase(
        Qwen2Config,
        "qwen2.5",
        {
            "tie_word_embeddings": True,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "qwen3": SmallBase(
        Qwen3Config,
        "qwen3",
        {
            "tie_word_embeddings": True,
            "head_dim": 32,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
}


def write_base(name: str, folder: str | Path, seed: int = 0, **options: Any) -> Path:
    """Write the tokenizer of its chat form, and config.json and model.safetensors (bfloat16) by
    transformers' own `save_pretrained`; return the folder.

    Args:
        name: of `BASES`.
        seed: what every weight is drawn from; biases are not zero and norms not one.
        options: fields of transformers' config, in place of the small ones.
    """
    base, folder = BASES[name], Path(folder)
    write_tokenizer(base.chat, folder, SIZES["vocab_size"])
    config = base.config(**SIZES | marked(folder) | dict(base.options) | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def marked(folder: Path) -> dict[str, int | None]:
    """The ids of config.json by what tokenizer_config.json names."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    named = read_json(folder / "tokenizer_config.json")
    marks = {kind: named.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    return {f"{k}_token_id": mark and tokenizer.token_to_id(mark) for k, mark in marks.items()}
