"""A file as far as it has come, which a later process can go on with.

What is on the disk counts only as far as it was synced and noted beside it, with the server's name
for that version of the file. So a kill or a lost power supply costs at most the bytes since the
last note, and parts of two versions never get into one file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

from documents import COUNT, TEXT, read_json, require
from errors import PhiSightError
from files import put_in_place, sync, write_whole

NOTE_EVERY = 4 * 2**20  # bytes; most pictures have less and are asked for again after a kill
NOTE_BYTES = 4096  # of a note; ours have 200
NOTE = {"length": COUNT, "size": COUNT, "validator": TEXT}


def sweep(folder: Path, noted: bool = False) -> None:
    """Remove the parts in a folder that no process can go on with; with `noted`, all of them."""
    for path in folder.glob("*.part"):
        note = path.with_suffix(".json")
        if noted or not note.exists():
            note.unlink(missing_ok=True)
            path.unlink()


class Part:
    """What has come of `url`, in a folder that one process at a time writes to.

    All methods raise the `OSError` of the disk.
    """

    def __init__(self, folder: Path, url: str) -> None:
        name = hashlib.sha256(url.encode()).hexdigest()[:32]
        self.path, self._note = folder / f"{name}.part", folder / f"{name}.json"
        self.length, self._noted = 0, 0
        """bytes that have come, and of these, bytes that a kill cannot take away"""
        self.size: int | None = None
        """bytes of the whole file; None where the server does not say"""
        self.validator = ""
        """the server's name for this version of the file; empty if it cannot be gone on with"""
        self._file: BinaryIO | None = None
        self._take_up()

    def _take_up(self) -> None:
        """Go on with what an earlier process noted; what is not as noted is not used."""
        try:
            noted = read_json(self._note, NOTE_BYTES)
            require(noted, NOTE)
            if self.path.is_symlink() or self.path.stat().st_size < noted["length"]:
                return
        except (OSError, PhiSightError):
            return
        self.length = self._noted = noted["length"]
        self.size, self.validator = noted["size"], noted["validator"]

    @property
    def can_go_on(self) -> bool:
        """Whether the server can be asked for the rest alone."""
        return bool(self.validator) and self.size is not None and 0 < self.length < self.size

    def begin(self, size: int | None, validator: str) -> None:
        """Let go of what there is: the file comes from its first byte on."""
        self.clear()
        self.size, self.validator = size, validator

    def append(self, piece: bytes) -> None:
        """Add what came next."""
        if self._file is None:
            # A link in the place of a part would lead out of the folder. Not all systems have both.
            flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
            self._file = open(os.open(self.path, flags | os.O_WRONLY | os.O_CREAT, 0o666), "wb")
            self._file.truncate(self.length)
            self._file.seek(self.length)
        self._file.write(piece)
        self.length += len(piece)
        if self.length - self._noted >= NOTE_EVERY:
            self._sync_and_note()

    def close(self) -> None:
        """All that has come is in the file, for others to read."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def keep(self) -> None:
        """Keep what has come for a later process, where it can go on with it."""
        # A full disk costs no more than that the file is asked for from its beginning.
        with contextlib.suppress(OSError):
            if self.can_go_on and self.length > self._noted:
                self._sync_and_note()
            self.close()

    def _sync_and_note(self) -> None:
        if not self.can_go_on:
            return
        self.close()
        sync(self.path)
        self._noted = self.length
        note = {"length": self.length, "size": self.size, "validator": self.validator}
        write_whole(self._note, json.dumps(note).encode())

    def clear(self) -> None:
        """Let go of all that has come."""
        self.close()
        self._note.unlink(missing_ok=True)  # first: it must never tell of bytes that are gone
        self.path.unlink(missing_ok=True)
        self.length = self._noted = 0
        self.size, self.validator = None, ""

    def put(self, final: Path) -> None:
        """Give the file, which is whole, its name for good."""
        self.close()
        sync(self.path)
        self._note.unlink(missing_ok=True)
        put_in_place(self.path, final)
