"""Commands that the server runs for a page and that end with it: preflights and exports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import paths
from api.door import KEY
from errors import printable
from system.pipes import Pipe
from system.processes import apart, end_group

LINE = 600  # characters of one line that are shown
POLL = 0.2  # seconds
PATIENCE = 5.0  # seconds between asking a child to end and ending it
# Run in front of the command: the kernel ends the process when the thread that waits for it ends,
# so that a server which is killed leaves none behind.
BIND = (
    "import ctypes, os, signal, sys;"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM);"
    "os.getppid() == int(sys.argv[1]) or sys.exit(1);"
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


class TookTooLong(Exception):
    """A child was ended because its time was over."""


def lines_of(
    arguments: Sequence[str], ended: Callable[[], bool], seconds: float
) -> Iterator[str | int]:
    """Run `python ARGUMENTS` with this project's modules, and give each line that it prints, then
    its exit code. To be read to the end, or closed, in one thread: the child ends with that.

    Ends without a code when `ended` says so. Raises `TookTooLong`.
    """
    places = filter(None, (str(paths.PROJECT), os.environ.get("PYTHONPATH", "")))
    environment = {name: value for name, value in os.environ.items() if name != KEY}
    settings = {"PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1"}
    bound = ["-c", BIND, str(os.getpid())] if sys.platform == "linux" else []
    process = subprocess.Popen(
        [sys.executable, *bound, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment | settings,
        **apart(),  # so that its own children end with it
    )
    yield from _read(process, ended, time.monotonic() + seconds)


def _read(
    process: subprocess.Popen, ended: Callable[[], bool], deadline: float
) -> Iterator[str | int]:
    output, unread = Pipe(process.stdout), b""  # type: ignore[arg-type]  # it is a pipe
    try:
        while not ended():
            if time.monotonic() > deadline:
                raise TookTooLong
            output.wait(POLL)
            part = output.read()
            if part is None:
                continue
            *lines, unread = (unread + part).split(b"\n")
            lines += [unread] if unread and not part else []
            yield from (shown(line) for line in lines)
            if part == b"":
                yield process.wait(PATIENCE)
                return
            unread = unread[-LINE * 4 :]
    finally:
        end_group(process, PATIENCE)
        output.close()


def shown(line: bytes) -> str:
    """A line as text, safe to be shown; spaces stay, in which tables are."""
    text = line.decode("utf-8", errors="replace").rstrip()
    return "".join(c if c.isprintable() else printable(c) for c in text[:LINE])
