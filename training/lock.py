"""One run, one writer: a run's folder is held by the process that trains it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from errors import PhiSightError
from files import make_folder, open_regular, remove_empty
from reports.watching import LOCK, signature_in
from system import disk, locks

PATIENCE, PAUSE = 5, 0.02  # times that a lock is asked for, and seconds between


class RunLock:
    """Holds a run folder, or that of a sweep, for this process, from `with` to the end of it.

    The system gives the lock back when its holder ends, however it ends: one that a dead process
    left is taken over without asking, and none is ever taken from a living one.

    Raises:
        PhiSightError: another process holds it (its number and machine are named), or the folder
            cannot be written to.
    """

    def __init__(self, run: str | Path, flag: str = "--run") -> None:
        self.run, self.flag = Path(run), flag
        self.path = self.run / LOCK

    def __enter__(self) -> RunLock:
        tries = PATIENCE
        while True:
            try:
                self._made = make_folder(self.run)
                self._file = self._opened()
                locks.take(self._file)
                if os.fstat(self._file.fileno()).st_ino == self.path.stat().st_ino:
                    break
                self._file.close()  # its former holder was just removing it: this one is nobody's
            except BlockingIOError:
                holder = signature_in(self._file)
                self._file.close()
                if tries := tries - 1:  # `holder_of` may have been looking
                    time.sleep(PAUSE)
                    continue
                raise PhiSightError(
                    f"{self.run}: {holder} is training there; wait for it, stop it,"
                    f" or choose another {self.flag}"
                ) from None
            except FileNotFoundError:
                continue  # removed between two of the calls above
            except OSError as error:
                if self.path.is_symlink() or self.path.exists() and not self.path.is_file():
                    raise PhiSightError(
                        f"{self.path}: {error.strerror}; remove it, training makes it anew"
                    ) from error
                raise PhiSightError(
                    f"{self.run}: {error.strerror}; make the folder writable, or"
                    f" choose another {self.flag}"
                ) from error
        self._file.truncate(0)
        self._file.write(json.dumps({"process": os.getpid(), "machine": socket.gethostname()}))
        self._file.flush()
        return self

    def _opened(self) -> TextIO:
        """The file of the lock, made if it is not there. Raises `OSError` for anything else of its
        name: what a link points to would be written over, a device might do anything."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | disk.NO_WAIT | disk.NO_FOLLOW
        with contextlib.suppress(FileNotFoundError):
            open_regular(self.path, follow_links=False).close()
        return open(os.open(self.path, flags, 0o666), "a+", encoding="utf-8", newline="\n")

    def __exit__(self, *_: object) -> None:
        try:  # a run that could not even start leaves nothing behind
            if [path.name for path in self.run.iterdir()] == [LOCK]:
                if not disk.REMOVED_WHILE_OPEN:
                    self._file.close()  # and where another one has opened it since, it stays
                self.path.unlink()
                self.run.rmdir()
                remove_empty(self._made)
        except OSError:
            return  # the folder was removed, or something has just been put into it: it stays
        finally:
            self._file.close()  # and with it goes the lock
