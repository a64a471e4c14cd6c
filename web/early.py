"""What the page's HTML has a browser ask for at once.

Gradio puts a page's `head` in by its own script, when that is loaded and run; what stands in the
HTML itself is asked for meanwhile.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

END = b"</head>"


class Early:
    """An ASGI application that adds lines to the head of the HTML that another one serves at /."""

    def __init__(self, app: ASGIApp, lines: str) -> None:
        self.app, self.lines = app, lines.encode() + b"\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/":
            await self.app(scope, receive, send)
            return
        start: Message = {}
        page = bytearray()

        async def held(event: Message) -> None:
            nonlocal start
            if event["type"] == "http.response.start":
                start = event
                return
            if event["type"] != "http.response.body":
                await send(event)
                return
            page.extend(event.get("body", b""))
            if not event.get("more_body", False):
                whole = bytes(page).replace(END, self.lines + END, 1)
                others = [one for one in start["headers"] if one[0].lower() != b"content-length"]
                length = (b"content-length", str(len(whole)).encode())
                await send({**start, "headers": [*others, length]})
                await send({"type": "http.response.body", "body": whole})

        await self.app(scope, receive, held)
