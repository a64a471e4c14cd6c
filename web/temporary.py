"""The files that a server makes for a while: uploads, spoken answers, tables.

They lie in one folder of the process, which only its owner may enter, and which is locked as long
as the process lives. It is removed when the process ends; where a process was killed, the next
server finds its folder unlocked, and removes it. Files are swept while the server runs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO

from api.logs import once
from errors import PhiSightError
from system import disk, locks

PREFIX = "phisight-server-"
FORMER = ("phisight-uploads-", "phisight-examples-")  # of former versions, which had no lock
LOCK = ".lock"
YOUNG_SECONDS = 60.0  # a folder that has no lock yet may be about to get one
FORMER_SECONDS = 2 * 24 * 3600.0  # nobody has touched them for so long: their server has ended
KEPT_SECONDS = 24 * 3600.0  # a file that nobody touched for so long is removed
SWEPT_EVERY = 600.0  # seconds
SWEPT_AGAIN = 10.0  # seconds at the earliest, where little room is left
CUT_OFF_SECONDS = 3600.0  # an upload under way has no part that is older
IN_USE_SECONDS = 3600.0  # and one that was touched more recently is not, even if there are many
MUCH = 0.75  # of what may be held
MAX_UPLOAD = 20 * 2**20  # bytes of one file
MOST_BYTES = 2 * 2**30  # of all uploads
SPARE_BYTES = 512 * 2**20  # of the disk, which are left to others
UPLOADS, MADE = "uploads", "made"
PART = re.compile(r"[0-9a-f]{32}(\.[0-9a-f]{8})?\.part\Z")  # a file of which more is to come

_own: list[Path] = []
_locks: list[IO[bytes]] = []  # open as long as the process lives
_making = threading.Lock()


def own_folder() -> Path:
    """This process's folder, made when it is first asked for; what killed processes left is removed
    at that moment. It lies where GRADIO_TEMP_DIR says at that time, if it is set."""
    with _making:
        if not _own:
            root = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            sweep_dead(root)
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
            lock = (folder / LOCK).open("xb")
            locks.take(lock)
            for name in (UPLOADS, MADE):
                (folder / name).mkdir(mode=0o700)
            _locks.append(lock)
            _own.append(folder)
            atexit.register(_remove_own, folder)
        return _own[0]


def _remove_own(folder: Path) -> None:
    if not disk.REMOVED_WHILE_OPEN:
        for lock in _locks:
            lock.close()
    shutil.rmtree(folder, ignore_errors=True)


def sweep_dead(root: Path) -> None:
    """Remove the folders below `root` whose servers have ended. A folder of another user's, a link,
    one whose server lives, and what bears another name are left."""
    for folder in (path for prefix in (PREFIX, *FORMER) for path in root.glob(f"{prefix}*")):
        try:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or not disk.is_own(status):
                continue
            try:
                lock = os.open(folder / LOCK, os.O_RDWR | disk.NO_FOLLOW)
            except FileNotFoundError:
                age = YOUNG_SECONDS if folder.name.startswith(PREFIX) else FORMER_SECONDS
                if time.time() - newest(folder) > age:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            try:
                locks.take(lock)
                if disk.REMOVED_WHILE_OPEN:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)  # where a file that is open stays
        except OSError:  # locked by a living process, or removed by another server just now
            continue


def newest(folder: Path) -> float:
    """When something in a folder was last changed, since 1970."""
    return max([folder.lstat().st_mtime, *(status.st_mtime for _, status in files_in(folder))])


def files_in(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file below a folder, with its status; links are not followed."""
    for parent, _, names in os.walk(folder):  # passes over a folder that is removed at this moment
        for name in names:
            path = Path(parent, name)
            try:
                status = path.lstat()
            except OSError:  # removed at this moment
                continue
            if stat.S_ISREG(status.st_mode):
                yield path, status


