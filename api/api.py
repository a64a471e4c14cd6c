"""The routes: chat completions, the model's name, health and measures, as a FastAPI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from api.errors import ApiError, as_api_error, bad, busy, shutting_down
from api.forms import Limits
from api.guards import Beside, Budget, Intake, KeyGuard, Reporting
from api.measures import MEDIA_TYPE, Measures
from api.requests import ChatRequest, Sound, parse_request
from api.responses import (
    EVENT_HEADERS,
    AsciiJSON,
    chunk,
    completion,
    completion_head,
    event,
    usage_chunk,
    usage_of,
)
from api.stream import in_thread, pieces_of
from assistant.answer import Answer
from assistant.assistant import Assistant
from errors import PhiSightError

CHAT, MODELS, HEALTH, METRICS = "/v1/chat/completions", "/v1/models", "/health", "/metrics"
ROUTES = (CHAT, MODELS, HEALTH, METRICS)
READ = ["GET", "HEAD"]
BODIES = 8  # full-size bodies that may be held at once
READERS = 4  # requests that are parsed and put into tokens at once; each takes memory by its size
router = APIRouter()


class Api(FastAPI):
    """The API over one assistant; `rest` answers the paths outside it, if given."""

    def __init__(
        self,
        assistant: Assistant,
        *,
        key: str = "",
        name: str | None = None,
        listen: Callable[[bytes], str] | None = None,
        limits: Limits = Limits(),
        max_requests: int = 80,
        rest: ASGIApp | None = None,
    ) -> None:
        """
        Args: `key`: what every request but /health has to bring, if not empty; `name`: the
        model's, else that of its run; `listen`: writes down the speech of a WAV or MP3 file, and
        raises PhiSightError; `max_requests`: chat requests taken in at once.
        """
        super().__init__(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        self.assistant, self.limits, self.max_requests = assistant, limits, max_requests
        self.name = name or Path(assistant.source).parent.name
        self.listen = listen
        self.measures, self.budget = Measures(), Budget(limits.body_bytes * BODIES)
        self.created = int(time.time())
        self.running: set[Answer] = set()
        self.closing = False
        # One request at a time looks at pictures and one listens: each takes memory by the file.
        self.reading = asyncio.Semaphore(READERS)
        self.looking, self.listening = asyncio.Semaphore(1), asyncio.Semaphore(1)
        self.include_router(router)
        self.add_exception_handler(HTTPException, pass_on)
        # A request meets the one that is added last first.
        if rest is not None:
            self.add_middleware(Beside, other=rest, routes=ROUTES)
        self.add_middleware(
            Intake, path=CHAT, limits=limits, budget=self.budget, taken_in=self.taken_in
        )
        if key:
            self.add_middleware(KeyGuard, key=key)
        self.add_middleware(Reporting, measures=self.measures, routes=ROUTES)

    def busy(self) -> bool:
        """Whether an answer is being read or made, for the web app too."""
        counts = self.assistant.statistics()
        return bool(self.measures.in_flight or counts["running"] or counts["waiting"])

    def close(self) -> None:
        """Take in nothing more, and end the answers that are under way with an error."""
        self.closing = True
        for answer in self.running:
            answer.cancel()

    @contextmanager
    def taken_in(self) -> Iterator[None]:
        """For as long as a chat request lasts. Raises `ApiError` where there is no room for it."""
        if self.closing:
            raise shutting_down()
        if self.measures.in_flight >= self.max_requests:
            raise busy(f"{self.measures.in_flight} requests are under way already")
        self.measures.in_flight += 1
        try:
            yield
        finally:
            self.measures.in_flight -= 1

    def model(self) -> dict[str, object]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "phisight"}

    @contextmanager
    def running_answer(self, answer: Answer) -> Iterator[None]:
        """Ends the answer when the block is left, or by `close`."""
        self.running.add(answer)
        try:
            if self.closing:
                raise shutting_down()
            yield
        finally:
            answer.cancel()
            self.running.discard(answer)
            if not answer.cached:
                self.measures.generated(answer.completion_tokens)

    def listen_to(self, sounds: list[Sound]) -> Mapping[str, str]:
        """What is said, by where it stands. Raises `ApiError`."""
        heard: dict[str, str] = {}
        for sound in sounds:
            if self.listen is None:
                raise bad(sound.where, "this server does not listen; send text")
            try:
                heard[sound.where] = self.listen(sound.data)
            except PhiSightError as error:
                raise bad(sound.where, str(error), "invalid_audio") from error
        return heard

    async def pieces(self, answer: Answer, began: float) -> AsyncIterator[str]:
        """The text as it comes. Raises what ended the answer before its end."""
        first = True
        async for piece in pieces_of(answer):
            if first:
                self.measures.first_token.observe(time.perf_counter() - began)
                first = False
            yield piece
        if answer.finish_reason == "cancelled":
            raise shutting_down()
        self.measures.whole_request.observe(time.perf_counter() - began)

    async def events(
        self, answer: Answer, pieces: AsyncIterator[str], include_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events. What fails after the status is told as an event, as OpenAI does."""
        head = completion_head(self.name)
        also = {"usage": None} if include_usage else {}
        yield event(chunk(head, {"role": "assistant", "content": ""}) | also)
        try:
            async for piece in pieces:
                yield event(chunk(head, {"content": piece}) | also)
                await asyncio.sleep(0)  # a lost connection is noticed before the next event
        except Exception as failure:
            error = as_api_error(failure, "an answer")
            self.measures.errors[error.code] += 1
            yield event(error.json())
            return
        yield event(chunk(head, {}, answer.finish_reason) | also)
        if include_usage:
            usage = usage_of(answer.prompt_tokens, answer.completion_tokens)
            yield event(usage_chunk(head, usage))
        yield event("[DONE]")


