"""Files as the operating system has them: synced, put in place, read at an offset, our own."""

from __future__ import annotations

import io
import os
import threading
import time
from pathlib import Path

NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
"""a flag of `os.open`: a link is not followed. Windows has none: there, look before opening"""
NO_WAIT: int = getattr(os, "O_NONBLOCK", 0)
"""a flag of `os.open`: a pipe without a writer is not waited for; Windows has no such pipes"""
REMOVED_WHILE_OPEN = os.name != "nt"
"""whether a file can be removed that somebody has open"""
REPLACE_SECONDS, PAUSE = 3.0, 0.02  # how long a place that somebody has open is asked for again

_seeking = threading.Lock()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk. Windows flushes what was opened for
    writing alone, and opens no folder: the entries of one are its own affair."""
    if os.name == "nt":
        if path.is_dir():
            return
        flags = os.O_RDWR
    else:
        flags = os.O_RDONLY
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """`os.replace`, which Windows refuses while anybody has either open, be it a program that looks
    for viruses: there it is tried again for a while. Raises `OSError`."""
    end = time.monotonic() + REPLACE_SECONDS
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if REMOVED_WHILE_OPEN or time.monotonic() > end:
                raise
        time.sleep(PAUSE)


def read_at(descriptor: int, memory: memoryview, offset: int) -> int:
    """Read into memory from an offset on, for many threads: how many bytes came, 0 at the end. May
    be fewer than there is room for."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [memory], offset)
    with _seeking:  # the descriptor stands at one place for all threads
        os.lseek(descriptor, offset, os.SEEK_SET)
        with io.FileIO(descriptor, "rb", closefd=False) as file:
            return file.readinto(memory) or 0


def bytes_at(descriptor: int, count: int, offset: int) -> bytes:
    """At most so many bytes from an offset on; fewer at the end."""
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count and (got := read_at(descriptor, view[done:], offset + done)):
        done += got
    return bytes(view[:done])


def is_own(status: os.stat_result) -> bool:
    """Whether a file belongs to this user; on Windows, which says nothing of it here, always."""
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def user() -> str:
    """What tells users of this machine apart, for a name; empty where each has folders of his own
    for what is temporary."""
    return str(os.getuid()) if hasattr(os, "getuid") else ""


def make_private(descriptor: int) -> None:
    """Let only this user read and write an open file; on Windows its folder's rights hold."""
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, 0o600)
