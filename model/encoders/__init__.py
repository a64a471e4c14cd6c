"""The picture encoders: one file a kind, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from errors import PhiSightError
from model.encoders.clip import ClipConfig
from model.encoders.dinov2 import Dinov2Config, Dinov2WithRegistersConfig
from model.encoders.encoder import EncoderConfig
from model.encoders.siglip import SiglipConfig
from model.encoders.siglip2 import NaflexConfig

MEMBERS: tuple[type[EncoderConfig], ...] = (
    ClipConfig,
    SiglipConfig,
    NaflexConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
)
# model_type of a config.json -> what reads it
ENCODERS = {kind: member for member in MEMBERS for kind in member.KINDS}


def encoder_of(content: Mapping[str, Any]) -> EncoderConfig:
    """The encoder that a config.json describes. Raises `PhiSightError`, where it is of none."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise PhiSightError(f"its model_type is {kind!r:.60}, none of {', '.join(ENCODERS)}")
    return ENCODERS[kind].from_dict(content)
