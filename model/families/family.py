"""What a family of base models is, and what the config.json files of all of them have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.chat_forms import ChatForm
from errors import PhiSightError
from model.decoder import DecoderConfig, Rope
from model.families.fused import parts_of
from model.families.numbers import flag, number, whole_number
from model.families.rope import rope_of

MOST_LAYERS = 1000  # of a decoder: each is made before its weights are looked for


@dataclass(frozen=True)
class Family:
    """Everything in which base models of one `model_type` differ from those of another."""

    model_type: str
    """as config.json says it"""
    name: str
    """as people say it"""
    architecture: str
    """transformers' class of the whole model, which exports name"""
    chat_forms: tuple[ChatForm, ...]
    """What its models speak, with their marks, stop tokens and the token for pictures: the first of
    which a tokenizer has the marks. One that was taught another form speaks that."""
    defaults: Mapping[str, Any]
    """what a config.json means that lacks these keys: transformers' own defaults"""
    is_fused: bool = False
    """whether its files hold `qkv_proj` and `gate_up_proj`, and not an own weight for each part"""
    qkv_bias: bool = False
    """whether queries, keys and values have biases"""
    query_key_norm: bool = False
    """whether each head's queries and keys are normalised before they are turned"""
    has_window: bool = True
    """whether a token sees no more than `sliding_window` of its config.json"""
    rope_kinds: Mapping[str, str] = field(default_factory=lambda: {"default": "default"})
    """the names that its files have for kinds of rotary positions -> those of `families.rope`"""
    has_partial_rotary: bool = False
    """whether a part of each head may stay; transformers turns the others' heads whole"""
    check: Callable[[Mapping[str, Any]], None] = lambda values: None
    """raises `PhiSightError` for what the decoder does not have"""

    def decoder_config(self, raw: Mapping[str, object]) -> DecoderConfig:
        """The decoder that a config.json describes, in the form of any version of transformers.

        Raises:
            PhiSightError: a value is missing, of a wrong type or out of range, or asks for
                something that this decoder does not have. The message begins with the key.
        """
        values = {**COMMON, **self.defaults, **raw}
        check_plain(values, self.name)
        self.check(values)
        heads, hidden = (
            whole_number(values, "num_attention_heads"),
            whole_number(values, "hidden_size"),
        )
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = heads
        if values.get("head_dim") is None:
            if hidden % heads:
                raise PhiSightError(f"hidden_size: {hidden} is not a multiple of {heads} heads")
            values["head_dim"] = hidden // heads
        if (layers := whole_number(values, "num_hidden_layers")) > MOST_LAYERS:
            raise PhiSightError(f"num_hidden_layers: {layers} are more than {MOST_LAYERS}")
        groups = whole_number(values, "num_key_value_heads")
        if heads % groups:
            raise PhiSightError(f"num_key_value_heads: {groups} does not divide {heads} heads")
        window = values["sliding_window"] if self.has_window else None
        return DecoderConfig(
            vocab_size=whole_number(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=whole_number(values, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=whole_number(values, "head_dim"),
            rms_norm_eps=number(values, "rms_norm_eps"),
            max_position_embeddings=whole_number(values, "max_position_embeddings"),
            tie_word_embeddings=flag(values, "tie_word_embeddings"),
            sliding_window=None if window is None else whole_number(values, "sliding_window"),
            rope=self.rope(values),
            qkv_bias=self.qkv_bias,
            query_key_norm=self.query_key_norm,
        )

    def rope(self, values: Mapping[str, Any]) -> Rope:
        rope = rope_of(values, self.rope_kinds)
        head_dim = whole_number(values, "head_dim")
        if rope.dims != head_dim and not self.has_partial_rotary:
            raise PhiSightError(
                f"partial_rotary_factor: turns {rope.dims} of {head_dim} dims of a head;"
                f" {self.name} turns all"
            )
        return rope

    def stored(self, name: str, config: DecoderConfig) -> dict[str, int]:
        """Names in the family's files of what the decoder's parameter `name` is made of, laid below
        each other, with the rows of each; empty where it is stored as it is, under its name."""
        return {} if self.is_fused else parts_of(name, config)

    def to_stored(
        self, weights: Iterable[tuple[str, Tensor]], config: DecoderConfig
    ) -> Iterator[tuple[str, Tensor]]:
        """The decoder's parameters -> the tensors of the family's files."""
        for name, tensor in weights:
            parts = self.stored(name, config)
            if parts:
                yield from zip(parts, tensor.split(list(parts.values())), strict=True)
            else:
                yield name, tensor

    def from_stored(
        self, tensors: Mapping[str, Tensor], config: DecoderConfig
    ) -> dict[str, Tensor]:
        """The inverse of `to_stored`, for tensors that are all there: the whole model's."""
        waiting, weights = dict(tensors), {}
        for layer in range(config.num_hidden_layers):
            for place, projection in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")):
                for kind in ("weight", "bias"):
                    name = f"model.layers.{layer}.{place}.{projection}.{kind}"
                    parts = self.stored(name, config)
                    if parts and parts.keys() <= waiting.keys():
                        weights[name] = torch.cat([waiting.pop(part) for part in parts])
        return weights | waiting


COMMON: dict[str, object] = {
    "num_key_value_heads": None,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
}


def check_plain(values: Mapping[str, Any], name: str) -> None:
    """Raise `PhiSightError` for an activation, layers or dropout that the decoder does not have."""
    if values["hidden_act"] != "silu":
        raise PhiSightError(f"hidden_act: is {values['hidden_act']!r:.60}, {name}'s is 'silu'")
    kinds = values.get("layer_types") or ["full_attention"]
    if not isinstance(kinds, list) or any(one != "full_attention" for one in kinds):
        raise PhiSightError(
            "layer_types: are not all 'full_attention'; in this decoder every layer attends alike"
        )
    for key in ("attention_dropout", "embd_pdrop", "resid_pdrop"):
        if values.get(key, 0) != 0:
            raise PhiSightError(
                f"{key}: is {values[key]!r:.60}; a frozen base has no dropout, set 0"
            )


def refuse(values: Mapping[str, Any], name: str, *keys: str) -> None:
    """Raise `PhiSightError` where one of `keys` is set: models of the family do without."""
    for key in keys:
        if values.get(key):
            raise PhiSightError(
                f"{key}: is {values[key]!r:.60}; {name} has it off, and so has this decoder"
            )
