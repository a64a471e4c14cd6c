"""Who trains a run, and where it stands, for whoever looks on: files are read, none is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from documents import COUNT, TEXT, parse_json, require
from errors import PhiSightError, printable
from files import open_regular, stamp_of
from reports.log import METRICS, read_metrics
from reports.status import Status, status_of
from system import disk, locks

LOCK = ".lock"
"""in a run's folder: held by the process that trains it, see `training.lock`"""


def holder_of(run: str | Path) -> str:
    """Who trains a run, in words; empty for nobody. A lock that nobody holds is held for the moment
    of looking, and nothing is written. Raises PhiSightError for what is no lock."""
    path = Path(run) / LOCK
    try:
        with open_regular(path, follow_links=False) as file:
            try:
                locks.take(file, shared=True)
                locks.give_back(file)
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
    owner = owner_in(file)
    if owner is None:
        return "another process"
    return f"process {owner[0]} on {printable(owner[1], 100)}"


def owner_in(file: IO) -> tuple[int, str] | None:
    """The process and the machine that have signed a lock; None where the holder has taken it and
    not yet signed, or is no process of ours."""
    try:
        owner = parse_json(disk.bytes_at(file.fileno(), 1000, 0))
        require(owner, {"process": COUNT, "machine": TEXT})
    except PhiSightError:
        return None
    return owner["process"], owner["machine"]


def run_status(run: str | Path) -> Status:
    """Where a run stands. Raises PhiSightError."""
    return status_of(Path(run), holder_of(run))


class StatusReader:
    """The status of one run, read again only when its log, its checkpoints or its trainer have
    changed: whoever asks every few seconds reads a long log once for each record."""

    def __init__(
        self, run: str | Path, read: Callable[[Path], Sequence[dict[str, Any]]] = read_metrics
    ) -> None:
        """`read` gives the records of the log, for whoever keeps them."""
        self.run, self._read = Path(run), read
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
            self._known = now, status_of(self.run, holder, self._read)
        return self._known[1]
