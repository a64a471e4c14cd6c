"""The routes `/v1/audio/transcriptions` and `/v1/audio/translations`: what is said in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BeforeValidator, Field

from api.errors import ApiError, bad, too_large
from api.forms import Form, Limits, Unsupported, checked
from api.multipart import parse_multipart
from api.requests import check_model
from api.responses import AsciiJSON
from api.stream import until_left
from errors import PhiSightError
from speech.subtitles import as_srt, as_vtt
from speech.whisper import Segment

if TYPE_CHECKING:
    from api.api import Api

TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"
ANY_EARS = "whisper-1"  # what programs call OpenAI's Whisper; here the one that is loaded
UNSUPPORTED: Unsupported = {
    "prompt": ("",),
    "stream": ("false", "False"),
    "include": ([],),
    "chunking_strategy": ("auto",),
    "known_speaker_names": ([],),
    "known_speaker_references": ([],),
}
router = APIRouter()


@dataclass(frozen=True)
class Heard:
    """What was said in a recording of so many seconds, in order; no segments where nothing was."""

    segments: Sequence[Segment]
    seconds: float

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments)


Transcribe = Callable[[bytes, str | None, bool, Callable[[], bool]], Heard]
"""A recording, the language or None to listen for it, and whether to put it into English -> what is
said, until the last one says that nobody waits for it. Raises `PhiSightError`."""


def number(value: object) -> object:
    """A number that stands in a form as text; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def names(value: object) -> object:
    return [value] if isinstance(value, str) else value


class TranscriptionForm(Form):
    model: str | None = Field(None, description="send a text")
    language: str | None = Field(None, description="send a code such as en")
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = Field(
        "json", description="must be one of json, text, srt, verbose_json, vtt"
    )
    temperature: Annotated[float, BeforeValidator(number)] = Field(
        0.0, ge=0, le=0, description="must be 0: what is heard is not drawn by lot"
    )
    timestamp_granularities: Annotated[list[Literal["segment"]], BeforeValidator(names)] = Field(
        [], description="must be segment: words have no times here"
    )


@dataclass(frozen=True)
class Recording:
    """A request to write down a recording."""

    data: bytes
    form: TranscriptionForm


def parse_recording(body: bytes, content_type: bytes, model: str, limits: Limits) -> Recording:
    """Read the form of a transcription. Raises `ApiError` of status 400, 404 or 413."""
    fields: dict[str, Any] = {}
    file: bytes | None = None
    for part in parse_multipart(body, content_type):
        if part.name == "file":
            if file is not None:
                raise bad("file", "is there twice; send one recording")
            file = bytes(part.data)
            continue
        text = part.data.decode("utf-8", "replace")
        name = part.name.removesuffix("[]")
        fields[name] = [*fields.get(name, []), text] if name != part.name else text
    form = checked(fields, TranscriptionForm, UNSUPPORTED, limits)
    check_model(form.model, ANY_EARS, model)
    if file is None:
        raise bad("file", "is missing; send a recording", "missing_required_parameter")
    if len(file) > limits.audio_bytes:
        size, limit = f"{len(file):,} bytes", f"{limits.audio_bytes:,}"
        raise too_large("file", size, limit, "send it in parts, or as MP3 or Opus")
    return Recording(file, form)


@router.post(TRANSCRIPTIONS)
async def transcriptions(request: Request) -> Response:
    return await written_down(request, translate=False)


@router.post(TRANSLATIONS)
async def translations(request: Request) -> Response:
    return await written_down(request, translate=True)


async def written_down(request: Request, translate: bool) -> Response:
    api: Api = request.app
    if api.transcribe is None:
        raise bad("file", "this server does not listen; start it with --speech")
    body, kind = await request.body(), request.headers.get("content-type", "").encode("latin-1")
    asked = await api.reading(body, parse_recording, kind, api.name, api.limits)
    del body
    try:
        with until_left() as gone:
            heard = await api.turn(
                request, "ears", api.transcribe, asked.data, asked.form.language, translate, gone
            )
    except PhiSightError as error:
        of_recording = translate or str(error).startswith("recording:")
        field = "file" if of_recording else "language"
        raise ApiError(400, f"{field}: {error}", "invalid_audio", field) from error
    return reply(heard, asked.form, translate)


def reply(heard: Heard, form: TranscriptionForm, translate: bool) -> Response:
    """What was heard in the form that is asked for. Nothing said is an empty text."""
    usage = {"type": "duration", "seconds": heard.seconds}
    if form.response_format == "json":
        return AsciiJSON({"text": heard.text, "usage": usage})
    if form.response_format == "verbose_json":
        return AsciiJSON(
            {
                "task": "translate" if translate else "transcribe",
                "language": language_of(heard, form.language),
                "duration": heard.seconds,
                "text": heard.text,
                "segments": [
                    {"id": place, "start": one.start, "end": one.end, "text": one.text}
                    for place, one in enumerate(heard.segments)
                ],
                "usage": usage,
            }
        )
    written = {"text": f"{heard.text}\n", "srt": as_srt(heard.segments)}
    written["vtt"] = as_vtt(heard.segments)
    return PlainTextResponse(written[form.response_format])


def language_of(heard: Heard, given: str | None) -> str:
    """The English name of the language that was spoken, as OpenAI tells it; empty if unknown."""
    from whisper.tokenizer import LANGUAGES

    code = heard.segments[0].language if heard.segments else given or ""
    return LANGUAGES.get(code.lower(), code)
