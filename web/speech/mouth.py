"""Texts of all visitors, spoken one at a time."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from web.errors import RequestError
from web.speech.turns import Turns
from workers.pool import Cancelled, never

if TYPE_CHECKING:
    import numpy

    from speech.voice import Voice

# A sentence takes espeak-ng some hundredths of a second. A VITS model draws its noise from torch's
# global generator, which two at once would take from each other.
SPOKEN_AT_ONCE = 1
WAITING_TO_SPEAK = 15  # each takes a thread
OF_ONE = 8  # a page asks for the next sentences while one is heard, and may just have left others


class Mouth:
    """Turns to be spoken for; from any thread."""

    def __init__(self) -> None:
        self._turns = Turns(
            SPOKEN_AT_ONCE, WAITING_TO_SPEAK, OF_ONE, full="too_much_to_speak", left="not_spoken"
        )

    def wav(
        self,
        voice: Callable[[str], Voice] | None,
        text: str,
        language: str,
        stopped: Callable[[], bool] = never,
        visitor: str = "",
    ) -> bytes:
        """A 16-bit WAV of a text in a language. It is never a file.

        `voice` gives that of a language. Raises `RequestError` without one, where too much waits to
        be spoken, and when `stopped` says so; PhiSightError for what the voice refuses.
        """
        if voice is None:
            raise RequestError("no_voice")
        with self._turns.take(visitor, stopped):
            try:
                return as_wav(*voice(language).speak(text, cancelled=stopped))
            except Cancelled:
                raise RequestError("not_spoken") from None


def as_wav(samples: numpy.ndarray, rate: int) -> bytes:
    """(samples,) float32 mono as the bytes of a 16-bit WAV."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype="PCM_16", format="WAV")
    return file.getvalue()
