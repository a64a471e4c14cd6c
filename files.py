"""What a model's files are: their sha256, computed once and remembered while they stay as they are.

A base has several gigabytes, which take seconds to hash. With a folder to remember in, the result
is kept under the names, sizes, times and inodes of the files, and believed as long as all of these
are the same. What that costs: a file whose bytes were changed and whose times were set back by
changing the machine's clock, or beneath the file system, would pass for the old one. Changing a
file in place, replacing it, or setting its modification time back alone is noticed, since the time
of the inode's last change cannot be set. Without a folder every byte is read every time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from errors import PhiSightError

BAR_BYTES = 500 * 10**6  # below that the work is done before a bar could be read
CHUNK = 4 * 2**20
MEMORY = "fingerprints"  # the folder of what is remembered
YOUNG_SECONDS = 2.0  # files touched so recently may change again within one tick of their clock


def byte_bar(total: int, what: str) -> tqdm:
    """A progress bar over `total` bytes on standard error: for much work, and on a terminal."""
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=None if total >= BAR_BYTES else True,
    )


def hash_files(paths: Sequence[Path], memory: str | Path | None = None) -> str:
    """sha256 over the sha256 of each file, in the given order: no byte can change its file.

    `memory`: a folder to remember it in, see above. Raises `PhiSightError` if a file is unreadable.
    """
    try:
        before = _stamps(paths)
        place = None
        if memory:
            name = hashlib.sha256(json.dumps(before).encode()).hexdigest()
            place = Path(memory) / MEMORY / f"{name}.json"
            if known := _recall(place, before):
                return known
        found = _read(paths)
        if place and _stamps(paths) == before and not any(is_young(stamp[1:]) for stamp in before):
            _remember(place, before, found)
        return found
    except OSError as error:
        raise PhiSightError(f"{error.filename}: {error.strerror}; check the file") from error


def stamp_of(status: os.stat_result) -> list[int]:
    """What tells one state of a file from another without reading it: size, times, inode."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def is_young(stamp: list[int]) -> bool:
    """Whether the file may change again without its stamp changing."""
    return max(stamp[1:3]) > time.time_ns() - YOUNG_SECONDS * 1e9


def _stamps(paths: Sequence[Path]) -> list[list]:
    return [[str(path.resolve()), *stamp_of(path.stat())] for path in paths]


def _read(paths: Sequence[Path]) -> str:
    total = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with byte_bar(sum(path.stat().st_size for path in paths), "reading the weights") as bar:
        for path in paths:
            own = hashlib.sha256()
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    own.update(buffer[:count])
                    bar.update(count)
            total.update(own.digest())
    return total.hexdigest()


def _recall(place: Path, stamps: list[list]) -> str | None:
    """The sha256 that was remembered, or None for nothing, or for what is not of ours."""
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("files") != stamps:
        return None
    found = content.get("sha256")
    whole = isinstance(found, str) and len(found) == 64 and content.get("seal") == _seal(found)
    return found if whole else None


def _seal(found: str) -> str:
    return hashlib.sha256(found.encode()).hexdigest()


def _remember(place: Path, stamps: list[list], found: str) -> None:
    """Write it whole, or leave it: next time the files are only read once more."""
    _write(place, {"files": stamps, "sha256": found, "seal": _seal(found)})


def _write(place: Path, content: dict) -> None:
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        os.replace(temporary, place)
    except OSError:
        temporary.unlink(missing_ok=True)


class RememberedHashes:
    """sha256 of many files of a folder, such as pictures, each read once while it stays as it is.

    They are remembered in one file, which `save` writes. The cost is the one that is told above.
    """

    def __init__(self, place: Path) -> None:
        self.place, self._changed = place, False
        self._known: dict[str, list] = {}  # name -> [sha256, *stamp]
        try:
            content = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        known = content.get("files") if isinstance(content, dict) else None
        if isinstance(known, dict) and content.get("seal") == _seal(json.dumps(known)):
            self._known = known

    def of(self, name: str, path: Path, read: Callable[[Path], str]) -> str:
        """The sha256 of the file at `path`, known here as `name`; `read(path)` computes it."""
        stamp = stamp_of(path.stat())
        known = self._known.get(name)
        if known and known[1:] == stamp:
            return known[0]
        found = read(path)
        if stamp == stamp_of(path.stat()) and not is_young(stamp):
            self._known[name] = [found, *stamp]
            self._changed = True
        return found

    def save(self) -> None:
        """Write what is new; where that cannot be done, files are read again next time."""
        if self._changed:
            _write(self.place, {"files": self._known, "seal": _seal(json.dumps(self._known))})
            self._changed = False
