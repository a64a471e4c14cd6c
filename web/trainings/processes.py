"""Who trains a run on this machine, so that the page may stop it.

The signature in a lock may be one that a dead process left. Linux tells in /proc who has the file
open; elsewhere the page knows the trainings that were started from it, and no others.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from files import open_regular
from reports.watching import LOCK, owner_in
from system import locks
from system.processes import PROC, born
from web.errors import RequestError

HAS_PROC = (PROC / "self" / "fd").is_dir()
"""whether it can be told here who has a file open"""


def holder(run: Path) -> tuple[int, str] | None:
    """The process on this machine that trains a run, and when it was born; None for nobody.

    Raises `RequestError` where somebody holds the run who is not to be told from here: on another
    machine, or one whose signature cannot be believed.
    """
    path = run / LOCK
    try:
        with open_regular(path, follow_links=False) as file:
            try:
                locks.take(file, shared=True)
                return None
            except BlockingIOError:
                owner = owner_in(file)
            if owner is None or owner[1] != socket.gethostname():
                raise RequestError("training_elsewhere", machine=owner[1][:100] if owner else "?")
            birth = born(owner[0])
            if not birth or not has_open(owner[0], os.fstat(file.fileno())):
                raise RequestError("training_elsewhere", machine=owner[1][:100])
            return owner[0], birth
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise RequestError("training_elsewhere", machine=socket.gethostname()) from None


def has_open(process: int, wanted: os.stat_result) -> bool:
    """Whether a process has a file open: a signature alone may be one that a dead process left."""
    try:
        for descriptor in (PROC / str(process) / "fd").iterdir():
            try:
                found = descriptor.stat()
            except OSError:  # closed at this moment, or what cannot be looked at
                continue
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    except OSError:  # another user's, or ended
        return False
    return False
