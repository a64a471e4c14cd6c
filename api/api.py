"""The routes: chat completions, the model's name, health and measures, as one ASGI application.

Every error, of an unknown path too, has OpenAI's form. A chat request runs in a thread of its own,
because an assistant's reply is read by waiting for it; what it says goes to the event loop as it
comes. Whoever leaves stops the reply: a client that goes away, a stream that fails, a shutdown.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from api.guards import (
    App,
    Budget,
    ClientGone,
    Counted,
    KeyGuard,
    Receive,
    Scope,
    Send,
    Share,
    busy,
    internal_error,
    read_body,
    send_error,
    send_json,
)
from api.measures import MEDIA_TYPE, Measures
from api.openai_api import Answer, ApiError, ChatRequest, Limits, Sound, bad, parse_request, usage
from assistant.answer import Answer as Reply
from assistant.assistant import Assistant, Blocked
from assistant.engine import Busy
from errors import PhiSightError

CHAT, MODELS, HEALTH, METRICS = "/v1/chat/completions", "/v1/models", "/health", "/metrics"
BODIES = 8  # full-size bodies that may be held at once
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
log = logging.getLogger("phisight.serving")


class Api:
    """An ASGI application over one assistant; `rest` answers the paths outside /v1, if given."""

    def __init__(
        self,
        assistant: Assistant,
        *,
        key: str = "",
        name: str | None = None,
        listen: Callable[[bytes], str] | None = None,
        limits: Limits = Limits(),
        max_requests: int = 80,
        rest: App | None = None,
    ) -> None:
        """
        Args: `key`: what every request but /health has to bring, if not empty; `name`: the
        model's, else that of its run; `listen`: writes down the speech of a WAV or MP3 file, and
        raises PhiSightError; `max_requests`: chat requests taken in at once.
        """
        self.assistant, self.limits, self.max_requests = assistant, limits, max_requests
        self.name = name or Path(assistant.source).parent.name
        self.measures = Measures()
        self.created = int(time.time())
        self._listen, self._rest = listen, rest
        self._budget = Budget(limits.body_bytes * BODIES)
        self._running: set[Question] = set()
        self._closing = False
        # One request at a time looks at pictures and one listens: each takes memory by the file.
        self._looking, self._listening = threading.Lock(), threading.Lock()
        self._routes = {
            CHAT: ("POST", self._chat),
            MODELS: ("GET", self._models),
            HEALTH: ("GET", self._health),
            METRICS: ("GET", self._metrics),
        }
        app: App = KeyGuard(self._route, key, self.measures) if key else self._route
        self._app = Counted(app, self.measures, tuple(self._routes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def busy(self) -> bool:
        """Whether an answer is being read or made, for the web app too."""
        counts = self.assistant.statistics()
        return bool(self.measures.in_flight or counts["running"] or counts["waiting"])

    def close(self) -> None:
        """Take in nothing more, and end the answers that are under way with an error."""
        self._closing = True
        for question in list(self._running):
            question.cancel()

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and the end, which a page may have to know of
            if self._rest is None:
                raise NotImplementedError(scope["type"])  # how a server is told that nobody does
            await self._rest(scope, receive, send)
            return
        path = scope["path"]
        if path not in self._routes:
            await self._other(scope, receive, send)
            return
        method, handler = self._routes[path]
        try:
            if scope["method"] not in (method, *["HEAD"] * (method == "GET")):
                raise ApiError(
                    405,
                    f"{path}: takes {method} only",
                    "method_not_allowed",
                    headers={"Allow": method},
                )
            await handler(scope, receive, send)
        except ApiError as error:
            self.measures.errors[error.code] += 1
            await send_error(send, error)

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path.startswith(f"{MODELS}/"):
            if path == f"{MODELS}/{self.name}":
                await send_json(send, 200, self._model())
                return
            error = ApiError(404, f"model: there is only {self.name!r} here", "model_not_found")
        elif self._rest is not None and not path.startswith("/v1/"):
            await self._rest(scope, receive, send)
            return
        else:
            error = ApiError(
                404, "no such path; see /v1/models and /v1/chat/completions", "not_found"
            )
        self.measures.errors[error.code] += 1
        await send_error(send, error)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._closing:
            raise shutting_down()
        await send_json(send, 200, {"status": "ok"})

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 200, {"object": "list", "data": [self._model()]})

    def _model(self) -> dict[str, object]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "phisight"}

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = self.measures.page(self.assistant.statistics()).encode()
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", MEDIA_TYPE.encode()),
                    (b"content-length", b"%d" % len(page)),
                ],
            }
        )
        await send({"type": "http.response.body", "body": page})

    # -- chat ---------------------------------------------------------------------------------

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._taken_in(), Share(self._budget) as share:
            began = time.perf_counter()
            body = await read_body(scope, receive, self.limits, share)
            question = Question(self._work, body)
            self._running.add(question)
            watch = asyncio.create_task(cancel_when_gone(receive, question))
            try:
                request = await question.accepted()
                if request.stream:
                    await self._stream(request, question, send, began)
                else:
                    await self._whole(question, send, began)
                self.measures.whole_request.observe(time.perf_counter() - began)
            finally:
                question.cancel()
                watch.cancel()
                self._running.discard(question)
                if question.reply and not question.reply.cached:
                    self.measures.generated(question.reply.completion_tokens)

    @contextmanager
    def _taken_in(self) -> Iterator[None]:
        if self._closing:
            raise shutting_down()
        if self.measures.in_flight >= self.max_requests:
            raise busy(f"{self.measures.in_flight} requests are under way already")
        self.measures.in_flight += 1
        try:
            yield
        finally:
            self.measures.in_flight -= 1

    async def _pieces(self, question: Question, began: float) -> AsyncIterator[str]:
        """The text as it comes. Raises what ended the reply before its end."""
        first = True
        async for piece in question.pieces():
            if first:
                self.measures.first_token.observe(time.perf_counter() - began)
                first = False
            yield piece
        if question.reply.finish_reason == "cancelled":
            raise shutting_down() if self._closing else ClientGone

    async def _whole(self, question: Question, send: Send, began: float) -> None:
        text = "".join([piece async for piece in self._pieces(question, began)])
        reply = question.reply
        await send_json(
            send,
            200,
            Answer(self.name).whole(
                text, reply.finish_reason, usage(reply.prompt_tokens, reply.completion_tokens)
            ),
        )

    async def _stream(
        self, request: ChatRequest, question: Question, send: Send, began: float
    ) -> None:
        """Server-sent events. What fails after the status is told as an event, as OpenAI does."""
        answer, reply = Answer(self.name), question.reply
        also = {"usage": None} if request.include_usage else {}

        async def event(value: object) -> None:
            text = value if isinstance(value, str) else json.dumps(value)
            await send(
                {
                    "type": "http.response.body",
                    "body": f"data: {text}\n\n".encode(),
                    "more_body": True,
                }
            )
            await asyncio.sleep(0)  # a lost connection is noticed before the next event
            if question.cancelled and not self._closing:
                raise ClientGone

        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        await event(answer.chunk({"role": "assistant", "content": ""}) | also)
        try:
            async for piece in self._pieces(question, began):
                await event(answer.chunk({"content": piece}) | also)
        except ClientGone:
            raise
        except Exception as failure:
            await event(self._told(failure).json())
        else:
            await event(answer.chunk({}, reply.finish_reason) | also)
            if request.include_usage:
                await event(answer.usage_chunk(usage(reply.prompt_tokens, reply.completion_tokens)))
            await event("[DONE]")
        await send({"type": "http.response.body", "body": b""})

    def _told(self, failure: Exception) -> ApiError:
        """What a client is told of a failure; one that it can do nothing about is logged."""
        error = failure if isinstance(failure, ApiError) else internal_error()
        if error is not failure:
            log.error("an answer failed", exc_info=failure)
        self.measures.errors[error.code] += 1
        return error

    # -- the thread of one request ------------------------------------------------------------

    def _work(self, question: Question, body: bytes) -> None:
        try:
            request = parse_request(body, self.name, self.limits)
            messages = request.conversation(self._write_down)
            with self._looking if request.pictures else nullcontext():
                reply = self.assistant.reply(
                    messages,
                    request.max_new_tokens,
                    request.sampling,
                    request.seed,
                    request.stop,
                    request.pictures,
                )
        except PhiSightError as error:
            raise as_api_error(error) from error
        question.accept(request, reply)
        for piece in reply:
            question.say(piece)

    def _write_down(self, sound: Sound) -> str:
        if self._listen is None:
            raise bad(sound.where, "this server does not listen; send text")
        try:
            with self._listening:
                return self._listen(sound.data)
        except PhiSightError as error:
            raise bad(sound.where, str(error), "invalid_audio") from error


class Question:
    """One chat request: its thread on one side, the event loop on the other."""

    def __init__(self, work: Callable[[Question, bytes], None], body: bytes) -> None:
        self.reply: Reply | None = None
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._said: asyncio.Queue[ChatRequest | str | BaseException | None] = asyncio.Queue()
        threading.Thread(target=self._run, args=(work, body), name="question", daemon=True).start()

    # in the thread

    def _run(self, work: Callable[[Question, bytes], None], body: bytes) -> None:
        try:
            work(self, body)
            self._tell(None)
        except Exception as error:  # raised again where the answer is awaited
            self._tell(error)

    def accept(self, request: ChatRequest, reply: Reply) -> None:
        """The question is sound and its answer has been ordered."""
        self.reply = reply
        if self.cancelled:  # before there was anything to cancel
            reply.cancel()
        self._tell(request)

    def say(self, piece: str) -> None:
        self._tell(piece)

    def _tell(self, what: ChatRequest | str | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._said.put_nowait, what)
        except RuntimeError:  # the loop is closed: the server has ended, and nobody listens
            self.cancel()

    # in the event loop

    def cancel(self) -> None:
        """Stop the answer within a token; of no effect once it has ended."""
        self.cancelled = True
        if self.reply is not None:
            self.reply.cancel()

    async def accepted(self) -> ChatRequest:
        return await self._next()

    async def pieces(self) -> AsyncIterator[str]:
        while (piece := await self._next()) is not None:
            yield piece

    async def _next(self) -> ChatRequest | str | None:
        item = await self._said.get()
        if isinstance(item, BaseException):
            raise item
        return item


async def cancel_when_gone(receive: Receive, question: Question) -> None:
    """A client says nothing after its body: what comes next is that it has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    question.cancel()


def as_api_error(error: PhiSightError) -> ApiError:
    """What the client is told when the assistant refuses a question."""
    if isinstance(error, Busy):
        return busy("too many questions wait")
    message = str(error)
    where, colon, _ = message.partition(": ")
    param = where if colon and where.startswith("messages[") else None
    if isinstance(error, Blocked):
        return ApiError(400, message, "content_filter", "messages")
    return ApiError(400, message, "invalid_value", param)


def shutting_down() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down; ask again later",
        "shutting_down",
        headers={"Retry-After": "5"},
    )
