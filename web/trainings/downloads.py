"""A folder as one ZIP that is made while it is sent: nothing is written, little is held."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from web.replies import zip_time

PART = 1 << 20  # bytes that are read at a time


class _Sent:
    """What a ZIP is written to: kept until it is taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        return data


def zipped(folder: Path) -> Iterator[bytes]:
    """The regular files of a folder below its own name, stored as they are: weights do not become
    smaller. Links are left out, which could lead anywhere. Raises OSError."""
    sent = _Sent()
    with zipfile.ZipFile(sent, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            status = path.stat()
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            entry = zipfile.ZipInfo(name, zip_time(status.st_mtime))
            entry.external_attr = 0o100644 << 16
            with (
                path.open("rb") as source,
                archive.open(entry, "w", force_zip64=status.st_size > 2**31 - PART) as target,
            ):
                while data := source.read(PART):
                    target.write(data)
                    yield sent.take()
    yield sent.take()


def bytes_of(folder: Path) -> int:
    """How much the files of a folder take."""
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except OSError:  # being replaced at this moment
            continue
        total += status.st_size
    return total
