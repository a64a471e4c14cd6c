"""What a child process writes, taken as it comes; and a socket that a child gets.

Windows can neither wait for a pipe with others, nor read one without waiting, nor let a child
inherit a socket. There a thread reads the pipe, and the socket is shared through standard input.
"""

from __future__ import annotations

import os
import queue
import selectors
import socket
import subprocess
import threading
from typing import IO, Any

PIECE = 1 << 16  # bytes
HELD = 64  # pieces that a thread reads ahead
LOOK_SECONDS = 0.2  # how often a thread looks whether its pipe is wanted any more
SHARED = "shared"  # in the place of a descriptor's number: the socket is described on fd 0


class Pipe:
    """The reading end of a child's pipe; for one thread."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.descriptor: int | None = None
        """to wait for with others; None where that cannot be done: then `read` is asked at times"""
        if hasattr(os, "set_blocking"):
            self.descriptor = file.fileno()
            os.set_blocking(self.descriptor, False)
            return
        self._pieces: queue.Queue[bytes] = queue.Queue(HELD)
        self._waiting: bytes | None = None
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._read_ahead, name="pipe", daemon=True)
        self._reader.start()

    def wait(self, seconds: float) -> None:
        """Until there is something to read, or it has ended, or so long."""
        if self.descriptor is not None:
            with selectors.DefaultSelector() as selector:
                selector.register(self.descriptor, selectors.EVENT_READ)
                selector.select(seconds)
        elif self._waiting is None:
            self._waiting = self._next(seconds)

    def read(self) -> bytes | None:
        """What has come, at most a piece of it; None for nothing, b"" where the pipe has ended."""
        if self.descriptor is not None:
            try:
                return os.read(self.descriptor, PIECE)
            except BlockingIOError:
                return None
        if self._waiting is None:
            self._waiting = self._next(0)
        piece = self._waiting
        if piece:  # an end stays there
            self._waiting = None
        return piece

    def close(self) -> None:
        """Read no more; the child should have ended."""
        if self.descriptor is None:
            self._closed.set()
            self._reader.join(2 * LOOK_SECONDS)
            if self._reader.is_alive():  # a child's child keeps the pipe open: the thread closes it
                return
        self._file.close()

    def _next(self, seconds: float) -> bytes | None:
        try:
            return self._pieces.get(timeout=seconds) if seconds else self._pieces.get_nowait()
        except queue.Empty:
            return None

    def _read_ahead(self) -> None:
        piece = b"begin"
        while piece and not self._closed.is_set():
            piece = os.read(self._file.fileno(), PIECE)
            while not self._closed.is_set():
                try:
                    self._pieces.put(piece, timeout=LOOK_SECONDS)
                    break
                except queue.Full:
                    continue


class Handing:
    """A socket that is given to a child: `Popen([..., handing.argument], **handing.options)` with a
    pipe as standard input, then `finish`; the child calls `received(argument)`."""

    def __init__(self, theirs: socket.socket) -> None:
        self._socket = theirs
        self._inherits = not hasattr(theirs, "share")
        self.argument = str(theirs.fileno()) if self._inherits else SHARED
        self.options: dict[str, Any] = {"pass_fds": [theirs.fileno()]} if self._inherits else {}

    def finish(self, child: subprocess.Popen[bytes]) -> None:
        """Raises `OSError` where the child has ended already."""
        if not self._inherits:
            assert child.stdin is not None
            shared: bytes = self._socket.share(child.pid)  # type: ignore[attr-defined]
            child.stdin.write(shared.hex().encode() + b"\n")
            child.stdin.flush()


def received(argument: str) -> socket.socket:
    """In the child: the socket that was given to it."""
    if argument != SHARED:
        return socket.socket(fileno=int(argument))
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            raise EOFError("the parent has ended")
        line += byte
    return socket.fromshare(bytes.fromhex(line.decode()))  # type: ignore[attr-defined]
