"""Recordings of all visitors, understood a few at a time.

A site has one `Ears`: what is recorded to be corrected, and what is sent with a question, wait in
the same queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from errors import PhiSightError
from web.errors import RequestError
from web.speech.turns import Turns
from workers.pool import Cancelled, never

if TYPE_CHECKING:
    from speech.whisper import Segment, Speech

LISTENED_TO = 4  # recordings at once, each decoded in a process; Whisper's windows take turns
WAITING_TO_BE_HEARD = 12  # each takes a thread
OF_ONE = 4  # of the sixteen


class Hearing(Protocol):
    """How a recording is understood: a part of `web.settings.Settings`, and of its form."""

    @property
    def spoken(self) -> str | None: ...
    @property
    def translate(self) -> bool: ...
    @property
    def denoise(self) -> bool: ...


class Ears:
    """Turns to be listened to; from any thread."""

    def __init__(self) -> None:
        self._turns = Turns(
            LISTENED_TO, WAITING_TO_BE_HEARD, OF_ONE, full="too_many_recordings", left="not_heard"
        )

    def segments(
        self,
        speech: Callable[[], Speech] | None,
        path: str | Path,
        settings: Hearing,
        stopped: Callable[[], bool] = never,
        visitor: str = "",
    ) -> Iterator[Segment]:
        """What is understood in a recording, piece by piece as it goes, until `stopped` says so.

        `speech` gives the Whisper, or raises PhiSightError. Raises PhiSightError for what is not a
        recording, and `RequestError` without a model, where too many recordings wait, where nothing
        is said in it, and when it was stopped.
        """
        if speech is None:
            raise RequestError("no_speech_model")
        from speech.recordings import read_audio

        understood = False
        with self._turns.take(visitor, stopped):
            try:
                audio = read_audio(path, stopped)
                for segment in speech().transcribe(
                    audio, settings.spoken or None, settings.translate, settings.denoise, stopped
                ):
                    understood = understood or bool(segment.text.strip())
                    yield segment
            except Cancelled:
                raise RequestError("not_heard") from None
            except PhiSightError as error:  # the visitor is told the file's name, not its folder
                raise PhiSightError(str(error).replace(str(path), Path(path).name)) from error
        if not understood:
            raise RequestError("nothing_heard")
