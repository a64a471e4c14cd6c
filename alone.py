"""A file that one process at a time writes to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from errors import PhiSightError
from system import locks


def opened_alone(path: Path, flag: str = "--out", is_read: bool = False) -> BinaryIO:
    """A file, made where it is not there, open for reading and writing by this process alone until
    it is closed; or a pipe or device to write to, unless what it holds `is_read`.

    Raises `PhiSightError`, whose remedy names `flag`, where another process has it open so or it
    cannot be opened.
    """
    try:
        if path.exists() and not path.is_file():
            if is_read and not path.is_dir():  # nor opened: a pipe waits for its reader
                raise PhiSightError(f"{path}: is not a regular file; give another {flag}")
            return open(os.open(path, os.O_WRONLY), "wb")
        out = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        locks.take(out)
    except BlockingIOError:
        raise PhiSightError(f"{path}: another process writes it; wait, or give another") from None
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; give another {flag}") from None
    return out
