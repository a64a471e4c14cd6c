"""Runs an ASGI application until it is told to end, and ends it in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import socket
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from api.connections import Connection, Patience, give_up_the_slowest, most_connections
from api.logs import bound_libraries, line_of, once
from api.origins import is_loopback
from errors import PhiSightError

BACKLOG = 256
ACCEPTED_AT_ONCE = 16  # before they are counted
SILENT_SECONDS = 60  # a client that takes nothing, or has gone without a word, is given up after it
TOLD_SECONDS = 0.5  # in which clients are told that their answer has ended


def listening_socket(host: str, port: int) -> socket.socket:
    """Bound before anything is loaded, so that a port in use is told at once.

    The connections that it accepts are closed by the system when data waits for a client longer
    than `SILENT_SECONDS`, where the system can do that.
    """
    if not 0 <= port <= 65535:  # which the system would take modulo 65,536
        raise PhiSightError(f"--port {port}: must be from 0 to 65535; choose another --port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_SECONDS * 1000)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PhiSightError(
            f"--host {host} --port {port}: {reason}; choose another --port"
        ) from None
    return bound


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return is_loopback(bound.getsockname()[0])


def address_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server with an end in order, which uvicorn alone does not give.

    uvicorn's own `timeout_graceful_shutdown` waits for every connection, those of idle pages too;
    it then cancels what is left without telling the application or its clients; only a second
    Ctrl-C, not a second SIGTERM, ends the wait; and the process dies of the signal, not with 0.

    The first SIGTERM or Ctrl-C lets answers end for `grace` seconds, as long as `busy` says that
    there are any; then `hurry` is called, which has to end what is left. Connections that would
    stay open for ever, such as those of a page in a browser, are closed. A second signal closes
    everything at once.
    """

    def __init__(
        self,
        app: ASGIApp,
        grace: float = 10.0,
        busy: Callable[[], bool] = lambda: False,
        hurry: Callable[[], None] = lambda: None,
        patience: Patience | None = None,
    ) -> None:
        """`patience`: what its clients may take of it."""
        self.patience = patience or Patience()
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, patience=self.patience),  # type: ignore[arg-type]
                loop="asyncio",  # also where another package has brought uvloop along
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                backlog=ACCEPTED_AT_ONCE,
                lifespan="auto",
            )
        )
        bound_libraries()
        self._grace, self._busy, self._hurry = grace, busy, hurry
        self._no_descriptor_at = -1.0  # when, by the event loop's clock

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self.patience.most is None:
            self.patience.most = most_connections()
        asyncio.get_running_loop().set_exception_handler(self._on_failure)
        await super().startup(sockets)
        for bound in sockets or ():
            bound.listen(BACKLOG)  # uvicorn has set it to `ACCEPTED_AT_ONCE`

    def _on_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What fails in the event loop itself, told as one line."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            # asyncio says it for every connection that waits, and looks again after a second.
            if loop.time() - self._no_descriptor_at > 0.5:
                self._no_descriptor_at = loop.time()
                connections = self.server_state.connections
                closed = give_up_the_slowest(connections, max(1, len(connections) // 4))
                once("descriptors", f"no file descriptor is left: {closed} idle connections closed")
            return
        said = str(context.get("message", "the event loop failed"))
        once(f"{type(error).__name__} {said}", f"{said}: {line_of(error)}" if error else said)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not noted for uvicorn, which would raise the signal once more after the end.
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        winding_down = asyncio.create_task(self._wind_down())
        try:
            await super().shutdown(sockets)
        finally:
            winding_down.cancel()
            # What is cancelled from here on was told to end: nothing that anybody has to look into.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    async def _wind_down(self) -> None:
        await self._wait(self._grace)
        self._hurry()
        await self._wait(TOLD_SECONDS)
        await asyncio.sleep(TOLD_SECONDS)  # what was written last is on its way
        self.force_exit = True

    async def _wait(self, seconds: float) -> None:
        """Until nothing is busy, but not longer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._busy():
                    await asyncio.sleep(0.05)


def run(
    app: ASGIApp,
    bound: socket.socket,
    announcement: str,
    started: Callable[[Callable[[], None]], None] = lambda end: None,
    **settings: Any,
) -> None:
    """Serve on a bound socket until SIGTERM or Ctrl-C; `settings` are those of `Server`. The
    announcement is printed once clients can connect; then `started` is called with what ends the
    server, from any thread."""
    bound.listen(BACKLOG)
    # What is loaded stays: the collector, which a large request's values wake many times, need not
    # go through it each time, while everything else waits.
    gc.collect()
    gc.freeze()
    server = Server(app, **settings)

    def end() -> None:
        server.should_exit = True

    print(announcement, flush=True)
    started(end)
    try:
        server.run(sockets=[bound])
    finally:
        gc.unfreeze()  # libraries look at the end whether everything is given back
