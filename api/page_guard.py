"""What stands in front of the web app: nothing on the page may reach another machine, and of Gradio
only what shows the page can be reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ApiError, ClientGone
from api.guards import DRAIN_BODIES, DRAIN_SECONDS, Budget, drain, parts_of_body, replay
from api.logs import failed
from api.responses import AsciiJSON

MAX_JSON = 4 * 1024 * 1024  # of one request's JSON; files come by another way
MAX_HELD = 64 * 1024 * 1024  # of the JSON of all requests under way
# Of Gradio: the page and what it loads. Its queue, its uploads and its way to read files are not
# used by the page, and nobody gets to them.
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json")
FILES = ("/assets/", "/static/")
OURS = "/app/"
UPLOAD = "/app/uploads"
# The page's own scripts, styles and sounds and nothing else: an answer that holds the address of a
# picture, as Markdown can, must not make the browser fetch it. Gradio's page has scripts of its own
# in it, and compiles its templates.
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
FOR_EVER, NEVER = b"public, max-age=31536000, immutable", b"no-store"
READS = ("GET", "HEAD")


class Guard:
    """An ASGI application around the web app's."""

    def __init__(self, app: ASGIApp, static: str, frames: Sequence[str] = ()) -> None:
        """`static`: path of the files whose content their path names; `frames`: origins of other
        sites whose pages may show this one in a frame."""
        self.app, self.static = app, static
        self.policy = f"{POLICY}; frame-ancestors {' '.join((SELF, *frames))}".encode()
        self.budget = Budget(MAX_HELD)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = whole = False

        async def with_policy(event: Message) -> None:
            nonlocal begun, whole
            if event["type"] == "http.response.start":
                begun = True
                event["headers"] = self._headers(scope["path"], event)
            else:
                whole = not event.get("more_body", False)
            await send(event)

        try:
            with self.budget.share() as take:
                receive = await self._let_in(scope, receive, take)
                await self.app(scope, receive, with_policy)
        except Refused as refusal:
            await refusal.answer(scope, receive, with_policy)
        except ApiError as error:  # of the budget
            await Refused(error.status, error.message).answer(scope, receive, with_policy)
        except ClientGone:
            raise
        except Exception as error:
            failed(f"{scope['method']} {scope['path']!r}", error)
            if not begun:
                await Refused(500, key="server_failed").answer(scope, receive, with_policy)
            elif not whole:
                raise  # the server closes the connection

    async def _let_in(self, scope: Scope, receive: Receive, take: Callable[[int], None]) -> Receive:
        """What gives the body of a request that may go on. Raises `Refused`, `ClientGone`, and what
        `take` raises."""
        path, method = scope["path"], scope["method"]
        if not path.startswith(OURS):
            if path not in PAGES and not path.startswith(FILES):
                raise Refused(404, "no such page; open /")
            if method not in READS:
                raise Refused(405, "the page is only read")
            scope["query_string"] = b""  # Gradio would load what it names
            return receive
        if method in READS or path == UPLOAD:
            return receive
        body, parts = bytearray(), parts_of_body(receive)
        async for part in parts:
            if len(body) + len(part) > MAX_JSON:
                await drain(parts, MAX_JSON * DRAIN_BODIES, DRAIN_SECONDS)
                raise Refused(413, f"the request is over {MAX_JSON:,} bytes; send less")
            take(len(part))
            body += part
        return replay(bytes(body), receive)

    def _headers(self, path: str, event: Message) -> list[tuple[bytes, bytes]]:
        """What every answer says beside its own headers."""
        headers = [
            *event.get("headers", ()),
            (b"content-security-policy", self.policy),
            (b"referrer-policy", b"no-referrer"),
            (b"x-content-type-options", b"nosniff"),
        ]
        if path.startswith(self.static):
            headers.append((b"cache-control", FOR_EVER if event["status"] == 200 else NEVER))
        elif not any(name.lower() == b"cache-control" for name, _ in headers):
            # Gradio names no version of its files; all else is somebody's own.
            if not path.startswith(FILES):
                headers.append((b"cache-control", NEVER))
        return headers


class Refused(Exception):
    """A request that does not come in."""

    def __init__(self, status: int, reason: str | None = None, key: str | None = None) -> None:
        """`key`: of web/texts, in place of a reason that is told as it is."""
        super().__init__(reason)
        self.status, self.reason, self.key = status, reason, key

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        told: dict[str, object] = {"key": self.key, "values": {}, "text": self.reason}
        await AsciiJSON({"error": told}, self.status)(scope, receive, send)
