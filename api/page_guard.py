"""What stands in front of the web app: nothing on the page may reach another machine, and nobody
can make this one fetch an address."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ClientGone
from api.guards import parts_of_body, replay
from api.logs import failed
from api.responses import AsciiJSON
from errors import PhiSightError

MAX_JSON = 4 * 1024 * 1024  # of one event's inputs; files come by another way
ADDRESSES = "addresses of other machines are not fetched here"
# The page's own scripts, styles and sounds and nothing else: an answer that holds the address of a
# picture, as Markdown can, must not make the browser fetch it. Gradio's page has scripts of its own
# in it, and its plots compile their expressions.
SELF = "'self'"
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "media-src 'self' data: blob:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "frame-src 'none'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)


class Guard:
    """An ASGI application around the web app's.

    Gradio takes addresses where it takes files, and fetches them; it passes requests on to other
    servers. Both are refused here with one line, before Gradio sees them.
    """

    def __init__(
        self, app: ASGIApp, uploads: UploadRoom | None = None, frames: Sequence[str] = ()
    ) -> None:
        """`uploads`: says how much may still be uploaded; `frames`: origins of other sites whose
        pages may show this one in a frame."""
        self.app, self.uploads = app, uploads
        self.policy = f"{POLICY}; frame-ancestors {' '.join((SELF, *frames))}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if reaches_out(scope["path"]):
            await refused(403, ADDRESSES)(scope, receive, send)
            return
        if _is_json_post(scope):
            try:
                body = await _read(receive)
            except ClientGone:
                return
            if len(body) > MAX_JSON:
                await refused(413, f"the request is over {MAX_JSON:,} bytes")(scope, receive, send)
                return
            if names_an_address(body):
                await refused(403, ADDRESSES)(scope, receive, send)
                return
            receive = replay(body, receive)
        app = self.app
        if self.uploads is not None and is_upload(scope):
            app = self._bounded_upload

        async def with_policy(event: Message) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [
                    *event.get("headers", ()),
                    (b"content-security-policy", self.policy),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(event)

        if scope["method"] == "POST":
            await app_or_400(app, scope, receive, with_policy)
        else:
            await app(scope, receive, with_policy)

    async def _bounded_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An upload that is counted as it arrives; what Gradio leaves of one that is cut off is
        removed when it ends."""
        uploads = self.uploads
        assert uploads is not None
        try:
            await asyncio.to_thread(uploads.begin)
        except PhiSightError as error:
            await refused(413, str(error))(scope, receive, send)
            return
        too_much: PhiSightError | None = None
        begun = False

        async def counted() -> Message:
            nonlocal too_much
            message = await receive()
            try:
                uploads.take(len(message.get("body", b"")))
            except PhiSightError as error:
                too_much = error
                raise ClientGone from None
            return message

        async def sending(message: Message) -> None:
            nonlocal begun
            if too_much is None:  # else Gradio tells its own failure of it
                begun = True
                await send(message)

        try:
            await self.app(scope, counted, sending)
        except Exception as error:
            if too_much is None and not is_gone(error):
                raise
        finally:
            await asyncio.shield(asyncio.to_thread(uploads.end))
        if too_much is not None and not begun:
            await refused(413, str(too_much))(scope, receive, send)


async def app_or_400(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Gradio fails at a request that lacks what it looks for, or is no form that it can read: that
    is the client's fault, and told so. What our own functions do wrong fails later, in its queue.
    """
    withheld: list[Message] = []

    async def sending(message: Message) -> None:
        if withheld or message.get("status") == 500:
            withheld.append(message)
        else:
            await send(message)

    try:
        await app(scope, receive, sending)
    except Exception as error:
        if not isinstance(error, _client_faults()) or not withheld:
            for message in withheld:
                await send(message)
            raise
        failed("reading a page's request", error)
        reason = "the request is not one that this page sends; load the page again"
        await refused(400, reason)(scope, receive, send)
    else:
        for message in withheld:
            await send(message)


def _client_faults() -> tuple[type[Exception], ...]:
    """What Gradio raises at a request that is not one of its page's."""
    from gradio.route_utils import FnIndexInferError  # loaded where a page is served

    return LookupError, TypeError, ValueError, FnIndexInferError


class UploadRoom(Protocol):
    """How much may be uploaded; `begin` and `take` raise PhiSightError where it is too much."""

    def begin(self) -> None: ...
    def take(self, count: int) -> None: ...
    def end(self) -> None: ...


def is_upload(scope: Scope) -> bool:
    return scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload")


def is_gone(error: Exception) -> bool:
    """Whether a failure says that the client went away while it was sending."""
    return isinstance(error, ClientGone | ClientDisconnect)


def is_address(path: object) -> bool:
    return isinstance(path, str) and path.strip().lower().startswith(("http:", "https:", "//"))


def reaches_out(path: str) -> bool:
    """Whether a request's path is one of those by which Gradio fetches from elsewhere."""
    _, is_file, named = path.partition("/file=")
    return "/proxy=" in path or bool(is_file) and is_address(named)


def names_an_address(body: bytes) -> bool:
    """Whether the JSON of an event gives an address as the path of a file. What is not JSON is
    left to Gradio, which refuses it."""
    try:
        waiting: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if is_address(value.get("path")):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def _is_json_post(scope: Scope) -> bool:
    kind = dict(scope["headers"]).get(b"content-type", b"")
    return (
        scope["method"] == "POST"
        and "/gradio_api/" in scope["path"]
        and not kind.startswith(b"multipart/")
    )


async def _read(receive: Receive) -> bytes:
    """The whole body, or a little more than `MAX_JSON` of it."""
    body = bytearray()
    async for part in parts_of_body(receive):
        body += part
        if len(body) > MAX_JSON:
            break
    return bytes(body)


def refused(status: int, reason: str) -> AsciiJSON:
    return AsciiJSON({"detail": reason}, status)
