"""The route `/v1/audio/speech`: a text as sound."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from api.errors import ApiError, bad, too_large
from api.forms import Form, Limits, Unsupported, parse_form
from api.requests import check_model
from api.stream import until_left
from errors import PhiSightError
from workers.pool import Cancelled, never

if TYPE_CHECKING:
    from api.api import Api

SPEECH = "/v1/audio/speech"
MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")  # what programs call OpenAI's
# Voices that programs ask for unasked: here the one that the server speaks with.
USUAL_VOICES = (
    *("alloy", "ash", "ballad", "coral", "echo", "fable", "onyx", "nova", "sage", "shimmer"),
    *("verse", "marin", "cedar"),
)
UNSUPPORTED: Unsupported = {"instructions": ("",), "stream_format": ("audio",)}
PCM_RATE = 24_000  # Hz of sound without a header, and of what is packed
Sound = Literal["mp3", "opus", "flac", "wav", "pcm"]
# The container and the coding by soundfile's names, and what the client is told.
KINDS: dict[str, tuple[str, str, str]] = {
    "mp3": ("MP3", "MPEG_LAYER_III", "audio/mpeg"),
    "opus": ("OGG", "OPUS", "audio/ogg"),
    "flac": ("FLAC", "PCM_16", "audio/flac"),
    "wav": ("WAV", "PCM_16", "audio/wav"),
    "pcm": ("RAW", "PCM_16", "audio/pcm"),
}
AS_SPOKEN = ("flac", "wav")  # at the voice's own rate
ENCODED_SECONDS = 10  # of sound at once; Opus takes half a second for it
Speak = Callable[[str, str, float, Callable[[], bool]], tuple[numpy.ndarray, int]]
"""A text, a voice or "" for the server's own, and how fast -> (samples,) float32 mono and their
rate in Hz, until the last one says that nobody waits for it. Raises `PhiSightError`."""
router = APIRouter()


class SpeechBody(Form):
    model: str | None = Field(None, description="send a text")
    input: str = Field(min_length=1, description="send a text")
    voice: str = Field("alloy", max_length=100, description="must be the name of a voice")
    response_format: Sound = Field("mp3", description="must be one of mp3, opus, flac, wav, pcm")
    speed: float = Field(1.0, ge=0.5, le=2.5, description="must be a number from 0.5 to 2.5")


@router.post(SPEECH)
async def speech(request: Request) -> Response:
    api: Api = request.app
    if api.speak is None:
        raise bad(None, "this server does not speak; start it with --voice", "not_supported")
    asked = parse_speech(await request.body(), api.name, api.limits)
    try:
        with until_left() as gone:
            sound = await api.turn(request, "voice", spoken, asked, api.speak, gone)
    except PhiSightError as error:
        field = "voice" if str(error).startswith("voice ") else "input"
        raise ApiError(400, f"{field}: {error}", "invalid_value", field) from error
    return Response(sound, media_type=KINDS[asked.response_format][2])


def parse_speech(body: bytes, model: str, limits: Limits) -> SpeechBody:
    """Read the body of a request to speak. Raises `ApiError` of status 400, 404 or 413."""
    asked = parse_form(body, SpeechBody, UNSUPPORTED, limits)
    check_model(asked.model, *MODELS, model)
    if len(asked.input) > limits.spoken_characters:
        size, limit = f"{len(asked.input):,} characters", f"{limits.spoken_characters:,}"
        raise too_large("input", size, limit, "send it in parts")
    return asked


def spoken(asked: SpeechBody, speak: Speak, cancelled: Callable[[], bool] = never) -> bytes:
    """The bytes of the sound. Raises `PhiSightError`, and `Cancelled` as soon as `cancelled` says
    that nobody waits for them."""
    voice = "" if asked.voice in USUAL_VOICES else asked.voice
    samples, rate = speak(asked.input, voice, asked.speed, cancelled)
    return encoded(samples, rate, asked.response_format, cancelled)


def encoded(
    samples: numpy.ndarray, rate: int, form: str, cancelled: Callable[[], bool] = never
) -> bytes:
    """(samples,) float32 mono as a file of a form; `pcm` is 16-bit little-endian at `PCM_RATE`."""
    import soundfile
    import soxr

    container, coding, _ = KINDS[form]
    if not soundfile.check_format(container, coding):
        raise bad("response_format", f"{form} cannot be written here; ask for wav or flac")
    if form not in AS_SPOKEN and rate != PCM_RATE:
        samples, rate = soxr.resample(samples, rate, PCM_RATE), PCM_RATE
    file = io.BytesIO()
    endian = "LITTLE" if form == "pcm" else "FILE"
    with soundfile.SoundFile(file, "w", rate, 1, coding, endian, container) as written:
        for start in range(0, len(samples), step := rate * ENCODED_SECONDS):
            if cancelled():
                raise Cancelled
            written.write(numpy.clip(samples[start : start + step], -1, 1))
    return file.getvalue()
