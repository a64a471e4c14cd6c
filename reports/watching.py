"""Who trains a run, and where it stands, for whoever looks on: files are read, none is written."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from documents import COUNT, TEXT, parse_json, require
from errors import PhiSightError, printable
from files import open_regular, stamp_of
from reports.log import METRICS
from reports.status import Status, status_of

LOCK = ".lock"
"""in a run's folder: held by the process that trains it, see `training.lock`"""


def holder_of(run: str | Path) -> str:
    """Who trains a run, in words; empty for nobody. A lock that nobody holds is held for the moment
    of looking, and nothing is written. Raises PhiSightError for what is no lock."""
    path = Path(run) / LOCK
    try:
        with open_regular(path, follow_links=False) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return signature_in(file)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise PhiSightError(
            f"{path}: {error.strerror}; remove it, training makes it anew"
        ) from error
    return ""


def signature_in(file: IO) -> str:
    """The holder of a lock, by what it has written into the file."""
    try:
        owner = parse_json(os.pread(file.fileno(), 1000, 0))
        require(owner, {"process": COUNT, "machine": TEXT})
    except PhiSightError:  # it has taken the lock and not yet signed, or is no process of ours
        return "another process"
    return f"process {owner['process']} on {printable(owner['machine'], 100)}"


def run_status(run: str | Path) -> Status:
    """Where a run stands. Raises PhiSightError."""
    return status_of(Path(run), holder_of(run))


class StatusReader:
    """The status of one run, read again only when its log, its checkpoints or its trainer have
    changed: whoever asks every few seconds reads a long log once for each record."""

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self._known: tuple[object, Status] | None = None

    def read(self) -> Status:
        """Raises PhiSightError."""
        holder = holder_of(self.run)
        try:
            found = [self.run / METRICS, *self.run.glob("checkpoint-*")]
            stamps = [(p.name, *stamp_of(p.stat())) for p in sorted(found) if p.exists()]
        except OSError as error:
            raise PhiSightError(f"{self.run}: {error.strerror}; look there") from error
        now = holder, stamps
        if self._known is None or self._known[0] != now:
            self._known = now, status_of(self.run, holder)
        return self._known[1]
