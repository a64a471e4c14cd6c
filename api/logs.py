"""Lines of the log that clients can cause: each kind is told once in a while, with how many more
there were, so that nobody can fill a disk with them."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from pathlib import Path

EVERY_SECONDS = 60.0  # the same kind is told again at the earliest after it
MOST_KINDS = 256  # remembered; beyond, all others count as one kind
LONGEST = 150  # characters of what an error says
PLACES = 3  # in the code that are named

log = logging.getLogger("phisight.serving")
_lock = threading.Lock()
_told: dict[str, tuple[float, int]] = {}


def once(kind: str, line: str) -> bool:
    """Log a line, unless one of its kind was logged a short time ago. Whether it was logged.

    May be called in any thread. What a client sent may stand in the line: it is cut and put into
    one line."""
    now = time.monotonic()
    with _lock:
        if kind not in _told and len(_told) >= MOST_KINDS:
            kind = "others"
        last, unsaid = _told.get(kind, (-EVERY_SECONDS, 0))
        if now - last < EVERY_SECONDS:
            _told[kind] = last, unsaid + 1
            return False
        _told[kind] = now, 0
    line = "".join(c if c.isprintable() else " " for c in " ".join(line.split())[: 2 * LONGEST])
    log.warning("%s%s", line, f" ({unsaid} more of the kind)" if unsaid else "")
    return True


def line_of(error: BaseException) -> str:
    """What failed and where, the innermost place first, in one line."""
    frames = traceback.extract_tb(error.__traceback__)[-PLACES:]
    where = ", ".join(f"{Path(at.filename).name}:{at.lineno}" for at in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:LONGEST]} ({where})"


def failed(what: str, error: BaseException) -> None:
    """Tell that something failed that should not have, once in a while by its kind and place."""
    line = line_of(error)
    once(f"{type(error).__name__} {line.rpartition('(')[2]}", f"{what} failed: {line}")


def only_once(record: logging.LogRecord) -> bool:
    """A filter for the logs of libraries: what clients can make them say is told by `once`, and a
    traceback as one line."""
    error = record.exc_info[1] if record.exc_info else None
    said = record.getMessage()
    if error is None:
        once(said, said)
    else:
        failed(said.strip(), error)
    return False


def of_others_once(record: logging.LogRecord) -> bool:
    """A filter for what no library's logger has a handler for: our own lines pass."""
    return record.name.startswith("phisight.") or only_once(record)


def bound_libraries() -> None:
    """From now on nothing that a library logs can be repeated by clients without end: Python prints
    every warning that nobody handles."""
    logging.getLogger("uvicorn.error").addFilter(only_once)  # which has a handler of its own
    if logging.lastResort is not None:
        logging.lastResort.addFilter(of_others_once)  # one function is added once


def forget() -> None:
    """Tell every kind again, as at the start."""
    with _lock:
        _told.clear()
