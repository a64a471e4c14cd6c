"""Locks on open files. The system gives one back when its holder ends, however it ends.

POSIX has `flock`. Windows locks a range of bytes, which nobody else can read then: here a byte far
behind the end of the file, so that what its holder has written into it can be read. Of Windows,
Python has no lock that several hold: whoever only looks is in the others' way for that moment, so
that looking is tried more than once.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import ModuleType
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BYTE = 2**30  # that stands for the file; msvcrt reckons positions in 31 bits
LOOKS, PAUSE = 5, 0.02  # times that a look is tried, and seconds between two tries


def take(file: IO | int, shared: bool = False, wait: bool = False) -> None:
    """Hold an open file, or its descriptor, until it is closed or given back.

    Args:
        shared: together with others that hold it so, to see whether anybody holds it alone.
        wait: until nobody else holds it.

    Raises:
        BlockingIOError: another process holds it, or this one through another opening.
    """
    if fcntl is not None:
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(file, how if wait else how | fcntl.LOCK_NB)
        return
    tries = LOOKS if shared else 1
    while True:
        try:
            return _lock_byte(file, "LK_NBLCK")
        except BlockingIOError:
            tries -= 1
            if tries <= 0 and not wait:
                raise
        time.sleep(PAUSE)


def give_back(file: IO | int) -> None:
    """Hold a file no longer that is held, before it is closed."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_UN)
    else:
        _lock_byte(file, "LK_UNLCK")


def _lock_byte(file: IO | int, how: str) -> None:
    """As `msvcrt.locking` does it, which locks from the place on where the descriptor stands."""
    descriptor = file if isinstance(file, int) else file.fileno()
    msvcrt = _msvcrt()
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        os.lseek(descriptor, BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, getattr(msvcrt, how), 1)
    except PermissionError as error:  # which it raises for what is locked
        raise BlockingIOError(error.errno, error.strerror) from None
    finally:
        with contextlib.suppress(OSError):
            os.lseek(descriptor, place, os.SEEK_SET)


def _msvcrt() -> ModuleType:
    import msvcrt

    return msvcrt
