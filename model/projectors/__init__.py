"""The projectors that `--projector` chooses from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import torch

from config import Config
from model.projectors.linear import LinearProjector
from model.projectors.mlp import MlpProjector
from model.projectors.pixel_shuffle import PixelShuffleProjector
from model.projectors.projector import Projector
from model.projectors.resampler import ResamplerProjector

MEMBERS = (LinearProjector, MlpProjector, PixelShuffleProjector, ResamplerProjector)
PROJECTORS: Mapping[str, type[Projector]] = {member.name: member for member in MEMBERS}


def projector_of(config: Config, vision_dim: int, text_dim: int) -> Projector:
    """The projector of a run, its parameters not drawn yet. Raises `PhiSightError` for settings
    that do not go together."""
    member = PROJECTORS[config.projector]
    return member(vision_dim, text_dim, config.projector_dropout, config.projector_queries)


def picture_tokens(config: Config, given: int) -> int:
    """How many tokens of the text a picture is that comes as `given` features. Raises
    `PhiSightError` for a number that the run's projector cannot take."""
    return PROJECTORS[config.projector].tokens_of(given, config.projector_queries)


def name_of(tensors: Iterable[str]) -> str | None:
    """Which projector has parameters of these names, or None."""
    return names_by_parameters().get(frozenset(tensors))


@cache
def names_by_parameters() -> dict[frozenset[str], str]:
    """The names of its parameters, which no other has -> the name of a projector."""
    with torch.device("meta"):
        found = {frozenset(make(4, 4).state_dict()): name for name, make in PROJECTORS.items()}
    assert len(found) == len(PROJECTORS), "two projectors have parameters of the same names"
    return found