async def pass_on(request: Request, failure: Exception) -> Response:
    """FastAPI's own answers to unknown paths and methods do not have OpenAI's form: `Reporting`
    answers them, as everything else that is raised."""
    raise failure


async def asked(request: Request) -> AsyncIterator[tuple[ChatRequest, Answer]]:
    """A chat request and the answer to it, which ends with the response however that ends."""
    api: Api = request.app
    body = await request.body()
    question = await in_thread(api.reading, parse_request, body, api.name, api.limits)
    heard: Mapping[str, str] = {}
    if question.sounds:
        heard = await in_thread(api.listening, api.listen_to, question.sounds)

    def answer_of() -> Answer:
        messages = question.conversation(lambda sound: heard[sound.where])
        return api.assistant.ask(
            messages,
            question.max_new_tokens,
            question.sampling,
            question.seed,
            question.stop,
            question.pictures,
        )

    answer = await in_thread(api.reading, answer_of)
    with api.running_answer(answer):
        turns = api.looking if question.pictures else api.reading
        await in_thread(turns, api.assistant.start, answer)
        yield question, answer


@router.post(CHAT)
async def chat(
    request: Request, asked: Annotated[tuple[ChatRequest, Answer], Depends(asked)]
) -> Response:
    api: Api = request.app
    question, answer = asked
    pieces = api.pieces(answer, request.state.began)
    if question.stream:
        events = api.events(answer, pieces, question.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=EVENT_HEADERS)
    text = "".join([piece async for piece in pieces])
    usage = usage_of(answer.prompt_tokens, answer.completion_tokens)
    return AsciiJSON(completion(api.name, text, answer.finish_reason, usage))


@router.api_route(MODELS, methods=READ)
async def models(request: Request) -> Response:
    return AsciiJSON({"object": "list", "data": [request.app.model()]})


@router.api_route(f"{MODELS}/{{name:path}}", methods=READ)
async def model(request: Request, name: str) -> Response:
    if name != request.app.name:
        message = f"model: there is only {request.app.name!r} here"
        raise ApiError(404, message, "model_not_found")
    return AsciiJSON(request.app.model())


@router.api_route(HEALTH, methods=READ)
async def health(request: Request) -> Response:
    if request.app.closing:
        raise shutting_down()
    return AsciiJSON({"status": "ok"})


@router.api_route(METRICS, methods=READ)
async def metrics(request: Request) -> Response:
    page = request.app.measures.page(request.app.assistant.statistics())
    return Response(page, media_type=MEDIA_TYPE)
