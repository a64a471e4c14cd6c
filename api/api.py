"""The routes: chat completions, the model's name, health and measures, as a FastAPI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Concatenate, ParamSpec, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from api import chat, responses_reply, spoken, transcriptions
from api.asking import Parse
from api.connections import BEYOND, MOST
from api.errors import ApiError, bad, shutting_down
from api.forms import MIB, Limits
from api.guards import SMALL, Beside, Budget, Intake, KeyGuard, Reporting, Taken
from api.json_output import JsonOutput
from api.measures import MEDIA_TYPE, Measures
from api.origins import Allowed, OriginGuard
from api.places import KINDS, Kind, Place, Places
from api.requests import ChatRequest
from api.responses import AsciiJSON
from api.run_measures import RunMeasures
from api.senses import Listen
from api.spoken import SPEECH, Speak
from api.stream import in_thread, pieces_of
from api.transcriptions import TRANSCRIPTIONS, TRANSLATIONS, Transcribe
from assistant.answer import Answer
from assistant.assistant import Assistant
from assistant.refusals import ContextExceeded
from errors import PhiSightError
from hub import model_name
from speech.whisper import TooLong
from workers.pool import never

MODELS, HEALTH, METRICS = "/v1/models", "/health", "/metrics"
ASKED = (chat.CHAT, responses_reply.RESPONSES)
ROUTES = (*ASKED, TRANSCRIPTIONS, TRANSLATIONS, SPEECH, MODELS, HEALTH, METRICS)
READ = ["GET", "HEAD"]
BODIES = 8  # full-size bodies that may be held at once
# How much of each kind of work is done at once; each takes memory by its file. A recording is heard
# window by window, and windows of several take turns; so do pictures, by four.
AT_ONCE: dict[Kind, int] = {"arriving": 4, "ears": 4, "eyes": 4, "voice": 1}
LARGE_AT_ONCE = 2  # bodies over `SMALL`; short questions do not wait until they are read
Result = TypeVar("Result")
Given = ParamSpec("Given")
PARTS = (chat, responses_reply, transcriptions, spoken)
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
        transcribe: Transcribe | None = None,
        speak: Speak | None = None,
        limits: Limits = Limits(),
        max_requests: int = 80,
        rest: ASGIApp | None = None,
    ) -> None:
        """
        Args: `key`: what every request but /health has to bring, if not empty; `allowed`: to which
        hosts, and from pages of which origins; `name`: the model's, else that of its run; `listen`:
        writes down the speech of a question, and raises PhiSightError; `transcribe` and `speak`:
        what the routes of sound do; `max_requests`: how many may hold a place of each kind at once.
        """
        super().__init__(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        self.assistant = assistant
        parts = assistant.parts
        self.limits = replace(
            limits,
            context_tokens=assistant.context_tokens,
            picture_tokens=parts.chat_format.tokens_per_image,
        )
        self.json_output = JsonOutput(
            parts.base.tokenizer, parts.base.model.config.vocab_size, assistant.stop_ids
        )
        self.name = name or model_name(assistant.source)
        self.listen, self.transcribe, self.speak = listen, transcribe, speak
        self.places = Places(dict.fromkeys(KINDS, max_requests) | {"arriving": MOST + BEYOND})
        self.measures, self.budget = Measures(self.places), Budget(limits.body_bytes * BODIES)
        self.run_measures, self.run_turn = RunMeasures(assistant.source), asyncio.Semaphore(1)
        self.created = int(time.time())
        self.running: set[Answer] = set()
        self.closing = False
        self.schemas = asyncio.Semaphore(1)  # compiled at once
        self.turns = {kind: asyncio.Semaphore(count) for kind, count in AT_ONCE.items()}
        self.large = asyncio.Semaphore(LARGE_AT_ONCE)
        for routes in (*(part.router for part in PARTS), router):
            self.include_router(routes)
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

    async def reading(
        self,
        body: bytes,
        function: Callable[Concatenate[bytes, Given], Result],
        *arguments: Given.args,
        **settings: Given.kwargs,
    ) -> Result:
        """What `function` makes of a body in a thread, in the turn of those of its size."""
        turns = self.turns["arriving"] if len(body) <= SMALL else self.large
        return await in_thread(turns, function, body, *arguments, **settings)

    def model(self) -> dict[str, object]:
        """As OpenAI's, and what the weights come from: see `reports.card.provenance`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "phisight",
            "provenance": self.assistant.provenance,
        }

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

    def read(self, body: bytes, parse: Parse) -> tuple[ChatRequest, Answer | None]:
        """What is asked, and the answer, not yet begun; None while there is speech to listen to, or
        a schema to compile.

        Raises `ApiError` and `PhiSightError`.
        """
        question = parse(body, self.name, self.limits)
        takes_long = question.sounds or question.schema is not None
        return question, None if takes_long else self.answer_to(question, {})

    def listen_to(self, question: ChatRequest, cancelled: Callable[[], bool]) -> Answer:
        """The answer to a question with speech, not yet begun; when `cancelled` says so, the rest
        is not heard. Raises as `read` does."""
        heard: dict[str, str] = {}
        for sound in question.sounds:
            if self.listen is None:
                raise bad(sound.where, "this server does not listen; send text")

            def fits(text: str) -> bool:
                so_far = heard | {sound.where: text}
                return self.assistant.has_room(
                    question.conversation(lambda other: so_far.get(other.where, ""))
                )

            try:
                heard[sound.where] = self.listen(sound.data, cancelled, fits)
            except TooLong as error:
                reason = (
                    f"this model's maximum context length is {self.limits.context_tokens} tokens,"
                    f" and the first {error.seconds / 60:.1f} minutes of {sound.where} fill it, the"
                    " rest was not heard; send a shorter part, or have it written down by"
                    f" {TRANSCRIPTIONS}"
                )
                raise bad(question.name, reason, "context_length_exceeded") from error
            except PhiSightError as error:
                raise bad(sound.where, str(error), "invalid_audio") from error
        return self.answer_to(question, heard, cancelled)

    def answer_to(
        self,
        question: ChatRequest,
        heard: Mapping[str, str],
        cancelled: Callable[[], bool] = never,
    ) -> Answer:
        """The answer to a question whose speech is written down, not yet begun. Raises as `read`
        does, and `workers.Cancelled`."""
        schema = question.schema
        try:
            return self.assistant.ask(
                question.conversation(lambda sound: heard[sound.where]),
                question.max_new_tokens,
                question.sampling,
                question.seed,
                question.stop,
                question.pictures,
                None if schema is None else self.json_output.constraint(schema, cancelled),
            )
        except ContextExceeded as error:
            # In the words by which programs know OpenAI's error.
            reason = (
                f"this model's maximum context length is {error.context} tokens, and the"
                f" conversation has {error.tokens}; {error.remedy}"
            )
            raise bad(question.name, reason, "context_length_exceeded") from error

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


def taken_at(limits: Limits) -> dict[str, Taken]:
    """What is taken in at every path that reads a body."""
    sound = Taken(limits.body_bytes, "ears", (b"multipart/form-data",))
    return {
        **dict.fromkeys(ASKED, Taken(limits.body_bytes, "text")),
        **dict.fromkeys((TRANSCRIPTIONS, TRANSLATIONS), sound),
        SPEECH: Taken(min(MIB, limits.body_bytes), "voice"),
    }


async def pass_on(request: Request, failure: Exception) -> Response:
    """FastAPI's own answers to unknown paths and methods do not have OpenAI's form: `Reporting`
    answers them, as everything else that is raised."""
    raise failure


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
    # In a thread: a log that has grown is read from the disk.
    of_run = await in_thread(request.app.run_turn, request.app.run_measures.page)
    return Response(page + of_run, media_type=MEDIA_TYPE)
