"""The folder form of a PEFT adapter: its files, and what adapter_config.json says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from errors import PhiSightError, printable
from exports.imported import finite_number
from lora.layer import scaling_of
from model.base import read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROJECTOR = "image_projector.safetensors"  # PEFT does not look at it
PROVENANCE = "provenance.json"  # what the weights come from, where we wrote the folder
PREFIX = "base_model.model."
REMEDY = "export the adapter again with PEFT's save_pretrained"
# Fields of adapter_config.json that are read, or do not change what a loaded adapter computes. Any
# other one must be empty: an adapter that is read without its DoRA vector, say, is another adapter.
HARMLESS = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
}
# PEFT takes the names in its patterns for regular expressions. Those of a stranger's file are only
# tried where they are names.
_PATTERN = re.compile(r"\^?[\w.]{1,200}")
MOST_PATTERNS = 4096  # each is tried on every tensor
LARGEST_RANK = 2**20
LEAST_ALPHA, LARGEST_ALPHA = 1e-6, 1e9  # beyond, B A is scaled by what float32 has not


@dataclass(frozen=True)
class PeftConfig:
    """What adapter_config.json says, checked."""

    rank: int
    alpha: float
    dropout: float
    rank_stabilized: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    """of modules that have others than the rest, by pattern"""
    targets: tuple[str, ...]
    """names of layers; none where the file has a regular expression"""
    base: str
    """the model that it says it is for; empty where it does not say"""

    def rank_of(self, module: str) -> int:
        """Of the module `model.layers.0.self_attn.q_proj`, say."""
        return self.ranks.get(_key_for(self.ranks, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """What its B A is multiplied by."""
        alpha = self.alphas.get(_key_for(self.alphas, module), self.alpha)
        return scaling_of(self.rank_of(module), alpha, self.rank_stabilized)

    @property
    def made_for(self) -> str:
        """For an error: the base that the file names."""
        return f", and {CONFIG} names {self.base!r} as its base" if self.base else ""


def _key_for(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that PEFT would find to be of the module; empty for none."""
    return next((key for key in patterns if _compiled(key).match(module)), "")


@lru_cache(maxsize=MOST_PATTERNS)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def read_peft_config(source: Path) -> PeftConfig:
    """adapter_config.json, if it says nothing that this project's LoRA does not do.

    Raises:
        PhiSightError: it is missing, unreadable, of more than plain LoRA, or its numbers make no
            adapter.
    """
    path = source / CONFIG
    if not path.is_file():
        raise PhiSightError(f"{path}: is missing; {REMEDY}")
    settings = read_json(path)
    problems = [name for name, value in settings.items() if name not in HARMLESS and value]
    if settings.get("peft_type") != "LORA":
        problems.append("peft_type")
    if settings.get("bias", "none") != "none":
        problems.append("bias")
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        problems.append("init_lora_weights")  # some, such as PiSSA, change the base as well
    if problems:
        shown = ", ".join(f"{name} {settings.get(name)!r}"[:80] for name in problems)
        raise PhiSightError(
            f"{path}: {shown}: not plain LoRA, so it cannot be taken over; merge it"
            " with PEFT and use the result as base"
        )
    targets = settings.get("target_modules")
    listed = targets if isinstance(targets, list) else []  # else a regular expression
    ranks, alphas = _pattern_of(settings, "rank_pattern"), _pattern_of(settings, "alpha_pattern")
    dropout = finite_number(settings.get("lora_dropout", 0.0))
    values = [settings.get("r"), *(ranks or {}).values()]
    scales = [finite_number(n) for n in (settings.get("lora_alpha"), *(alphas or {}).values())]
    if (
        ranks is None
        or alphas is None
        or dropout is None
        or not 0 <= dropout < 1
        or not all(
            isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= LARGEST_RANK
            for n in values
        )
        or not all(n is not None and LEAST_ALPHA <= n <= LARGEST_ALPHA for n in scales)
        or not isinstance(settings.get("use_rslora") or False, bool)
    ):
        names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
        given = ", ".join(f"{name} {settings[name]!r}"[:80] for name in names if name in settings)
        raise PhiSightError(f"{path}: {given} make no adapter; {REMEDY}")
    return PeftConfig(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        dropout=dropout,
        rank_stabilized=bool(settings.get("use_rslora")),
        ranks=ranks,
        alphas={key: float(alpha) for key, alpha in alphas.items()},
        targets=tuple(target for target in listed if isinstance(target, str)),
        base=printable(settings.get("base_model_name_or_path") or "", 80),
    )


def _pattern_of(settings: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """`rank_pattern` or `alpha_pattern`; None for one that is not read."""
    found = settings.get(name) or {}
    if not isinstance(found, dict) or len(found) > MOST_PATTERNS:
        return None
    if not all(map(_PATTERN.fullmatch, found)):
        return None
    return found
