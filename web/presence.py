"""Which windows of the web app are still open: each keeps streams of events open, and who has none
is gone."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

RECONNECT_SECONDS = 1.0  # in which a window whose stream was broken opens another
LISTEN_SECONDS = 15.0  # in which a window that has sent an event opens a stream for the answer
LONGEST_NAME = 200


class Presence:
    """An ASGI application around the web app's, which calls `left` with the name of a window (its
    session hash) when it has gone, or has sent an event that it does not wait for."""

    def __init__(self, app: ASGIApp, left: Callable[[str], None]) -> None:
        self.app, self.left = app, left
        self._streams: Counter[str] = Counter()
        self._joined: dict[str, asyncio.TimerHandle] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        window = window_of_stream(scope)
        if window:
            await self._streaming(window, scope, receive, send)
        elif scope["method"] == "POST" and scope["path"].endswith("/queue/join"):
            await self._joining(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _streaming(self, window: str, scope: Scope, receive: Receive, send: Send) -> None:
        whole = gone = False

        async def receiving() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or (message["type"] == "http.disconnect" and not whole)
            return message

        async def sending(message: Message) -> None:
            nonlocal whole
            await send(message)
            whole = whole or (
                message["type"] == "http.response.body" and not message.get("more_body", False)
            )

        self._streams[window] += 1
        if window in self._joined:
            self._joined.pop(window).cancel()
        try:
            await self.app(scope, receiving, sending)
        finally:
            self._streams[window] -= 1
            if not self._streams[window]:
                del self._streams[window]
                if gone or not whole:  # else the server ended it, as nothing more was to come
                    self._look_again(window, RECONNECT_SECONDS)

    async def _joining(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()

        async def receiving() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        await self.app(scope, receiving, send)
        window = window_of_event(bytes(body))
        if window and window not in self._streams:
            self._look_again(window, LISTEN_SECONDS)

    def _look_again(self, window: str, seconds: float) -> None:
        """Whether a window has no stream after so many seconds either."""

        def look() -> None:
            self._joined.pop(window, None)
            if window not in self._streams:
                self.left(window)

        if window in self._joined:
            self._joined.pop(window).cancel()
        self._joined[window] = asyncio.get_running_loop().call_later(seconds, look)


def window_of_stream(scope: Scope) -> str:
    """The window that a request opens a stream of events for; empty for other requests."""
    path: str = scope["path"]
    if path.endswith("/queue/data"):
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        return query.get("session_hash", [""])[0][:LONGEST_NAME]
    before, found, window = path.rpartition("/heartbeat/")
    return window[:LONGEST_NAME] if found else ""


def window_of_event(body: bytes) -> str:
    """The window that sends an event; empty where it names none."""
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    window = event.get("session_hash") if isinstance(event, dict) else None
    return window[:LONGEST_NAME] if isinstance(window, str) else ""
