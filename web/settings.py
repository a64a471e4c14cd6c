"""What a person has set for the next answer, read from the JSON that a browser sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from web.errors import RequestError

if TYPE_CHECKING:
    from assistant.sampling import Sampling


class SettingsForm(BaseModel):
    """The settings as a browser sends them; web/static/core/settings.js has the same names."""

    model_config = ConfigDict(extra="forbid")

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    max_new_tokens: int = 256
    seed: str = ""
    spoken: str = ""
    """language of recordings; empty: detected"""
    translate: bool = False
    denoise: bool = False
    aloud: bool = False


@dataclass(frozen=True)
class Settings:
    """What a person has set for the next answer."""

    sampling: Sampling
    max_new_tokens: int = 256
    seed: int | None = None
    spoken: str | None = None  # language of recordings; None is detected
    translate: bool = False
    denoise: bool = False


def settings_from(form: SettingsForm) -> Settings:
    """Raises PhiSightError for what the sliders do not give, `RequestError` for a seed that is not
    a whole number."""
    from assistant.sampling import Sampling

    return Settings(
        Sampling(
            form.temperature,
            form.top_p,
            form.top_k,
            form.repetition_penalty,
            form.no_repeat_ngram_size,
        ),
        max(1, min(form.max_new_tokens, 10**6)),
        parse_seed(form.seed),
        form.spoken or None,
        form.translate,
        form.denoise,
    )


def parse_seed(typed: str) -> int | None:
    """None where nothing was typed; `RequestError` for what is not a seed."""
    typed = typed.strip()
    if not typed:
        return None
    if not (len(typed) <= 20 and typed.isascii() and typed.isdecimal() and int(typed) < 2**64):
        raise RequestError("bad_seed")
    return int(typed)
