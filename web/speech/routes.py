"""The routes by which the page is spoken to, and speaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from web.errors import RequestError
from web.replies import Event, event_stream, from_thread
from web.settings import SettingsForm
from web.site import Site
from web.uploads import BrowserKey, taken

# About two minutes of speech. The page asks for a sentence at a time.
LONGEST_SPOKEN = 2_000
Language = Literal["en", "es", "de", "zh"]
NOBODY = b""  # for a client that has left


class ListenForm(BaseModel):
    model_config = ConfigDict(extra="forbid")

    upload: str = Field(pattern=r"^[0-9a-f]{32}$")
    settings: SettingsForm = SettingsForm()


class SpeakForm(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1, max_length=LONGEST_SPOKEN)
    language: Language


def router(site: Site) -> APIRouter:
    routes = APIRouter()

    @routes.post("/listen")
    async def listen(asked: ListenForm, key: BrowserKey) -> Response:
        """What is said in an uploaded recording: events "heard" with the text so far, and "done"
        with all of it."""
        if site.speech is None:
            raise RequestError("no_speech_model")
        upload = taken(site, key, asked.upload)
        if upload.kind != "recording":
            raise RequestError("not_a_recording", name=upload.name)

        def heard(left: Callable[[], bool]) -> Iterator[Event]:
            text = ""
            for segment in site.ears.segments(site.speech, upload.path, asked.settings, left, key):
                text = f"{text} {segment.text.strip()}".strip()
                yield "heard", {"text": text}
            yield "done", {"text": text}

        return event_stream(from_thread(heard), "listen")

    @routes.post("/speak")
    async def speak(asked: SpeakForm, request: Request, key: BrowserKey) -> Response:
        """A text as a WAV."""
        if site.voice is None:
            raise RequestError("no_voice")

        def spoken(left: Callable[[], bool]) -> Iterator[bytes]:
            yield site.mouth.wav(site.voice, asked.text, asked.language, left, key)

        wav = await first_unless_left(request, from_thread(spoken))
        return Response(wav, media_type="audio/wav", headers={"cache-control": "no-store"})

    return routes


async def first_unless_left(request: Request, items: AsyncIterator[bytes]) -> bytes:
    """The first item; the client's leaving ends what makes it."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    making, left = asyncio.ensure_future(anext(items)), asyncio.create_task(leaving())
    try:
        await asyncio.wait((making, left), return_when=asyncio.FIRST_COMPLETED)
        return making.result() if making.done() else NOBODY
    finally:
        making.cancel()
        left.cancel()
        await asyncio.wait((making, left))
