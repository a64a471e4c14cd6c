"""What a person has set for the next answer, read from the values that a browser sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from assistant.sampling import Sampling
from errors import PhiSightError
from web.errors import RequestError


@dataclass(frozen=True)
class Settings:
    """What a person has set for the next answer."""

    sampling: Sampling = Sampling()
    max_new_tokens: int = 256
    seed: int | None = None
    spoken: str | None = None  # language of recordings; None is detected
    translate: bool = False
    denoise: bool = False
    aloud: bool = False


def settings_from(values: Sequence[Any]) -> Settings:
    """From the values of the components of a `SettingsPanel`, in their order. A browser can send
    any JSON: raises PhiSightError for what the sliders do not give, `RequestError` for a seed that
    is not a whole number."""
    temperature, top_p, top_k, penalty, length, seed, spoken, translate, denoise, aloud = values
    try:
        sampling = float(temperature), float(top_p), int(top_k), float(penalty)
        max_new_tokens = int(length)
    except (TypeError, ValueError, OverflowError):
        raise PhiSightError("settings: one is not a number; move the sliders back") from None
    return Settings(
        Sampling(*sampling),
        max(1, max_new_tokens),
        parse_seed(str(seed or "")),
        str(spoken or "") or None,
        bool(translate),
        bool(denoise),
        bool(aloud),
    )


def parse_seed(typed: str) -> int | None:
    """None where nothing was typed; `RequestError` for what is not a seed."""
    typed = typed.strip()
    if not typed:
        return None
    if not (len(typed) <= 20 and typed.isascii() and typed.isdecimal() and int(typed) < 2**64):
        raise RequestError("bad_seed")
    return int(typed)
