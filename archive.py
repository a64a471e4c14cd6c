"""A tar that can be unpacked without trusting it: every byte of it follows from its first member.

The first member is a manifest of all others: name, size and sha256 of each. Their headers are the
ones that this file makes of name and size, in the order of the names, with no times, no owners and
no kinds but regular files. So the same files give the same archive, and unpacking interprets
nothing: it makes each header again and compares it. A link, a device, a sparse file, a header that
changes the next one, a second archive behind the first, or a compressed one are all simply other
bytes. Names and sizes are checked, and the disk is asked for the room, before anything is written.
Other programs read it as a usual tar.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from documents import BYTE_LIMIT, COUNT, TEXT, Kind, parse_json, require
from errors import PhiSightError, printable
from files import CHUNK, byte_bar, make_folder, open_regular, remove_empty, whole_file
from manifest import manifest_bytes
from paths import LONGEST, LONGEST_NAME

CONTENTS = "PACK.json"
FORMAT = 1
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
PAGE = 4096  # bytes that the smallest file or folder takes on a disk
DEEPEST = 32  # parts of a name: each of them may be a folder to make, which no size tells of
_CONTENTS = {
    "format": Kind(f"{FORMAT}", lambda value: type(value) is int and value == FORMAT),
    "files": [{"name": TEXT, "size": COUNT, "sha256": TEXT}],
    "sha256": TEXT,
}
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f]")
CHANGED = "was changed while it was packed; wait until nothing writes there, and pack again"
OTHER = "it is no archive of checkpoints.py pack, or was changed; ask for it again"


@dataclass(frozen=True)
class Member:
    """A file to be packed: what stands at `source`, or is it."""

    name: str
    source: Path | bytes
    size: int | None = None
    """bytes from the start of the file that are packed; None for all"""


@dataclass(frozen=True)
class Row:
    """What the manifest says of a file."""

    name: str
    size: int
    sha256: str


# -- writing --------------------------------------------------------------------------------------


def write_archive(out: Path, members: Sequence[Member]) -> int:
    """Write an archive, whole or not at all; the number of its bytes. Files are read twice, in
    pieces: once for their hashes.

    Raises:
        PhiSightError: `out` is there already or cannot be written, a file cannot be read, has a
            name that no archive holds, or changes meanwhile.
    """
    if out.exists() or out.is_symlink():
        raise PhiSightError(f"{out}: is there already; remove it or give another name")
    members = sorted(members, key=lambda member: member.name)
    check_names([member.name for member in members], lambda name: "")
    made: list[Path] = []
    try:
        rows = [_row_of(member) for member in members]
        contents = manifest_bytes({"format": FORMAT, "files": [vars(row) for row in rows]})
        if len(contents) > BYTE_LIMIT:
            raise PhiSightError(f"{out}: {len(rows):,} files are more than one archive lists")
        total = size_of(contents, rows)
        made = make_folder(out.absolute().parent)
        need_room(out.absolute().parent, total, str(out))
        with whole_file(out) as temporary, temporary.open("wb") as file:
            _write(file, contents, members, rows, total)
        made = []
    except OSError as error:
        raise PhiSightError(
            f"{out}: not written ({error.filename or out}: {error.strerror or error}); make room,"
            " or give another place"
        ) from error
    finally:
        remove_empty(made)
    return total


def _write(
    file: IO[bytes], contents: bytes, members: Sequence[Member], rows: Sequence[Row], total: int
) -> None:
    with byte_bar(total, "packing") as bar:
        file.write(header(CONTENTS, len(contents)) + contents + padding(len(contents)))
        for member, row in zip(members, rows, strict=True):
            file.write(header(row.name, row.size))
            own = hashlib.sha256()
            written = 0
            for piece in _pieces(member):
                own.update(piece)
                file.write(piece)
                written += len(piece)
                bar.update(len(piece))
            if (written, own.hexdigest()) != (row.size, row.sha256):
                what = member.source if isinstance(member.source, Path) else row.name
                raise PhiSightError(f"{what}: {CHANGED}")
            file.write(padding(row.size))
        file.write(END)


def _row_of(member: Member) -> Row:
    own, size = hashlib.sha256(), 0
    for piece in _pieces(member):
        own.update(piece)
        size += len(piece)
    return Row(member.name, size, own.hexdigest())


def _pieces(member: Member) -> Iterator[bytes]:
    if isinstance(member.source, bytes):
        yield member.source
        return
    left = member.size
    try:
        with open_regular(member.source) as file:
            while piece := file.read(CHUNK if left is None else min(CHUNK, left)):
                left = None if left is None else left - len(piece)
                yield piece
    except FileNotFoundError as error:
        raise PhiSightError(f"{member.source}: {CHANGED}") from error
    except OSError as error:
        raise PhiSightError(
            f"{member.source}: {error.strerror or error}; mend it, or leave it out"
        ) from error


# -- what every archive is made of ----------------------------------------------------------------


def header(name: str, size: int) -> bytes:
    """What stands before a file: one block, or more for a long name."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> bytes:
    """What stands behind so many bytes, up to the next block."""
    return bytes(-size % BLOCK)


def size_of(contents: bytes, rows: Sequence[Row]) -> int:
    """Bytes of the archive."""
    sizes = ((CONTENTS, len(contents)), *((row.name, row.size) for row in rows))
    return len(END) + sum(
        len(header(name, size)) + size + len(padding(size)) for name, size in sizes
    )


