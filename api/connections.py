"""One connection of a client: how long it may be silent, how slowly it may send, what it must not
send, and how many there may be. uvicorn alone waits for ever for the head of a request and for its
body, and takes connections until the process has no descriptor left."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.errors import ApiError, busy
from api.guards import OPEN
from api.logs import once
from api.responses import error_response
from system import limits

MOST = 1024  # connections at once
LARGEST_HEAD = 64 * 1024  # bytes
BEYOND = 16  # more of them are told that the server is full, or that it is healthy
SPARE_DESCRIPTORS = 64  # for files and pipes, beside those that are open at the start
FEWEST = 8

_HEAD_END = re.compile(rb"\n\r?\n")
_BARE = re.compile(rb"(?<!\r)\n|\r(?!\n)|\0")
_FOLDED = re.compile(rb"\n[ \t]")
_LENGTHS = re.compile(rb"\ncontent-length[ \t]*:[^\n]*,", re.IGNORECASE)
_FRAMING = re.compile(rb"\n(content-length|transfer-encoding)[ \t]*:", re.IGNORECASE)


@dataclass
class Patience:
    """What a client may take of a server."""

    head_seconds: float = 10.0
    """in which a request's head has to have arrived"""
    body_seconds: float = 20.0
    """and its body: so many seconds, and one more for every `bytes_a_second` that come, but never
    more than so many from now on"""
    bytes_a_second: float = 8192.0
    left_seconds: float = 2.0
    """in which what is still being sent is read and thrown away, when the answer has been given"""
    most: int | None = None
    """connections at once; None: as many as the process has descriptors for, at most `MOST`"""


def most_connections() -> int:
    """How many connections may be open, by the descriptors that the process may still open. Its
    limit is raised as far as it may be raised without rights."""
    allowed = limits.raise_descriptors(open_descriptors() + SPARE_DESCRIPTORS + MOST + BEYOND)
    if allowed is None:
        return MOST
    return min(MOST, max(FEWEST, allowed - open_descriptors() - SPARE_DESCRIPTORS - BEYOND))


def open_descriptors() -> int:
    try:
        return len(list(Path("/proc/self/fd").iterdir()))
    except OSError:  # no such folder on this system
        return 64


def fault_of_head(head: bytes) -> str | None:
    """Why the head of a request is refused that h11 takes: what two programs in a row may read
    differently, so that one of them sees a request that the other does not (RFC 9112, section 11).
    """
    if _BARE.search(head):
        return "a line of the head does not end with CR LF"
    if _FOLDED.search(head):
        return "a line of the head is folded"
    framing = [name.lower() for name in _FRAMING.findall(head)]
    if len(framing) > 1 or _LENGTHS.search(head):
        return "the length of the body is given more than once"
    if framing == [b"transfer-encoding"] and b" HTTP/1.0\r\n" in head[: head.find(b"\n") + 1]:
        return "HTTP/1.0 knows no Transfer-Encoding"
    return None


class Strict(h11.Connection):
    """h11's connection, which refuses what `fault_of_head` names."""

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            waiting, _ = self.trailing_data
            end = _HEAD_END.search(waiting)
            if end is not None:
                fault = fault_of_head(waiting[: end.end()])
                if fault is not None:
                    raise h11.RemoteProtocolError(fault)
        return super().next_event()


