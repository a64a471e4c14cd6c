"""Parquet and Arrow files, which hold tables: one row a record.

A row becomes what JSON would hold: a field that is null is one that the record has not, a map is an
object, dates and decimals are texts, and a picture (a struct of `bytes` and `path`, as the hub's
data sets have them, or a binary column `image` or `images`) is a name. Columns of floating-point
numbers, such as embeddings, and of other bytes are not read; a mark stands in their place, so that
they count as keys that nobody reads.

The package pyarrow decodes them. As its C++ can be made to crash, or to allocate what a file of a
few bytes declares, it runs in a child process with limits of time and memory (`arrow_child`), which
gives some rows at a call and stays where it is in the file. What is held is a stretch of one row
group, whatever the size of the file.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.containers import arrow_child
from data.containers.heads import head_of
from data.pictures import Pictures
from data.record_keys import BadRecord
from data.stream import NotRead
from errors import PhiSightError
from files import stamp_of
from workers.pool import Limits, Workers

PYARROW = "pyarrow==26.0.1"
# The memory is that of pyarrow itself, of a row group's pages, and of a batch of an Arrow file.
LIMITS = Limits(cpu_seconds=120, wall_seconds=900, memory=2 << 30, result=1 << 30, grown=2 << 30)
POOL = Workers(1, LIMITS)  # which holds all files that are being read
MAGIC = {  # how such files begin -> what they are
    b"PAR1": "parquet",
    b"ARROW1": "file",
    b"\xff\xff\xff\xff": "stream",  # as `datasets` writes them
}
ENCRYPTED = b"PARE"


def is_one(path: Path) -> bool:
    """Whether a file is Parquet or Arrow, by how it begins."""
    return head_of(path).startswith((*MAGIC, ENCRYPTED))


def is_installed() -> bool:
    """Whether the package is there that reads them."""
    return importlib.util.find_spec("pyarrow") is not None


def read(path: Path, pictures: Pictures) -> Iterator[tuple[str, object]]:
    """Every row of a file as a record, with its place; see `data.containers`.

    Raises PhiSightError for a file that is damaged, encrypted, has nothing that a record could be
    made of, or changes while it is read, and where pyarrow is not installed.
    """
    head = head_of(path)
    if head.startswith(ENCRYPTED):
        raise PhiSightError(f"{path}: is encrypted Parquet; decrypt it first")
    kind = next(kind for magic, kind in MAGIC.items() if head.startswith(magic))
    if not is_installed():
        raise PhiSightError(
            f"{path}: needs the package pyarrow to be read; pip install {PYARROW}, or save the"
            " records as JSON"
        )
    arguments: dict[str, Any] = {
        "path": str(path.absolute()),
        "name": str(path),
        "kind": kind,
        "first": 0,
    }
    while True:
        try:
            stamp = stamp_of(path.stat())
        except OSError as error:
            raise PhiSightError(f"{path}: {error.strerror}; check it") from error
        given, content = POOL.call(
            arrow_child.rows,
            b"",
            arguments | {"stamp": stamp},
            name=str(path),
            remedy="fetch or export it again, in smaller row groups if it is a large one",
        )
        blobs = memoryview(content)[: given["pictures"]]
        number = arguments["first"]
        for line in bytes(memoryview(content)[given["pictures"] :]).splitlines():
            number += 1
            row = json.loads(line)
            count = sum(size for _, size in row["pictures"])
            record = _record(row, blobs[:count], pictures)
            blobs = blobs[count:]
            yield f"{path.name} row {number}", record
        if given["end"]:
            return
        arguments |= {"first": number, "seen": stamp}


def _record(row: dict[str, Any], blobs: memoryview, pictures: Pictures) -> object:
    """A row as the child gives it, with the names of its pictures in their places."""
    if row["fault"]:
        return NotRead(row["fault"])
    try:
        for place, size in row["pictures"]:
            holder = row["record"]
            for step in place[:-1]:
                holder = holder[step]
            holder[place[-1]] = pictures.keep(bytes(blobs[:size]))
            blobs = blobs[size:]
    except BadRecord as error:
        return NotRead(str(error))
    return row["record"]
