"""What stands around the routes as pure ASGI: who may ask, how much is read, what is counted.

These act before a body is read, and while a response streams. Starlette's `BaseHTTPMiddleware`
would do neither: it hides from the application that its client has gone.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ApiError, ClientGone, as_api_error, busy
from api.measures import Measures
from api.places import Kind, Place
from api.responses import error_response

OPEN = "/health"  # the one path that needs no key
GONE = 499  # what a request is counted as whose client left before its answer's end
DRAIN_SECONDS, DRAIN_BODIES = 10.0, 8
SMALL = 128 * 2**10  # bytes of a body that are not counted: there are only so many connections


class Reporting:
    """Counts every request by route and status, and answers every error in OpenAI's form."""

    def __init__(self, app: ASGIApp, measures: Measures, routes: tuple[str, ...]) -> None:
        self.app, self.measures, self.routes = app, measures, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, whole = GONE, False

        async def counting(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                whole = not message.get("more_body", False)
            await send(message)

        path = scope["path"]
        try:
            await self.app(scope, receive, counting)
        except ClientGone:
            status = GONE
            self.measures.errors["client_gone"] += 1
        except Exception as failure:
            error = as_api_error(failure, f"{scope['method']} {path!r}", path)
            self.measures.errors[error.code] += 1
            if status == GONE:
                await error_response(error)(scope, receive, counting)
            elif not whole:
                raise  # the answer has begun: the server closes the connection
        finally:
            self.measures.requests[path if path in self.routes else "other", status] += 1


class KeyGuard:
    """Lets nothing through without the key but `OPEN`: no route, no page, no mounted application.

    Programs send it as `Authorization: Bearer KEY`. A browser cannot, so that the key is taken as
    the password of HTTP's Basic scheme too, for which it asks the person; the name does not matter.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self._digest = app, _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == OPEN or self._knows(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            api = scope["path"].startswith("/v1/")
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer" if api else 'Basic realm="PhiSight"'},
            )
        else:  # a web socket, before it is accepted
            await send({"type": "websocket.close", "code": 1008})

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, credentials = given[0].strip().partition(b" ")
        if scheme.lower() == b"basic":
            try:
                _, _, credentials = base64.b64decode(credentials, validate=True).partition(b":")
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        # Digests of equal length, compared in constant time: neither the key nor its length leaks.
        return hmac.compare_digest(_digest(credentials.strip()), self._digest)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Beside:
    """Gives the paths outside the API to another application, and the server's start and end."""

    def __init__(self, app: ASGIApp, other: ASGIApp, routes: tuple[str, ...]) -> None:
        self.app, self.other, self.routes = app, other, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        ours = path in self.routes or path.startswith("/v1/")
        await (self.app if ours else self.other)(scope, receive, send)


# -- the body of a request ------------------------------------------------------------------------


class Budget:
    """Bytes that the bodies of all requests under way may take together, beyond `SMALL` of each:
    large ones that wait to be heard do not keep out questions in text."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """What takes so many bytes more; they are given back when the block is left."""
        free, taken = SMALL, 0

        def take(count: int) -> None:
            nonlocal free, taken
            counted = max(0, count - free)
            free = max(0, free - count)
            if self.held + counted > self.limit:
                raise busy("too many large requests are under way")
            self.held += counted
            taken += counted

        try:
            yield take
        finally:
            self.held -= taken


@dataclass(frozen=True)
class Taken:
    """What is taken in by POST at one path."""

    body_bytes: int
    kind: Kind
    """of the place that it will need: where none is free, the body is not even read"""
    media_types: tuple[bytes, ...] = (b"application/json",)


class Intake:
    """Takes in requests to the paths of a table: reads the whole body within its limit and `budget`
    before the application sees it, and cancels the application where it waits as soon as the client
    leaves. Of every path it says how much is taken; the route finds its place as
    `request.state.place`, and moves it to the kind of work that comes next."""

    def __init__(
        self,
        app: ASGIApp,
        paths: Mapping[str, Taken],
        seconds: float,
        budget: Budget,
        taken_in: Callable[[Kind], AbstractContextManager[Place]],
    ) -> None:
        """`seconds`: in which a body has to have arrived; `taken_in` is entered for as long as a
        request lasts, and may refuse it."""
        self.app, self.paths, self.seconds, self.budget = app, paths, seconds, budget
        self.taken_in = taken_in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = self.paths.get(scope["path"]) if scope["type"] == "http" else None
        if taken is None or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        with self.taken_in(taken.kind) as place, self.budget.share() as take:
            scope.setdefault("state", {}).update(began=time.perf_counter(), place=place)
            body = await read_body(scope, receive, taken, self.seconds, take)
            with anyio.CancelScope() as client:
                watch = asyncio.create_task(cancel_when_gone(receive, client))
                try:
                    await self.app(scope, replay(body, never), send)
                finally:
                    watch.cancel()
            if client.cancelled_caught:
                raise ClientGone


async def never() -> Message:
    """What an application is told after the body: nothing, until it is cancelled."""
    await anyio.sleep_forever()
    raise AssertionError


async def cancel_when_gone(receive: Receive, client: anyio.CancelScope) -> None:
    """A client says nothing after its body: what comes next is that it has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    client.cancel()


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, then what the first one gives."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def parts_of_body(receive: Receive) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises `ClientGone`."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def read_body(
    scope: Scope, receive: Receive, taken: Taken, seconds: float, take: Callable[[int], None]
) -> bytes:
    """The body of a request, counted as it comes: what a header claims is not believed.

    Raises `ApiError` of status 408, 413, 415 or 503, and `ClientGone`.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind not in taken.media_types:
        known = b" or ".join(taken.media_types).decode()
        raise ApiError(415, f"Content-Type: must be {known}", "unsupported_media_type")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise ApiError(415, "Content-Encoding: send the body as it is", "unsupported_media_type")
    claimed = headers.get(b"content-length", b"0")
    body, parts = bytearray(), parts_of_body(receive)
    try:
        if not (claimed.isdigit() and int(claimed[:18]) > taken.body_bytes):
            async with asyncio.timeout(seconds):
                async for part in parts:
                    if len(body) + len(part) > taken.body_bytes:
                        break
                    take(len(part))
                    body += part
                else:
                    return bytes(body)
    except TimeoutError:
        message = f"the body did not arrive within {seconds:g} s"
        raise ApiError(408, message, "request_timeout") from None
    await drain(parts, taken.body_bytes * DRAIN_BODIES, min(DRAIN_SECONDS, seconds))
    message = f"the body is over {taken.body_bytes:,} bytes; send smaller files or fewer"
    raise ApiError(413, message, "too_large")


async def drain(parts: AsyncIterator[bytes], most: int, seconds: float) -> None:
    """Read on for a while and keep nothing: a client that is still sending, and finds the
    connection closed, may never read why."""
    try:
        async with asyncio.timeout(seconds):
            async for part in parts:
                most -= len(part)
                if most <= 0:
                    return
    except TimeoutError:
        return
