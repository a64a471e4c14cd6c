"""A Phi-3 as llama.cpp reads it: what its GGUF says of the model, and the names of its weights.

Imports neither torch nor `gguf`: `benchmarks/llama_cpp_side.py` uses it where there is no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from errors import PhiSightError

if TYPE_CHECKING:
    from model.decoder import DecoderConfig

ARCHITECTURE = "phi3"
_OF_LAYER = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
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
ROUND_TO = 256  # llama.cpp rounds contexts up to it
EMBEDDINGS = ("token_embd.weight", "output.weight")


def need_shape(config: DecoderConfig) -> None:
    """Raise `PhiSightError` for a decoder that llama.cpp's Phi-3 cannot hold."""
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise PhiSightError(
            f"--gguf: this base has {config.num_attention_heads} heads of {config.head_dim}, which"
            f" are not its width of {config.hidden_size}, and llama.cpp's Phi-3 takes no other;"
            " export it with --merge"
        )


def gguf_name(name: str) -> str:
    """The name in a GGUF of a weight as our decoder names it."""
    module, _, kind = name.rpartition(".")
    if module in _ELSEWHERE:
        return f"{_ELSEWHERE[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)  # model.layers.N.rest
    return f"blk.{layer}.{_OF_LAYER[rest]}.{kind}"


def shapes_of(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape of every weight, as torch and numpy count it, LongRoPE's factors among
    them."""
    width, inner = config.hidden_size, config.intermediate_size
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
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
            block + "attn_qkv.weight": (rows, width),
            block + "attn_output.weight": (width, config.num_attention_heads * config.head_dim),
            block + "ffn_norm.weight": (width,),
            block + "ffn_up.weight": (2 * inner, width),  # the gate first, as Phi-3 has it
            block + "ffn_down.weight": (width, inner),
        }
    return shapes | {name: (len(factors),) for name, factors in factors_of(config).items()}


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


def describe(writer: Any, config: DecoderConfig) -> None:
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
    writer.add_sliding_window(0)  # none: see `context_of`
