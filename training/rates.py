"""The learning rate of each parameter: by its owner, and for the adapter by its factor."""

from __future__ import annotations

from collections.abc import Iterable

from config import Config
from model.vlm import owner_of

LORA, LORA_B, PROJECTOR = "lora", "lora_B", "projector"


def group_of(name: str) -> str:
    """Which parameters share a rate with the one of this name."""
    owner = owner_of(name)
    return LORA_B if owner == LORA and name.endswith(".lora_B") else owner


def rate_of(config: Config, learning_rate: float, name: str) -> float:
    """The rate of a parameter in a step whose learning rate, by the schedule, is `learning_rate`.

    That is the rate of A. B has a multiple of it (LoRA+, arXiv:2402.12354). The projector has one
    of its own, that is scaled by warm-up and schedule alike: at the peak, what was typed.
    """
    group = group_of(name)
    if group == LORA_B:
        return learning_rate * config.lora_plus_ratio
    if group == PROJECTOR and config.projector_learning_rate:
        return learning_rate / config.learning_rate * config.projector_learning_rate
    return learning_rate


def rates(config: Config, learning_rate: float, names: Iterable[str]) -> dict[str, float]:
    """Group -> rate, of the groups that these parameters are of; empty where all rates are the
    learning rate, as they are without the fields that make them differ."""
    found = {group_of(name): rate_of(config, learning_rate, name) for name in names}
    return found if have_own_rates(config) else {}


def have_own_rates(config: Config) -> bool:
    """Whether any parameter may have another rate than the learning rate."""
    own = config.projector_learning_rate
    return config.lora_plus_ratio != 1 or own not in (0, config.learning_rate)
