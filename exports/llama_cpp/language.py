"""A base as llama.cpp reads it: what its GGUF says of the model, and the names of its weights.

llama.cpp has an architecture of its own for each family. What tells them apart is one line of
`ARCHITECTURES` each.

Imports neither torch nor `gguf`: `benchmarks/llama_cpp_side.py` uses it where there is no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errors import PhiSightError

if TYPE_CHECKING:
    from torch import Tensor

    from model.decoder import DecoderConfig


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a family of bases, and what it does otherwise than others."""

    name: str
    is_fused: bool = False
    """whether queries, keys and values are one weight, and gate and up another"""
    any_heads: bool = True
    """whether its heads may be of another size together than the model is wide"""
    partly_turned: bool = False
    """whether a part of each head may stay unturned"""
    neighbours: bool = False
    """whether dims 0 and 1 of a head turn together, and not 0 and the one half a head on: rows of
    queries and keys are then stored in that order"""
    has_longrope: bool = False
    has_factors: bool = False
    """whether it reads a factor for each frequency, as Llama 3.1 needs them"""


ARCHITECTURES = {
    "phi3": Architecture(
        "phi3", is_fused=True, any_heads=False, partly_turned=True, has_longrope=True
    ),
    "llama": Architecture("llama", neighbours=True, has_factors=True),
    "qwen2": Architecture("qwen2", any_heads=False),
    "qwen3": Architecture("qwen3"),
}
"""by the model_type of a config.json"""
PHI3 = ARCHITECTURES["phi3"]
_OF_LAYER = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_ELSEWHERE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
FREQUENCIES = "rope_freqs.weight"
ROUND_TO = 256  # llama.cpp rounds contexts up to it
EMBEDDINGS = ("token_embd.weight", "output.weight")


def architecture_for(model_type: str, config: DecoderConfig) -> Architecture:
    """llama.cpp's architecture for a base. Raises `PhiSightError` for one that it cannot hold."""
    if model_type not in ARCHITECTURES:
        raise PhiSightError(
            f"--gguf: this base is a {model_type}, and what is proven with llama.cpp is"
            f" {', '.join(ARCHITECTURES)}; export it with --merge or --llava"
        )
    found, rope = ARCHITECTURES[model_type], config.rope
    theirs = f"and llama.cpp's {found.name} takes no other; export it with --merge or --llava"
    if not found.any_heads and config.head_dim * config.num_attention_heads != config.hidden_size:
        raise PhiSightError(
            f"--gguf: this base has {config.num_attention_heads} heads of {config.head_dim}, which"
            f" are not its width of {config.hidden_size}, {theirs}"
        )
    if not found.partly_turned and rope.dims != config.head_dim:
        raise PhiSightError(
            f"--gguf: this base turns {rope.dims} of {config.head_dim} dims of a head, which are"
            f" not all, {theirs}"
        )
    kinds = {
        "LongRoPE": bool(rope.long_factors) and not found.has_longrope,
        "llama3's rotary positions": bool(rope.stretch) and not found.has_factors,
    }
    if wrong := [name for name, is_wrong in kinds.items() if is_wrong]:
        raise PhiSightError(
            f"--gguf: this base has {wrong[0]}, and llama.cpp's {found.name} has the usual rotary"
            " positions alone; export it with --merge or --llava"
        )
    return found


def gguf_name(name: str) -> str:
    """The name in a GGUF of a weight as our decoder names it."""
    module, _, kind = name.rpartition(".")
    if module in _ELSEWHERE:
        return f"{_ELSEWHERE[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)  # model.layers.N.rest
    return f"blk.{layer}.{_OF_LAYER[rest]}.{kind}"


def shapes_of(
    config: DecoderConfig, architecture: Architecture = PHI3
) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape of every weight, as torch and numpy count it, the factors of rotary
    positions among them."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    # The gate first, as Phi-3 has it.
    projections = {"attn_qkv": (queries + 2 * keys, width), "ffn_up": (2 * inner, width)}
    if not architecture.is_fused:
        projections = {
            "attn_q": (queries, width),
            "attn_k": (keys, width),
            "attn_v": (keys, width),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, width),
        "output_norm.weight": (width,),
    }
    if not config.tie_word_embeddings:
        shapes["output.weight"] = (config.vocab_size, width)
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}."
        shapes |= {
            block + "attn_norm.weight": (width,),
            block + "attn_output.weight": (width, queries),
            block + "ffn_norm.weight": (width,),
            block + "ffn_down.weight": (width, inner),
        }
        shapes |= {f"{block}{name}.weight": shape for name, shape in projections.items()}
        if config.qkv_bias:
            shapes |= {
                f"{block}{name}.bias": shape[:1]
                for name, shape in projections.items()
                if name.startswith("attn")
            }
        if config.query_key_norm:
            shapes |= {f"{block}attn_{part}_norm.weight": (head,) for part in "qk"}
    if config.rope.stretch:
        shapes[FREQUENCIES] = (config.rope.dims // 2,)
    return shapes | {name: (len(factors),) for name, factors in factors_of(config).items()}


def in_pairs(name: str, rows: Tensor, config: DecoderConfig) -> Tensor:
    """Rows of the weight of queries or keys as an architecture of `neighbours` has them; any other
    weight as it is. `name`: in a GGUF."""
    kind = name.split(".")[-2]
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(kind)
    if heads is None:
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def factors_of(config: DecoderConfig) -> dict[str, tuple[float, ...]]:
    """GGUF name -> LongRoPE's factors, where the base has them."""
    rope = config.rope
    return {LONG: rope.long_factors, SHORT: rope.short_factors} if rope.long_factors else {}


def context_of(config: DecoderConfig) -> int:
    """Tokens of the longest conversation that llama.cpp computes as we do: it has no sliding window
    for Phi-3, and attends to everything."""
    return min(config.max_position_embeddings, config.sliding_window or 2**31)


def usual_context(config: DecoderConfig) -> int:
    """Tokens up to which the factors of LongRoPE are the short ones. llama.cpp takes the long ones
    for every conversation of a larger context; we choose by conversation."""
    return min(context_of(config), config.rope.crossing or 2**31)


def context_for(tokens: int) -> int:
    """Of the context that llama.cpp makes for so many tokens."""
    return -(-tokens // ROUND_TO) * ROUND_TO


def context_note(config: DecoderConfig, tokens: int) -> str:
    """Why llama.cpp, asked conversations of up to so many tokens, computes otherwise than we do;
    else nothing."""
    if tokens > context_of(config):
        return (
            f"it was asked conversations of up to {tokens} tokens, and llama.cpp, which has no"
            f" sliding window, computes this base as we do up to {context_of(config)}"
        )
    crossing, context = config.rope.crossing, context_for(tokens)
    if crossing and context > crossing:
        return (
            f"it was asked in a context of {context} tokens, and llama.cpp takes LongRoPE's long"
            f" factors for all in one of more than {crossing}"
        )
    return ""


def describe(writer: Any, config: DecoderConfig, architecture: Architecture = PHI3) -> None:
    """Write the sizes and options of the decoder. `writer`: a `gguf.GGUFWriter`."""
    rope = config.rope
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_of(config))
    writer.add_rope_scaling_orig_ctx_len(rope.crossing or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(rope.dims)
    writer.add_rope_freq_base(rope.theta)
    if rope.long_factors:
        writer.add_rope_scaling_attn_factors(rope.scaling)
    if architecture is PHI3:
        writer.add_sliding_window(0)  # none: see `context_of`
    else:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
