"""Untrusted bytes are read in child processes, which can be limited and ended at any moment.

A decoder that runs in a thread cannot be stopped, its memory stays with the process, and what its C
library prints goes to our standard error. So a function that reads a stranger's bytes is called in
a child: `Workers(...).call(function, data, name=..., remedy=...)`.

- Processor time, wall time and memory are limited; a child that goes beyond them, or dies, costs
  its caller one `PhiSightError` and nobody else anything. Where the system has no limits of the
  first or the last (`system.limits`), the log says so, and wall time is what ends a child.
- `cancelled` is asked twenty times a second; when it says yes, the child is ended at once.
- What the child writes to standard error is bounded, and told as one line of our log.
- A child that has grown is replaced, and one without work ends: their memory goes back to the
  system. When this process ends, even by `kill -9`, its children do.

Children run workers/child.py. Requests and replies are a JSON header and raw bytes over a socket;
nothing that a child sends is executed or unpickled.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import PhiSightError
from system import limits as system_limits
from system.pipes import Handing, Pipe
from workers.child import LENGTHS, Result

log = logging.getLogger("phisight.workers")

ROOT = Path(__file__).resolve().parent.parent
MOST_HEADER = 1 << 20  # bytes
PIECE = 1 << 18  # bytes sent or received at once
LOOK_SECONDS = 0.05  # how often a waiting caller asks whether it is cancelled
IDLE_SECONDS = 60.0  # children without work end after this
GROWN = 150 << 20  # resident bytes from which on a child is replaced, unless its limits say other
NOTE_CHARACTERS = 300  # of a child's standard error that are told
NOTE_SECONDS = 10.0  # at most one such line in this time
# What was allocated in large pieces goes back when it is freed, and threads get no heaps of their
# own, which would count as memory; numerical libraries in a child start no threads.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Limits:
    """What one call may take."""

    cpu_seconds: int = 10
    wall_seconds: float = 60.0
    """once a child works on it, including what it is sent and sends; more than the processor time,
    as the machine may be busy"""
    memory: int = 1 << 30
    """bytes that a call may allocate"""
    result: int = 256 << 20
    """bytes that it may return"""
    grown: int = GROWN
    """resident bytes from which on the child is replaced behind it"""


class Cancelled(Exception):
    """A call was ended because its `cancelled` said so."""


class _Died(Exception):
    """A child had to be ended, or ended by itself; its text says why."""


def never() -> bool:
    """The `cancelled` of a call that is wanted to its end."""
    return False


class Workers:
    """At most `children` child processes, started when they are needed; for many threads."""

    def __init__(self, children: int = 2, limits: Limits = Limits()) -> None:
        self.children, self.limits = children, limits
        self._changed = threading.Condition()  # of the next four
        self._idle: list[_Child] = []
        self._running: set[_Child] = set()
        self._closed = False
        self._trimmer: threading.Timer | None = None
        self._notes = _Notes()

    def call(
        self,
        function: Callable[..., Result],
        data: bytes = b"",
        arguments: Mapping[str, Any] | None = None,
        *,
        name: str,
        remedy: str,
        cancelled: Callable[[], bool] = never,
        limits: Limits | None = None,
    ) -> tuple[Any, bytearray]:
        """`function(data, **arguments)` in a child: its value and its raw bytes.

        Args:
            function: of the top level of a module; the child imports that module, which should
                import little, and never torch.
            data: arrives as a `bytearray`.
            arguments: what JSON can hold.
            name, remedy: of what is read, for errors: "NAME: took over 10 seconds ...; REMEDY".
            cancelled: whether the result is not wanted any more; asked in the caller's thread.

        Raises:
            Cancelled: `cancelled` said so, while it waited for a child or while one worked.
            PhiSightError: `function` raised it in the child; or it raised something else, went
                beyond a limit, or died.
        """
        limits = limits or self.limits
        request = {
            "function": f"{function.__module__}:{function.__qualname__}",
            "arguments": dict(arguments or {}),
            "cpu_seconds": limits.cpu_seconds,
            "memory": limits.memory,
        }
        child = self._take(cancelled)
        keep = False
        try:
            reply, result = child.ask(request, data, limits, cancelled)
            keep = "died" not in reply and reply["resident"] < limits.grown
        except _Died as error:
            reply, result = {"died": str(error)}, bytearray()
        finally:
            note = child.note()
            self._give_back(child, keep)
            self._notes.tell(name, *note)
        if "refused" in reply:
            raise PhiSightError(reply["refused"])
        if "died" in reply:
            raise PhiSightError(f"{name}: {reply['died']}; {remedy}")
        return reply["value"], result

    def close(self) -> None:
        """End every child. Calls that run fail."""
        with self._changed:
            self._closed = True
            if self._trimmer is not None:
                self._trimmer.cancel()
            ending, self._idle = self._idle, []
            for child in self._running:
                child.kill()  # the thread that waits for it does the rest
            self._changed.notify_all()
        for child in ending:
            child.end()
        atexit.unregister(self.close)

    # -- which child -------------------------------------------------------------------------------

    def _take(self, cancelled: Callable[[], bool]) -> _Child:
        """A child that has nothing to do, or a new one; waits while all are at work."""
        while True:
            if cancelled():
                raise Cancelled
            with self._changed:
                if self._closed:
                    raise PhiSightError("workers: are closed; start the program again")
                if self._idle or len(self._running) < self.children:
                    child = self._idle.pop() if self._idle else _Child()
                    self._running.add(child)
                    break
                self._changed.wait(LOOK_SECONDS)
        try:
            if not child.running:  # never started, or ended while it had nothing to do
                child.start()
                atexit.unregister(self.close)
                atexit.register(self.close)
        except BaseException:
            self._give_back(child, keep=False)
            raise
        return child

    def _give_back(self, child: _Child, keep: bool) -> None:
        if not keep:
            child.end()
        with self._changed:
            self._running.discard(child)
            if keep and not self._closed:
                child.idle_since = time.monotonic()
                self._idle.append(child)
                self._trim_later()
                keep = False
            self._changed.notify()
        if keep:  # closed meanwhile
            child.end()

    def _trim_later(self) -> None:
        if self._trimmer is None:
            self._trimmer = threading.Timer(IDLE_SECONDS, self._trim)
            self._trimmer.daemon = True
            self._trimmer.start()

    def _trim(self) -> None:
        """End the children that have had nothing to do for a while."""
        with self._changed:
            self._trimmer = None
            before = time.monotonic() - IDLE_SECONDS
            ending = [child for child in self._idle if child.idle_since <= before]
            self._idle = [child for child in self._idle if child.idle_since > before]
            if self._idle:
                self._trim_later()
        for child in ending:
            child.end()


class _Notes:
    """What children wrote to standard error -> lines of the log, not more than are of use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0
        self._untold = 0

    def tell(self, name: str, excerpt: str, count: int) -> None:
        """`excerpt` is how the `count` bytes begin that were written while `name` was read."""
        if not count:
            return
        with self._lock:
            if time.monotonic() < self._next:
                self._untold += 1
                return
            untold, self._untold = self._untold, 0
            self._next = time.monotonic() + NOTE_SECONDS
        more = f" (and {untold} more that wrote something)" if untold else ""
        log.warning("%s: its decoder wrote %d bytes of notes: %s%s", name, count, excerpt, more)


