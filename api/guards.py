"""What stands around the routes: who may ask, how much is read, and what is counted."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from api.measures import Measures
from api.openai_api import ApiError, Limits

Event = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = "/health"  # the one path that needs no key
GONE = 499  # what a request is counted as whose client left before its status
DRAIN_SECONDS, DRAIN_BODIES = 10.0, 8
log = logging.getLogger("phisight.serving")


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


async def send_error(send: Send, error: ApiError) -> None:
    await send_json(send, error.status, error.json(), error.headers)


async def send_json(
    send: Send, status: int, value: object, headers: dict[str, str] | None = None
) -> None:
    body = json.dumps(value).encode()
    raw = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    raw += [(name.lower().encode(), text.encode()) for name, text in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class KeyGuard:
    """Lets nothing through without the key but `OPEN`: no route, no page, no mounted application.

    Programs send it as `Authorization: Bearer KEY`. A browser cannot, so that the key is taken as
    the password of HTTP's Basic scheme too, for which it asks the person; the name does not matter.
    """

    def __init__(self, app: App, key: str, measures: Measures) -> None:
        self.app, self.measures = app, measures
        self._digest = _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == OPEN or self._knows(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            api = scope["path"].startswith("/v1/")
            error = ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer" if api else 'Basic realm="PhiSight"'},
            )
            self.measures.errors[error.code] += 1
            await send_error(send, error)
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


class Counted:
    """Counts every request by route and status, and turns what nobody caught into a 500."""

    def __init__(self, app: App, measures: Measures, routes: tuple[str, ...]) -> None:
        self.app, self.measures, self.routes = app, measures, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = GONE

        async def counting(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
            await send(event)

        try:
            await self.app(scope, receive, counting)
        except ClientGone:
            status = GONE
            self.measures.errors["client_gone"] += 1
        except Exception:
            log.exception("%s %r failed", scope["method"], scope["path"])
            self.measures.errors["internal_error"] += 1
            if status != GONE:
                raise  # the answer has begun: the server closes the connection
            await send_error(counting, internal_error())
        finally:
            path = scope["path"]
            self.measures.requests[path if path in self.routes else "other", status] += 1


def internal_error() -> ApiError:
    return ApiError(500, "the server failed at this request; its log says why", "internal_error")


# -- the body of a request ------------------------------------------------------------------------


class Budget:
    """Bytes that the bodies of all requests under way may take together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0


class Share:
    """One request's part of a budget, given back when the `with` block is left."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.held = budget, 0

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.budget.held -= self.held

    def take(self, count: int) -> None:
        if self.budget.held + count > self.budget.limit:
            raise busy("too many large requests are under way")
        self.budget.held += count
        self.held += count


async def read_body(scope: Scope, receive: Receive, limits: Limits, share: Share) -> bytes:
    """The JSON body of a request, counted as it comes: what a header claims is not believed.

    Raises `ApiError` of status 408, 413, 415 or 503, and `ClientGone`.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":  # which no page of another site can send unasked
        raise ApiError(415, "Content-Type: must be application/json", "unsupported_media_type")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise ApiError(415, "Content-Encoding: send the body as it is", "unsupported_media_type")
    claimed = headers.get(b"content-length", b"0")
    large = claimed.isdigit() and int(claimed[:18]) > limits.body_bytes
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(limits.body_seconds):
            while more and not large:
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise ClientGone
                part, more = event.get("body", b""), event.get("more_body", False)
                large = len(body) + len(part) > limits.body_bytes
                if not large:
                    share.take(len(part))
                    body += part
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {limits.body_seconds:g} s", "request_timeout"
        ) from None
    if large:
        if more:
            await _drain(receive, limits)
        raise ApiError(
            413,
            f"the body is over {limits.body_bytes:,} bytes; send smaller pictures or fewer",
            "too_large",
        )
    return bytes(body)


async def _drain(receive: Receive, limits: Limits) -> None:
    """Read on for a while and keep nothing: a client that is still sending, and finds the
    connection closed, may never read why."""
    rest = limits.body_bytes * DRAIN_BODIES
    try:
        async with asyncio.timeout(min(DRAIN_SECONDS, limits.body_seconds)):
            while rest > 0:
                event = await receive()
                rest -= len(event.get("body", b""))
                if not event.get("more_body"):
                    return
    except TimeoutError:
        return


def busy(reason: str) -> ApiError:
    return ApiError(
        503, f"{reason}; ask again in a second", "overloaded", headers={"Retry-After": "1"}
    )