def room_of(rows: Sequence[Row]) -> int:
    """Bytes on a usual disk of files in the order of their names, and of the folders that they lie
    in, which a manifest of a few bytes may name a great many of."""
    places, before = 0, [""]
    for row in rows:
        parts = row.name.split("/")
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, parts))
        places += len(parts) - len([*shared])
        before = parts
    return sum(-(-row.size // PAGE) * PAGE for row in rows) + places * PAGE


def need_room(folder: Path, size: int, what: str) -> None:
    """Raise `PhiSightError` if the disk has not so much room."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise PhiSightError(
            f"{what} takes {size:,} bytes, and the disk has {free:,}; make room, or give a place"
            " on another one"
        )


def check_names(names: Sequence[str], problem_of: Callable[[str], str]) -> None:
    """Raise `PhiSightError` unless each of the names stands in a folder and none twice.

    `problem_of`: what else is wrong with one, or "".
    """
    known = set(names)
    if len(known) < len(names):
        raise PhiSightError("two files have one name")
    for name in names:
        parts = name.split("/")
        reason = problem_of(name)
        if any(part in ("", ".", "..") for part in parts):
            reason = "leaves the folder, or names nothing in it"
        elif _UNSEEN.search(name):
            reason = "has a control character in it"
        elif name == CONTENTS:
            reason = "is taken"
        elif len(parts) > DEEPEST:
            reason = f"lies more than {DEEPEST - 1} folders deep"
        elif any("/".join(parts[:end]) in known for end in range(1, len(parts))):
            reason = "lies in what is a file"
        else:
            encoded = [len(part.encode("utf-8", "surrogateescape")) for part in parts]
            if max(encoded) > LONGEST_NAME or sum(encoded) + len(parts) > LONGEST:
                reason = "is longer than a file's name can be"
        if reason:
            raise PhiSightError(f"the name {printable(repr(name), 100)} {reason}")


# -- reading --------------------------------------------------------------------------------------


def extract(archive: Path, folder: Path, problem_of: Callable[[str], str]) -> None:
    """Unpack into a folder that is empty; on an error what is in it is not to be used.

    Args:
        problem_of: what is wrong with a name, beside what leaves a folder; "" for nothing.

    Raises:
        PhiSightError: it is another archive, was cut short or changed, or does not fit on the disk.
            `OSError`: of the disk.
    """
    with open_regular(archive) as file:
        with _named(archive):
            contents = _read_contents(file)
            rows = [Row(**row) for row in parse_contents(contents)["files"]]
            names = [row.name for row in rows]
            if names != sorted(names):
                raise PhiSightError("its files are not in order")
            check_names(names, problem_of)
            there, should = archive.stat().st_size, size_of(contents, rows)
            if there != should:
                raise PhiSightError(f"it has {there:,} bytes, and should have {should:,}")
        need_room(folder, room_of(rows), f"{archive}, unpacked,")
        with _named(archive), byte_bar(there, "unpacking") as bar:
            for row in rows:
                _extract_one(file, row, folder)
                bar.update(row.size)
            if file.read(len(END) + 1) != END:
                raise PhiSightError("it does not end as it should")


@contextlib.contextmanager
def _named(archive: Path) -> Iterator[None]:
    """What is wrong with the archive, with its name and what to do."""
    try:
        yield
    except PhiSightError as error:
        raise PhiSightError(f"{archive}: {error}; {OTHER}") from error


def _read_contents(file: IO[bytes]) -> bytes:
    """The bytes of the manifest. Raises `PhiSightError` where the file begins with another."""
    block = file.read(BLOCK)
    try:
        size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        raise PhiSightError("it does not begin as a tar does") from None
    if not 0 < size <= BYTE_LIMIT or block != header(CONTENTS, size):
        raise PhiSightError(f"it does not begin with {CONTENTS}")
    data = file.read(size)
    if len(data) < size or file.read(len(padding(size))) != padding(size):
        raise PhiSightError("it is cut short")
    return data


def parse_contents(data: bytes) -> Mapping[str, Any]:
    """The manifest of an archive. Raises `PhiSightError` for another content."""
    contents = parse_json(data)
    try:
        require(contents, _CONTENTS)
    except PhiSightError as error:
        raise PhiSightError(f"{CONTENTS}: {error}") from None
    if manifest_bytes(contents) != data or any(len(row) != 3 for row in contents["files"]):
        raise PhiSightError(f"{CONTENTS}: edited or damaged (its own sha256 does not match)")
    return contents


def _extract_one(file: IO[bytes], row: Row, folder: Path) -> None:
    expected = header(row.name, row.size)
    if file.read(len(expected)) != expected:
        raise PhiSightError(f"before {printable(repr(row.name), 100)} stands another header")
    path = folder / row.name
    path.parent.mkdir(parents=True, exist_ok=True)
    own, left = hashlib.sha256(), row.size
    with path.open("xb") as copy:
        while left and (piece := file.read(min(CHUNK, left))):
            own.update(piece)
            copy.write(piece)
            left -= len(piece)
    if left or own.hexdigest() != row.sha256:
        raise PhiSightError(f"{printable(repr(row.name), 100)} has another sha256")
    if file.read(len(padding(row.size))) != padding(row.size):
        raise PhiSightError(f"behind {printable(repr(row.name), 100)} stands something else")