@functools.cache
def _tell_of_missing_limits() -> None:
    if missing := system_limits.missing():
        log.warning(
            "this system cannot limit what a child process takes: %s; one that takes too long is"
            " ended all the same",
            missing,
        )


class _Child:
    """One child process, as its parent sees it."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        self.end()
        _tell_of_missing_limits()
        ours, theirs = socket.socketpair()
        with theirs:
            handing = Handing(theirs)
            given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
            paths = [str(ROOT), *map(os.path.abspath, given)]
            self._process = subprocess.Popen(
                # Pillow warns of much that it then reads: what fails is an error all the same.
                [sys.executable, "-P", "-W", "ignore", "-m", "workers.child", handing.argument],
                stdin=subprocess.PIPE,  # its end tells that we are gone
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
                cwd=ROOT,  # ours may be removed while we run, and nothing is imported from there
                **handing.options,
            )
            self._socket = ours
            assert self._process.stderr is not None
            self._errors = Pipe(self._process.stderr)
            handing.finish(self._process)
        ours.setblocking(False)
        self._written, self._count = b"", 0

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def end(self) -> None:
        """Kill it and take its exit status; of no effect on one that has ended."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._socket.close()
        self._errors.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None

    def note(self) -> tuple[str, int]:
        """How its standard error since the last time begins, on one line, and its bytes."""
        if self._process is not None:
            self._read_errors()
        text = " ".join(self._written.decode("utf-8", "replace").split())
        text = "".join(character if character.isprintable() else "?" for character in text)
        count, self._written, self._count = self._count, b"", 0
        return text[:NOTE_CHARACTERS], count

    def ask(
        self,
        request: Mapping[str, Any],
        data: bytes,
        limits: Limits,
        cancelled: Callable[[], bool],
    ) -> tuple[dict[str, Any], bytearray]:
        """Send a request and wait for the reply. Raises `Cancelled` and `_Died`."""
        header = json.dumps(request).encode()
        outgoing = [memoryview(LENGTHS.pack(len(header), len(data)) + header), memoryview(data)]
        incoming = bytearray()
        deadline = time.monotonic() + limits.wall_seconds
        with selectors.DefaultSelector() as selector:
            both = selectors.EVENT_READ | selectors.EVENT_WRITE
            selector.register(self._socket, both)
            if self._errors.descriptor is not None:
                selector.register(self._errors.descriptor, selectors.EVENT_READ)
            while True:
                if cancelled():
                    raise Cancelled
                if time.monotonic() > deadline:
                    raise _Died(f"took over {limits.wall_seconds:g} seconds to read")
                if self._errors.descriptor is None:
                    self._read_errors()
                for key, events in selector.select(LOOK_SECONDS):
                    if key.fileobj is not self._socket:
                        if not self._read_errors():
                            selector.unregister(key.fileobj)
                        continue
                    if events & selectors.EVENT_READ:
                        self._receive(incoming, limits)
                        if (reply := _complete(incoming, limits)) is not None:
                            return reply, incoming
                    if events & selectors.EVENT_WRITE and not self._send(outgoing):
                        selector.modify(self._socket, selectors.EVENT_READ)

    def _send(self, outgoing: list[memoryview]) -> bool:
        """Send a piece; whether there is more to send."""
        while outgoing and not outgoing[0]:
            outgoing.pop(0)
        if not outgoing:
            return False
        try:
            sent = self._socket.send(outgoing[0][:PIECE])
        except BlockingIOError:
            return True
        except OSError:  # it has died: what it leaves to be read says so
            return False
        outgoing[0] = outgoing[0][sent:]
        return True

    def _receive(self, incoming: bytearray, limits: Limits) -> None:
        try:
            piece = self._socket.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            assert self._process is not None
            try:
                code = self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:  # it closed the connection and lives on
                raise _Died("broke off without a result") from None
            raise _Died(_death(code, limits))
        incoming += piece

    def _read_errors(self) -> bool:
        """Take what its standard error holds now; whether more may come."""
        for _ in range(100):  # at most as much as fits between two looks at the time
            piece = self._errors.read()
            if piece is None:
                return True
            if not piece:
                return False
            self._count += len(piece)
            self._written = (self._written + piece[: 4 * NOTE_CHARACTERS])[: 4 * NOTE_CHARACTERS]
        return True