class Connection(H11Protocol):
    """uvicorn's connection with limits in time and number.

    Where there are too many, the one that has kept the server waiting longest makes room for a new
    one; where all of them are being answered, the new one is told so once it has asked. `OPEN` is
    answered even then.
    """

    def __init__(self, *arguments: Any, patience: Patience, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.patience = patience
        self.conn = Strict(h11.SERVER, LARGEST_HEAD)
        self.waiting_since = self.loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._body_deadline = 0.0
        self._refused = False

    # -- how many ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(self.patience.head_seconds, self._head_is_late)
        most = self.patience.most or MOST
        if len(self.connections) <= most:
            return
        if give_up_the_slowest(self.connections, 1, self):
            once("slow clients go", f"{most} connections are open: those that only wait are closed")
        elif len(self.connections) <= most + BEYOND:
            once("full", f"{most} connections are open, and all are busy: more are refused")
            self.app = self._answer_that_it_is_full
        else:
            self.give_up()

    def owes(self) -> bool:
        """Whether the server waits for this client: for a request or for the rest of one."""
        return self.is_idle() or self.conn.their_state is h11.SEND_BODY

    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def give_up(self) -> None:
        """Close it at once."""
        self._unset_timer()
        self.connections.discard(self)
        if self.cycle is not None:
            self.cycle.disconnected = True
        self.transport.abort()

    async def _answer_that_it_is_full(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == OPEN:
            await self.config.loaded_app(scope, receive, send)
        else:
            error = busy("the server has no room for more connections")
            error.headers["Connection"] = "close"
            await error_response(error)(scope, receive, send)

    # -- how long ----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        # What has come fast buys no long silence.
        self._body_deadline = min(
            self._body_deadline + len(data) / self.patience.bytes_a_second,
            self.loop.time() + self.patience.body_seconds,
        )
        super().data_received(data)
        self._watch()

    def handle_events(self) -> None:
        cycle = self.cycle
        super().handle_events()
        if self.cycle is not cycle:  # a request has begun
            self._unset_timer()
            self.waiting_since = self.loop.time()
            self._body_deadline = self.waiting_since + self.patience.body_seconds
        self._watch()

    def on_response_complete(self) -> None:
        self.waiting_since = self.loop.time()
        if self.conn.their_state is h11.SEND_BODY:  # of which nobody wants to know the rest
            left = self.waiting_since + self.patience.left_seconds
            self._body_deadline = min(self._body_deadline, left)
            self._unset_timer()
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_timer()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self._refused:
            self.give_up()
        else:
            super().shutdown()

    def _watch(self) -> None:
        """Have a timer run while the client owes a head or a body."""
        if self._timer is not None or self._refused or self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY:
            self._wait(self._body_deadline - self.loop.time(), self._body_is_late)
        elif self.is_idle() and self.timeout_keep_alive_task is None:
            self._wait(self.patience.head_seconds, self._head_is_late)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._unset_timer()
        self._timer = self.loop.call_later(max(seconds, 0.01), then)

    def _unset_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        self._timer = None
        if not self.is_idle() or self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            seconds = f"{self.patience.head_seconds:g} s"
            self._refuse(408, f"the head of the request did not arrive within {seconds}")
        else:
            self.give_up()

    def _body_is_late(self) -> None:
        self._timer = None
        if self.conn.their_state is not h11.SEND_BODY or self.transport.is_closing():
            return
        now = self.loop.time()
        if self.flow.read_paused and not self.is_idle():
            # The application takes its time with what has come: not the client's fault.
            self._body_deadline = max(self._body_deadline, now + 1)
        if now < self._body_deadline:
            self._wait(self._body_deadline - now, self._body_is_late)
        else:
            rate = f"{self.patience.bytes_a_second:,.0f} bytes a second"
            self._refuse(408, f"the body of the request comes too slowly, below {rate}")

    # -- what is refused ---------------------------------------------------------------------------

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn's own says to install a library, which would change nothing."""
        once("upgrade", "a client asks for another protocol than HTTP: it is given HTTP")

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, f"{msg.rstrip('.')}; send HTTP as RFC 9112 has it")

    def _refuse(self, status: int, reason: str) -> None:
        """Answer what cannot be given to the application, where an answer can still be given, and
        close the connection. What the client is still sending is read for a moment: it may else
        find the connection broken, and never read why."""
        self._refused = True
        self._unset_keepalive_if_required()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            code = "request_timeout" if status == 408 else "invalid_http"
            body = json.dumps(ApiError(status, reason, code).json()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            response = h11.Response(status_code=status, headers=headers, reason=REASONS[status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.flow.resume_reading()
        self.transport.write_eof()
        self._wait(self.patience.left_seconds, self.give_up)


def give_up_the_slowest(connections: Iterable[object], count: int, but: object = None) -> int:
    """Close so many of the connections that keep the server waiting, those without a request first;
    returns how many it were."""
    slow = [one for one in connections if isinstance(one, Connection) and one.owes()]
    slow = sorted(
        (one for one in slow if one is not but),
        key=lambda one: (not one.is_idle(), one.waiting_since),
    )
    for one in slow[:count]:
        one.give_up()
    return len(slow[:count])


REASONS = {400: b"Bad Request", 408: b"Request Timeout"}
