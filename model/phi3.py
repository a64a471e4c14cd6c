"""The Phi-3 family: how its config.json maps to the decoder's options.

Another family of base models is one more file like this and one line in `model.base.FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeGuard

from errors import PhiSightError
from model.decoder import DecoderConfig, Rope

# The defaults of transformers' Phi3Config: what a config.json that lacks a key means.
DEFAULTS: dict[str, object] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
}


def decoder_config(raw: Mapping[str, object]) -> DecoderConfig:
    """The decoder that a Phi-3 config.json describes, in the form of any version of transformers.

    Raises:
        PhiSightError: a value is missing, of a wrong type or out of range, or asks for something
            that this decoder does not have. The message begins with the key.
    """
    values = DEFAULTS | dict(raw)
    heads = whole_number(values, "num_attention_heads")
    hidden = whole_number(values, "hidden_size")
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim") is None:
        if hidden % heads:
            raise PhiSightError(f"hidden_size: {hidden} is not a multiple of {heads} heads")
        values["head_dim"] = hidden // heads
    if heads % whole_number(values, "num_key_value_heads"):
        raise PhiSightError(
            f"num_key_value_heads: {values['num_key_value_heads']} does not divide {heads} heads"
        )
    if values["hidden_act"] != "silu":
        raise PhiSightError(f"hidden_act: is {values['hidden_act']!r}, Phi-3's is 'silu'")
    for name in ("attention_dropout", "embd_pdrop", "resid_pdrop"):
        if values[name] != 0:
            raise PhiSightError(f"{name}: is {values[name]!r}; a frozen base has no dropout, set 0")
    window = values["sliding_window"]
    return DecoderConfig(
        vocab_size=whole_number(values, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=whole_number(values, "intermediate_size"),
        num_hidden_layers=whole_number(values, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=whole_number(values, "num_key_value_heads"),
        head_dim=whole_number(values, "head_dim"),
        rms_norm_eps=number(values, "rms_norm_eps"),
        max_position_embeddings=whole_number(values, "max_position_embeddings"),
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        sliding_window=None if window is None else whole_number(values, "sliding_window"),
        rope=rope_of(values),
    )


def rope_of(values: dict[str, object]) -> Rope:
    """Its rotary positions, from `rope_parameters` or the older `rope_scaling` and `rope_theta`."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise PhiSightError("rope_parameters: is not an object")
    known = {name: values[name] for name in ("rope_theta", "partial_rotary_factor")}
    rope = {**known, **{name: value for name, value in given.items() if value is not None}}
    head_dim = whole_number(values, "head_dim")
    dims = int(head_dim * number(rope, "partial_rotary_factor"))
    if not 2 <= dims <= head_dim or dims % 2:
        raise PhiSightError(f"partial_rotary_factor: turns {dims} of {head_dim} dims of a head")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return Rope(number(rope, "rope_theta"), dims)
    if kind not in ("longrope", "su", "yarn"):  # the older names that Phi-3 files have for it
        raise PhiSightError(f"rope_parameters: rope_type {kind!r} is neither default nor longrope")
    crossing = whole_number(values, "original_max_position_embeddings")
    stretch = rope.get("factor")
    if stretch is None:
        stretch = whole_number(values, "max_position_embeddings") / crossing
    else:
        stretch = number(rope, "factor")
    scaling = 1.0
    if rope.get("attention_factor") is not None:
        scaling = number(rope, "attention_factor")
    elif stretch > 1:
        scaling = math.sqrt(1 + math.log(stretch) / math.log(crossing))
    short, long = (factors(rope, name, dims // 2) for name in ("short_factor", "long_factor"))
    return Rope(number(rope, "rope_theta"), dims, short, long, crossing, scaling)


def factors(rope: Mapping[str, object], name: str, count: int) -> tuple[float, ...]:
    value = rope.get(name)
    if not isinstance(value, list) or not all(is_positive(v) for v in value):
        raise PhiSightError(f"rope_parameters: {name} must be a list of positive numbers")
    if len(value) != count:
        raise PhiSightError(f"rope_parameters: {name} has length {len(value)}, not {count}")
    return tuple(float(v) for v in value)


def is_positive(value: object) -> TypeGuard[float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 < value < 1e300  # what a float holds


def whole_number(values: Mapping[str, object], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise PhiSightError(f"{name}: must be a whole number above 0, not {value!r:.60}")
    return value


def number(values: Mapping[str, object], name: str) -> float:
    value = values.get(name)
    if not is_positive(value):
        raise PhiSightError(f"{name}: must be a number above 0, not {value!r:.60}")
    return float(value)