def _complete(incoming: bytearray, limits: Limits) -> dict[str, Any] | None:
    """The header of a reply that has arrived whole, of which `incoming` keeps the raw bytes.

    A child whose decoder was taken over by a file might send anything: all of it is checked.
    """
    if len(incoming) < LENGTHS.size:
        return None
    head, raw = LENGTHS.unpack_from(incoming)
    if head > MOST_HEADER or raw > limits.result:
        raise _Died(f"would give a result of {head + raw:,} bytes, over {limits.result:,}")
    if len(incoming) < LENGTHS.size + head + raw:
        return None
    try:
        reply = json.loads(incoming[LENGTHS.size : LENGTHS.size + head])
    except (ValueError, RecursionError):
        raise _Died("gave a reply that cannot be read") from None
    if not isinstance(reply, dict) or type(reply.get("resident")) is not int:
        raise _Died("gave a reply that cannot be read")
    if not any(isinstance(reply.get(word), str) for word in ("refused", "died")):
        if "value" not in reply:
            raise _Died("gave a reply that cannot be read")
    del incoming[: LENGTHS.size + head]
    return reply


def _death(code: int, limits: Limits) -> str:
    """How a child ended, by its exit status."""
    if hasattr(signal, "SIGXCPU") and code == -signal.SIGXCPU:
        return f"took over {limits.cpu_seconds} seconds of processor time to read"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"ended the process that read it ({name})"
    return f"ended the process that read it (exit status {code})"
