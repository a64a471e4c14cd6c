"""Rotary positions as a config.json describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from errors import PhiSightError
from model.decoder import Rope, Stretch
from model.families.numbers import is_positive, number, whole_number


def rope_of(values: Mapping[str, Any], kinds: Mapping[str, str]) -> Rope:
    """From `rope_parameters` or the older `rope_scaling` and `rope_theta`.

    kinds: names in the family's files -> those of `KINDS`. Raises `PhiSightError` for others.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise PhiSightError("rope_parameters: is not an object")
    if nested := [name for name, value in given.items() if isinstance(value, Mapping)]:
        raise PhiSightError(
            f"rope_parameters: {nested[0]!r:.60} has positions of its own; in this decoder all"
            " layers turn alike"
        )
    usual = {name: values[name] for name in ("rope_theta", "partial_rotary_factor")}
    rope = {**usual, **{name: value for name, value in given.items() if value is not None}}
    head_dim, share = whole_number(values, "head_dim"), number(rope, "partial_rotary_factor")
    if share > 1:
        raise PhiSightError(f"partial_rotary_factor: {share:g} is more than a whole head")
    dims = int(head_dim * share)
    if not 2 <= dims <= head_dim or dims % 2:
        raise PhiSightError(f"partial_rotary_factor: turns {dims} of {head_dim} dims of a head")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in kinds:
        known = " or ".join(dict.fromkeys(kinds.values()))
        raise PhiSightError(f"rope_parameters: rope_type {kind!r:.60} is not {known}")
    return KINDS[kinds[kind]](values, rope, dims)


def default(values: Mapping[str, Any], rope: Mapping[str, Any], dims: int) -> Rope:
    return Rope(number(rope, "rope_theta"), dims)


def longrope(values: Mapping[str, Any], rope: Mapping[str, Any], dims: int) -> Rope:
    """LongRoPE (arXiv:2402.13753)."""
    crossing = whole_number({**rope, **values}, "original_max_position_embeddings")
    if crossing == 1:  # its logarithm divides
        raise PhiSightError("original_max_position_embeddings: must be above 1")
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


def llama3(values: Mapping[str, Any], rope: Mapping[str, Any], dims: int) -> Rope:
    """Llama 3.1's (arXiv:2407.21783): slow turns are slowed further, fast ones stay. The positions
    that it was trained on first are those beside `rope_parameters`, if they stand there too."""
    stretch = Stretch(
        number(rope, "factor"),
        number(rope, "low_freq_factor"),
        number(rope, "high_freq_factor"),
        whole_number({**rope, **values}, "original_max_position_embeddings"),
    )
    if stretch.high <= stretch.low:
        raise PhiSightError(
            f"rope_parameters: high_freq_factor {stretch.high:g} is not above low_freq_factor"
            f" {stretch.low:g}"
        )
    return Rope(number(rope, "rope_theta"), dims, stretch=stretch)


KINDS = {"default": default, "longrope": longrope, "llama3": llama3}


def factors(rope: Mapping[str, object], name: str, count: int) -> tuple[float, ...]:
    value = rope.get(name)
    if not isinstance(value, list) or not all(is_positive(v) for v in value):
        raise PhiSightError(f"rope_parameters: {name} must be a list of positive numbers")
    if len(value) != count:
        raise PhiSightError(f"rope_parameters: {name} has length {len(value)}, not {count}")
    return tuple(float(v) for v in value)