def remove_empty(folder: Path, age: float) -> None:
    """Remove the folders below a folder that have been empty for so many seconds."""
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # not empty, or removed at this moment
            if parent != str(folder) and time.time() - os.stat(parent).st_mtime > age:
                os.rmdir(parent)


def made_file(suffix: str) -> Path:
    """A new, empty file of this process; whoever asked for it removes it."""
    descriptor, name = tempfile.mkstemp(suffix=suffix, prefix="answer-", dir=own_folder() / MADE)
    os.close(descriptor)
    return Path(name)


def check_disk(folder: Path, needed: int = 0) -> None:
    """Raises PhiSightError where the disk of a folder would be left with too little room."""
    if shutil.disk_usage(folder).free < SPARE_BYTES + needed:
        raise PhiSightError("the server's disk is nearly full; try again when there is room on it")


class Uploads:
    """The folder of uploads, and how much may lie in it."""

    def __init__(
        self,
        folder: Path,
        most: int = MOST_BYTES,
        keep: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """`keep`: gives the paths of files that stay as long as the server runs."""
        self.folder, self.most, self.keep = folder, most, keep
        self.arriving = 0
        """uploads under way"""
        self.held = 0
        """bytes, as far as it is known: measured by `sweep`, and counted while uploads arrive"""
        self._swept = -SWEPT_AGAIN
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def take(self, count: int) -> None:
        """Count bytes that arrive. Raises PhiSightError where they are too many."""
        with self._lock:
            if self.held + count > self.most:
                raise PhiSightError(
                    f"uploads take {self.held >> 20} of {self.most >> 20} MB; send smaller files,"
                    " or try again later"
                )
            self.held += count

    def give_back(self, count: int) -> None:
        """Bytes that were counted are not there: cut off, refused, or removed."""
        with self._lock:
            self.held = max(0, self.held - count)

    def sweep(self) -> None:
        """Remove what is old, and the parts of uploads that were cut off; where much is left, also
        what has not been touched for an hour, the oldest first. Measures what is left."""
        self._swept = time.monotonic()
        now, kept = time.time(), set(self.keep())
        left: list[tuple[float, int, Path]] = []
        for path, status in files_in(self.folder):
            age = now - max(status.st_mtime, status.st_ctime)
            cut_off = path.parent.parent == self.folder and PART.match(path.name) is not None
            if cut_off and (not self.arriving or age > CUT_OFF_SECONDS):
                path.unlink(missing_ok=True)
            elif age > KEPT_SECONDS and str(path) not in kept:
                path.unlink(missing_ok=True)
            else:
                left.append((age, status.st_size, path))
        held = sum(size for _, size, _ in left)
        for age, size, path in sorted(left, reverse=True):
            if held <= self.most * MUCH or age < IN_USE_SECONDS:
                break
            if str(path) not in kept:
                path.unlink(missing_ok=True)
                held -= size
        self.held = held
        remove_empty(self.folder, IN_USE_SECONDS)

    def begin(self) -> None:
        """An upload begins. Raises PhiSightError where there is no room for any."""
        crowded = self.held > self.most * MUCH
        if crowded and time.monotonic() - self._swept >= SWEPT_AGAIN:
            self.sweep()
        with self._lock:
            check_disk(self.folder, MAX_UPLOAD * (self.arriving + 1))
            self.arriving += 1

    def end(self) -> None:
        """An upload has ended, whole or cut off."""
        with self._lock:
            self.arriving -= 1

    def keep_sweeping(self) -> None:
        """Sweep once in a while, in a thread of its own, until `close`."""

        def sweep() -> None:
            while not self._ended.wait(SWEPT_EVERY):
                try:
                    self.sweep()
                except OSError as error:
                    once("sweeping", f"{self.folder}: {error.strerror}; uploads are not swept")

        threading.Thread(target=sweep, name="sweeper", daemon=True).start()

    def close(self) -> None:
        self._ended.set()
