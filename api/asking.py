"""From the body of a request to its answer under way, for every route that asks the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import StreamingResponse

from api.errors import as_api_error
from api.forms import Limits
from api.requests import ChatRequest
from api.responses import EVENT_HEADERS
from api.silence import kept_alive
from api.stream import in_thread, until_left
from assistant.answer import Answer

if TYPE_CHECKING:
    from api.api import Api

Parse = Callable[[bytes, str, Limits], ChatRequest]
"""Reads the body of a request to the model of a name. Raises `ApiError`."""


def asked_by(
    parse: Parse,
) -> Callable[[Request], AsyncIterator[tuple[ChatRequest, Answer]]]:
    """A dependency of a route: the request as `parse` reads it, and the answer to it, which ends
    with the response however that ends."""

    async def asked(request: Request) -> AsyncIterator[tuple[ChatRequest, Answer]]:
        api: Api = request.app
        body = await request.body()
        question, answer = await api.reading(body, api.read, parse)
        with until_left() as gone:
            if question.sounds:
                answer = await api.turn(request, "ears", api.listen_to, question, gone)
            elif answer is None:
                request.state.place.move("text")
                answer = await in_thread(api.schemas, api.answer_to, question, {}, gone)
        assert answer is not None
        with api.running_answer(answer):
            if question.pictures:
                await api.turn(request, "eyes", api.assistant.start, answer)
                request.state.place.move("text")
            else:
                request.state.place.move("text")
                api.assistant.start(answer)
            yield question, answer

    return asked


async def until_failure(
    api: Api, events: AsyncIterator[str], failed: Callable[[dict[str, object]], str]
) -> AsyncIterator[str]:
    """The events of an answer. What fails after the status is told as an event, which `failed`
    makes of the error's JSON."""
    try:
        async for event in events:
            yield event
            await asyncio.sleep(0)  # a lost connection is noticed before the next event
    except Exception as failure:
        error = as_api_error(failure, "an answer")
        api.measures.errors[error.code] += 1
        yield failed(error.json())


def streamed(api: Api, events: AsyncIterator[str]) -> StreamingResponse:
    """A response of server-sent events."""
    alive = kept_alive(events, api.limits.silent_seconds)
    return StreamingResponse(alive, media_type="text/event-stream", headers=EVENT_HEADERS)
