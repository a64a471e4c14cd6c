"""Many pictures, over a few connections: what is there and whole is left, and what comes gets its
name once it is a whole picture."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from urllib.parse import quote

from tqdm import tqdm

from data.fetch.client import Client, NotFetched
from data.fetch.parts import Part
from data.images import MAX_BYTES, size_if_whole
from data.reading import check_image_file
from errors import PhiSightError, printable
from files import read_regular, write_whole
from workers.pool import never

STATE, SUMS, NOT_FETCHED = ".fetch", "SHA256SUMS", "not-fetched.jsonl"
OUR_NAMES = {name.casefold() for name in (STATE, SUMS, NOT_FETCHED)}
FAILURES_IN_A_ROW = 50  # after which the server, or its address, is taken for wrong
SUMS_BYTES = 2**30  # a million pictures make 90 MB
_SUM = re.compile(r"(\\?)([0-9a-f]{64}) [ *]([^\n]+)")
# Errors of the disk that are about one name; all others would meet the next picture too.
_OF_ONE_NAME = (errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.ENAMETOOLONG)


# -- what is there --------------------------------------------------------------------------------


def problem_of(path: Path, cancelled: Event | None = None) -> str:
    """Why a file is not a whole picture, or ""; judged as preflight does it."""
    if size_if_whole(path):
        return ""
    try:
        check_image_file(path, cancelled.is_set if cancelled else never)
    except PhiSightError as error:
        return str(error).removeprefix(f"{path}: ").partition(";")[0]
    return ""


def not_there(folder: Path, names: Sequence[str]) -> list[str]:
    """Which of these pictures are not there, or not whole."""
    with tqdm(names, "looking at pictures", unit="", disable=None) as bar:
        return [n for n in bar if not os.path.lexists(folder / n) or problem_of(folder / n)]


def is_ours(name: str) -> bool:
    """Whether a picture of this name would lie in the place of a file of ours."""
    return name.split("/")[0].casefold() in OUR_NAMES


class Sums:
    """The sha256 of every picture that is there, as `sha256sum --check` reads them.

    Lines are added as pictures come, and the file is written anew, sorted, at the end.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / SUMS
        self._of: dict[str, str] = {}
        if self._path.exists():
            text = read_regular(self._path, SUMS_BYTES).decode("utf-8", "replace")
            for line in text.split("\n")[:-1]:  # a last line without its end was cut by a kill
                if not (match := _SUM.fullmatch(line)):
                    raise PhiSightError(
                        f"{printable(self._path)}: is not a list of sha256 sums; move it away"
                    )
                name = match[3].replace("\\\\", "\\") if match[1] else match[3]
                self._of[name] = match[2]

    def complete(self, folder: Path, there: Iterable[str], absent: Iterable[str]) -> None:
        """Sums for the pictures that are there, and none for those that are not."""
        for name in absent:
            self._of.pop(name, None)
        unknown = [name for name in there if name not in self._of]
        with tqdm(unknown, "reading pictures", unit="", disable=None) as bar:
            for name in bar:
                self._of[name] = sha256_of(folder / name)
        self.write()

    def write(self) -> None:
        """Write the file whole."""
        lines = [_sum_line(name, self._of[name]) for name in sorted(self._of)]
        write_whole(self._path, "".join(lines).encode())

    def add(self, name: str, sha256: str) -> None:
        """Add a picture that has come."""
        self._of[name] = sha256
        with self._path.open("ab") as file:
            file.write(_sum_line(name, sha256).encode())


def _sum_line(name: str, sha256: str) -> str:
    if "\\" in name:  # as sha256sum writes it
        escaped = name.replace("\\", "\\\\")
        return f"\\{sha256}  {escaped}\n"
    return f"{sha256}  {name}\n"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_not_fetched(folder: Path, base: str, reasons: Mapping[str, str]) -> None:
    """List what could not be had, one JSON object a line; no list where there is nothing."""
    path = folder / NOT_FETCHED
    if not reasons:
        path.unlink(missing_ok=True)
        return
    rows = [
        {"name": name, "url": url_of(base, name), "reason": reasons[name]}
        for name in sorted(reasons)
    ]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def url_of(base: str, name: str) -> str:
    """Where a picture lies: `base` ends with a slash, and a name can hold any character."""
    return base + quote(name)


# -- what comes -----------------------------------------------------------------------------------


@dataclass
class Fetching:
    """Pictures that are being fetched into `folder` from below the address `base`."""

    client: Client
    folder: Path
    base: str
    sums: Sums
    reasons: dict[str, str] = field(default_factory=dict)
    """name -> why it could not be had"""
    fetched: int = 0
    bytes: int = 0
    _in_a_row: int = 0
    """pictures that could not be had since the last one that could"""
    _ended: Event = field(default_factory=Event)

    async def all(self, names: Sequence[str], connections: int) -> None:
        """Fetch these, so many at a time.

        Raises:
            OSError: of the disk.
            PhiSightError: if a server asks to be left alone for long.
        """
        waiting = iter(names)
        with tqdm(total=len(names), desc="fetching pictures", unit="", disable=None) as bar:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(connections, len(names))):
                        group.create_task(self._some(waiting, bar))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            finally:  # a decoder that is at work on a picture of a run that ends
                self._ended.set()

    async def _some(self, waiting: Iterable[str], bar: tqdm) -> None:
        """One connection's share of the names that wait."""
        for name in waiting:
            if self._in_a_row >= FAILURES_IN_A_ROW:
                self.reasons[name] = f"not asked for: {FAILURES_IN_A_ROW} in a row had failed"
                continue
            try:
                await self._one(name)
                self._in_a_row = 0
            except NotFetched as error:
                self.reasons[name] = str(error)
                self._in_a_row += 1
            bar.update()

    async def _one(self, name: str) -> None:
        url = url_of(self.base, name)
        part = Part(self.folder / STATE, url)
        await self.client.fetch(url, part, MAX_BYTES, lambda path: problem_of(path, self._ended))
        try:
            sha256 = await asyncio.to_thread(_put, part, self.folder / name)
        except OSError as error:
            if error.errno in _OF_ONE_NAME:
                part.clear()
                raise NotFetched(f"cannot be kept under its name ({error.strerror})") from None
            raise
        self.sums.add(name, sha256)
        self.fetched += 1
        self.bytes += part.length


def _put(part: Part, final: Path) -> str:
    """Give a whole picture its name. Returns its sha256."""
    sha256 = sha256_of(part.path)
    final.parent.mkdir(parents=True, exist_ok=True)
    part.put(final)
    return sha256
