"""What stands in front of the web app: nothing on the page may reach another machine, and nobody
can make this one fetch an address."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ClientGone
from api.guards import parts_of_body, replay
from api.responses import AsciiJSON

MAX_JSON = 4 * 1024 * 1024  # of one event's inputs; files come by another way
ADDRESSES = "addresses of other machines are not fetched here"
# The page's own scripts, styles and sounds and nothing else: an answer that holds the address of a
# picture, as Markdown can, must not make the browser fetch it. Gradio's page has scripts of its own
# in it, and its plots compile their expressions.
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
        "frame-ancestors 'self'",
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

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

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

        async def with_policy(event: Message) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [
                    *event.get("headers", ()),
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(event)

        await self.app(scope, receive, with_policy)


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
