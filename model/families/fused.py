"""Projections that one layer computes together, and their parts by the names of those who do not.

The decoder multiplies once for queries, keys and values, and once for gate and up, as Phi-3 does.
Llama and Qwen store an own weight for each part; laid below each other, they are ours.
"""

from __future__ import annotations

from model.decoder import DecoderConfig

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}


def part_sizes(config: DecoderConfig) -> dict[str, int]:
    """Rows of each part in the weight of its fused projection."""
    keys = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": config.num_attention_heads * config.head_dim,
        "k_proj": keys,
        "v_proj": keys,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
    }


def parts_of(name: str, config: DecoderConfig) -> dict[str, int]:
    """Names and rows of the tensors that the parameter `name` is made of, in their order: those of
    its parts. Empty for a parameter that is not of a fused projection."""
    layer, _, kind = name.rpartition(".")  # …self_attn.qkv_proj, weight
    place, _, projection = layer.rpartition(".")
    rows = part_sizes(config)
    return {f"{place}.{part}.{kind}": rows[part] for part in PARTS.get(projection, ())}


def fused_parts(config: DecoderConfig) -> dict[str, dict[str, int]]:
    """Fused projection -> its parts in the order of its rows, and how many each has."""
    rows = part_sizes(config)
    return {fused: {part: rows[part] for part in parts} for fused, parts in PARTS.items()}


def whole_of(name: str) -> str:
    """`…qkv_proj` of an adapter's `…qkv_proj.q_proj`; empty for the name of no such part."""
    layer, _, part = name.rpartition(".")
    return layer if layer.rpartition(".")[2] == FUSED.get(part) else ""


def rows_of(part: str, config: DecoderConfig) -> slice:
    """Where the rows of a part lie in its fused projection."""
    start = 0
    for name, count in fused_parts(config)[FUSED[part]].items():
        if name == part:
            break
        start += count
    return slice(start, start + count)
