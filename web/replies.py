"""What the page's routes answer: JSON, refusals in one form, and streams of events.

A refusal is `{"error": {"key": ..., "values": {...}, "text": ...}}`: `key` is one of web/texts, and
the page tells it in the reader's language; `text` is an error line, which is told as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Match, Router
from starlette.types import Receive, Scope, Send

from api.errors import ClientGone
from api.logs import failed
from api.responses import EVENT_HEADERS, AsciiJSON
from api.silence import kept_alive
from errors import PhiSightError
from web.errors import NotAllowed, NotThere, RequestError

if TYPE_CHECKING:
    from fastapi import FastAPI

SILENT_SECONDS = 15.0  # after which a comment is sent, so that no proxy gives up
LONGEST_PLACE = 100  # characters of where a mistake is: a browser names its fields itself
GONE = 499  # the status that nobody reads: the browser has left
AHEAD = 8  # events that a thread may be ahead of who reads them

Event = tuple[str, Any]
"""its name, and its data as JSON"""
Item = TypeVar("Item")


def refusal_of(error: BaseException, what: str) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of a failure. What the visitor can do nothing about is logged, with
    `what` failed, and told without details."""
    if isinstance(error, RequestError):
        told = {"key": error.key, "values": error.values, "text": None}
        status = {NotThere: 404, NotAllowed: 403}.get(type(error), 409)
        return status, {"error": told}
    if isinstance(error, PhiSightError):
        text = " ".join(str(error).split())
        return 400, {"error": {"key": None, "values": {}, "text": text}}
    failed(what, error if isinstance(error, Exception) else RuntimeError(type(error).__name__))
    return 500, {"error": {"key": "server_failed", "values": {}, "text": None}}


def tell_refusals(app: FastAPI) -> None:
    """Answer what the routes raise in the form above. What they should not raise is told and logged
    by `Guard`, which stands before all of them."""
    from fastapi.exceptions import RequestValidationError

    async def refused(request: Request, error: Exception) -> Response:
        status, told = refusal_of(error, f"{request.method} {request.url.path!r}")
        return AsciiJSON(told, status)

    async def misread(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])[:LONGEST_PLACE]
        return told_as_text(f"{where or 'the request'}: {first['msg']}; load the page again", 422)

    async def not_a_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return await refused(request, NotThere("nothing_there"))
        return told_as_text(f"{error.detail}; load the page again", error.status_code)

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=GONE)  # nobody reads it

    app.add_exception_handler(PhiSightError, refused)
    app.add_exception_handler(RequestValidationError, misread)
    app.add_exception_handler(HTTPException, not_a_route)
    app.add_exception_handler(ClientGone, left)


def told_as_text(text: str, status: int) -> Response:
    """A refusal of one line that is told as it is."""
    line = " ".join(text.split())
    return AsciiJSON({"error": {"key": None, "values": {}, "text": line}}, status)


class NothingElse(BaseRoute):
    """Stands behind all routes of a router below a path: what gets here is not there, or is not
    asked in a way that it takes."""

    def __init__(self, router: Router, below: str) -> None:
        self.router, self.below = router, below

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        is_ours = scope["type"] == "http" and scope["path"].startswith(self.below)
        return (Match.FULL if is_ours else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        others = (route for route in self.router.routes if route is not self)
        if any(route.matches(scope)[0] is Match.PARTIAL for route in others):
            raise HTTPException(405, f"{scope['method']} is not for this")
        raise HTTPException(404)


class EventStream(StreamingResponse):
    """Server-sent events, whose source is closed when the response ends, whatever ended it: what
    is only dropped is closed when it is collected, and its work goes on until then."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self.body_iterator.aclose()  # type: ignore[attr-defined]


def event_stream(events: AsyncIterator[Event], what: str) -> EventStream:
    """A response of server-sent events. What fails on the way is told as an event "error" with the
    JSON of a refusal."""

    async def lines() -> AsyncGenerator[str]:
        try:
            async with closed(events):
                async for name, data in events:
                    yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
                    await asyncio.sleep(0)  # a lost connection is noticed before the next event
        except Exception as error:
            _, told = refusal_of(error, what)
            yield f"event: error\ndata: {json.dumps(told)}\n\n"

    async def alive() -> AsyncGenerator[str]:
        said = lines()
        async with closed(said), closed(kept_alive(said, SILENT_SECONDS)) as spoken:
            async for line in spoken:
                yield line

    return EventStream(alive(), media_type="text/event-stream", headers=EVENT_HEADERS)


@contextlib.asynccontextmanager
async def closed(items: AsyncIterator[Item]) -> AsyncIterator[AsyncIterator[Item]]:
    """The items, closed when the block is left."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


async def from_thread(make: Callable[[Callable[[], bool]], Iterator[Item]]) -> AsyncIterator[Item]:
    """What an iterator gives that blocks, made and read in a thread of its own. `make` gets what
    says whether the reader has left; the iterator is then closed as soon as it gives its next item,
    or ends by itself."""
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    room = threading.Semaphore(AHEAD)
    left = threading.Event()

    def tell(kind: str, value: Any = None) -> None:
        try:
            loop.call_soon_threadsafe(items.put_nowait, (kind, value))
        except RuntimeError:  # the loop is closed: the server has ended
            left.set()

    def read() -> None:
        try:
            source = make(left.is_set)
            try:
                for item in source:
                    while not left.is_set() and not room.acquire(timeout=0.1):
                        pass
                    if left.is_set():
                        return
                    tell("item", item)
            finally:
                if isinstance(source, Generator):
                    source.close()
            tell("end")
        except Exception as error:
            tell("failed", error)
        except BaseException as error:  # raised in the loop, it would end the server
            tell("failed", RuntimeError(f"{type(error).__name__}: {error}"))

    threading.Thread(target=read, name="page", daemon=True).start()
    try:
        while True:
            kind, value = await items.get()
            if kind == "failed":
                raise value
            if kind == "end":
                return
            room.release()
            yield value
    finally:
        left.set()


def content_disposition(name: str) -> Mapping[str, str]:
    """The header that has a browser save a response under a name (RFC 6266)."""
    from urllib.parse import quote

    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_. ") else "_" for c in name)
    return {
        "content-disposition": f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name)}"
    }


def zip_time(seconds: float) -> tuple[int, int, int, int, int, int]:
    """A time since 1970 as a ZIP can hold it: a clock that was wrong is no reason to fail."""
    year, *rest = time.localtime(seconds)[:6]
    if not 1980 <= year <= 2107:
        return (1980, 1, 1, 0, 0, 0)
    return (year, *rest)  # type: ignore[return-value]
