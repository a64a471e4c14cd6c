"""The routes: chat completions, the model's name, health and measures, as a FastAPI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from api.errors import ApiError, as_api_error, bad, shutting_down
from api.forms import Limits
from api.guards import Beside, Budget, Intake, KeyGuard, Reporting, Taken
from api.measures import MEDIA_TYPE, Measures
from api.origins import Allowed, OriginGuard
from api.places import KINDS, Kind, Place, Places
from api.requests import ChatRequest, parse_request
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
from api.stream import in_thread, pieces_of, until_left
from assistant.answer import Answer
from assistant.assistant import Assistant
from errors import PhiSightError

CHAT, MODELS, HEALTH, METRICS = "/v1/chat/completions", "/v1/models", "/health", "/metrics"
ROUTES = (CHAT, MODELS, HEALTH, METRICS)
READ = ["GET", "HEAD"]
BODIES = 8  # full-size bodies that may be held at once
ARRIVING = 256  # requests whose bodies are being sent or read
# How much of each kind of work is done at once; each takes memory by its file. A recording is heard
# window by window, and windows of several take turns.
AT_ONCE: dict[Kind, int] = {"arriving": 4, "ears": 4, "eyes": 1, "voice": 1}
Listen = Callable[[bytes, Callable[[], bool]], str]
"""Writes down the speech of a recording, until the second one says that nobody waits for it."""
Result = TypeVar("Result")
Given = ParamSpec("Given")
router = APIRouter()


class Api(FastAPI):
    """The API over one assistant; `rest` answers the paths outside it, if given."""

    def __init__(
        self,
        assistant: Assistant,
        *,
        key: str = "",
        allowed: Allowed = Allowed(),
        name: str | None = None,
        listen: Listen | None = None,
        limits: Limits = Limits(),
        max_requests: int = 80,
        rest: ASGIApp | None = None,
    ) -> None:
        """
        Args: `key`: what every request but /health has to bring, if not empty; `allowed`: to which
        hosts, and from pages of which origins; `name`: the model's, else that of its run; `listen`:
        writes down the speech of a recording, and raises PhiSightError; `max_requests`: how many
        may hold a place of each kind at once.
        """
        super().__init__(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        self.assistant, self.limits = assistant, limits
        self.name = name or Path(assistant.source).parent.name
        self.listen = listen
        self.places = Places(dict.fromkeys(KINDS, max_requests) | {"arriving": ARRIVING})
        self.measures, self.budget = Measures(self.places), Budget(limits.body_bytes * BODIES)
        self.created = int(time.time())
        self.running: set[Answer] = set()
        self.closing = False
        self.turns = {kind: asyncio.Semaphore(count) for kind, count in AT_ONCE.items()}
        self.include_router(router)
        self.add_exception_handler(HTTPException, pass_on)
        # A request meets the one that is added last first.
        if rest is not None:
            self.add_middleware(Beside, other=rest, routes=ROUTES)
        self.add_middleware(
            Intake,
            paths=taken_at(limits),
            seconds=limits.body_seconds,
            budget=self.budget,
            taken_in=self.taken_in,
        )
        if key:
            self.add_middleware(KeyGuard, key=key)
        self.add_middleware(Reporting, measures=self.measures, routes=ROUTES)
        self.add_middleware(OriginGuard, allowed=allowed, measures=self.measures)

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
    def taken_in(self, kind: Kind) -> Iterator[Place]:
        """For as long as a request lasts. Raises `ApiError` where there is no room for it, or none
        of the kind that it will need."""
        if self.closing:
            raise shutting_down()
        self.places.check(kind)
        with self.places.place() as place:
            yield place

    async def turn(
        self,
        request: Request,
        kind: Kind,
        function: Callable[Given, Result],
        *arguments: Given.args,
        **settings: Given.kwargs,
    ) -> Result:
        """Gives a request a place of a kind, and what `function` returns or raises in a thread when
        its turn has come. Raises `ApiError` where too many wait."""
        request.state.place.move(kind)
        return await in_thread(self.turns[kind], function, *arguments, **settings)

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

    def read(self, body: bytes) -> tuple[ChatRequest, Answer | None]:
        """What is asked, and the answer, not yet begun; None while there is speech to listen to.

        Raises `ApiError` and `PhiSightError`.
        """
        question = parse_request(body, self.name, self.limits)
        return question, None if question.sounds else self.answer_to(question, {})

    def listen_to(self, question: ChatRequest, cancelled: Callable[[], bool]) -> Answer:
        """The answer to a question with speech, not yet begun; when `cancelled` says so, the rest
        is not heard. Raises as `read` does."""
        heard: dict[str, str] = {}
        for sound in question.sounds:
            if self.listen is None:
                raise bad(sound.where, "this server does not listen; send text")
            try:
                heard[sound.where] = self.listen(sound.data, cancelled)
            except PhiSightError as error:
                raise bad(sound.where, str(error), "invalid_audio") from error
        return self.answer_to(question, heard)

    def answer_to(self, question: ChatRequest, heard: Mapping[str, str]) -> Answer:
        return self.assistant.ask(
            question.conversation(lambda sound: heard[sound.where]),
            question.max_new_tokens,
            question.sampling,
            question.seed,
            question.stop,
            question.pictures,
        )

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


def taken_at(limits: Limits) -> dict[str, Taken]:
    """What is taken in at every path that reads a body."""
    return {CHAT: Taken(limits.body_bytes, "text")}


async def pass_on(request: Request, failure: Exception) -> Response:
    """FastAPI's own answers to unknown paths and methods do not have OpenAI's form: `Reporting`
    answers them, as everything else that is raised."""
    raise failure


async def asked(request: Request) -> AsyncIterator[tuple[ChatRequest, Answer]]:
    """A chat request and the answer to it, which ends with the response however that ends."""
    api: Api = request.app
    body = await request.body()
    question, answer = await api.turn(request, "arriving", api.read, body)
    if answer is None:
        with until_left() as gone:
            answer = await api.turn(request, "ears", api.listen_to, question, gone)
    with api.running_answer(answer):
        if question.pictures:
            await api.turn(request, "eyes", api.assistant.start, answer)
            request.state.place.move("text")
        else:
            request.state.place.move("text")
            api.assistant.start(answer)
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
