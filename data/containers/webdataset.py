"""WebDataset shards: a tar whose neighbours of one name make a record.

`000001.jpg` and `000001.json` are a record and its picture, `000001.jpg` and `000001.txt` a picture
and its caption; `000001.0.jpg`, `000001.1.jpg` are two pictures. What stands before the first dot
of a member's name, with its folder, is the record's.

A tar is read from front to end, and nothing of it is unpacked by its name. Only the headers that
are needed are understood, each of bounded size: regular files, long names, and the records of POSIX
that tell a name or a size. A link, a device or a sparse file, and a name that leads out of a folder
set their record aside.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data.containers.captions import OF_OTHER_FORMS
from data.containers.heads import head_of
from data.pictures import PICTURE_BYTES, Pictures
from data.record_keys import BadRecord
from data.stream import RECORD_LIMIT, UNREADABLE, NotRead, decode, unreadable, unzipped
from errors import PhiSightError, printable

BLOCK = tarfile.BLOCKSIZE
HEADER_BYTES = 1 << 20  # of a header that changes the next one
MEMBERS = 1000  # of one record
RECORD_BYTES = 256 << 20  # of the members of one record
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
PICTURES = re.compile(r"(?:.*\.)?(?:jpe?g|png|webp|gif|bmp|tiff?|avif|heic|heif)", re.I)
CAPTIONS = ("txt", "caption", "text")
NAMES = ("image", "images", "image_url", "path", "url")  # keys whose text may be a member's name
PIECE = 1 << 20
_POSIX = re.compile(rb"(\d{1,8}) ([^=\n]{1,200})=")  # LENGTH KEY=VALUE
OTHER = "fetch it again, or make it anew"


def is_one(path: Path) -> bool:
    """Whether a file is a tar, compressed by gzip or not, by its first header."""
    head = head_of(path)
    with contextlib.suppress(tarfile.HeaderError):
        return bool(tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape").name)
    return False


@dataclass
class _Sample:
    """The members of one record, in their order: what stands behind the name -> content."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    fault: str = ""
    size: int = 0

    def add(self, ending: str, name: str, content: bytes) -> None:
        if ending in self.members:
            self.fault = f"it has the member {printable(name, 100)} twice"
        self.members[ending], self.names[ending] = content, name


def read(path: Path, pictures: Pictures) -> Iterator[tuple[str, object]]:
    """Every record of a shard, with its place; see `data.containers`.

    Raises PhiSightError for a tar that is damaged or cut short.
    """
    for sample in _samples(path):
        where = f"{path.name} sample {printable(sample.key, 100)}"
        try:
            yield where, _record(sample, pictures)
        except BadRecord as error:
            yield where, NotRead(str(error))
        except RecursionError:
            yield where, NotRead("its .json is nested too deeply")


# -- a record of its members ----------------------------------------------------------------------


def _record(sample: _Sample, pictures: Pictures) -> object:
    """Raises BadRecord where the members make none."""
    if sample.fault:
        raise BadRecord(sample.fault)
    by_kind: dict[str, list[str]] = {"picture": [], "caption": [], "other": []}
    for ending in sample.members:
        kind = "caption" if ending in CAPTIONS else "other"
        by_kind["picture" if PICTURES.fullmatch(ending) else kind].append(ending)
    record: Any = {}
    if "json" in sample.members:
        record = decode(_text(sample, "json"))
        if not isinstance(record, dict):
            return record if isinstance(record, NotRead) else NotRead("its .json is not an object")
    kept = {ending: pictures.keep(sample.members[ending]) for ending in by_kind["picture"]}
    if by_kind["caption"] and not record.keys() & {*OF_OTHER_FORMS, "caption", "text"}:
        record["caption"] = _text(sample, by_kind["caption"][0])
    if not record:
        raise BadRecord("a picture without a caption or a record beside it")
    known = {sample.names[ending]: name for ending, name in kept.items()}
    known |= {name.rpartition("/")[2]: given for name, given in known.items()}
    used: set[str] = set()
    _put_names(record, known, used)
    if kept and not used:
        _put_beside(record, list(kept.values()))
        used = set(kept.values())
    unused = [ending for ending, name in kept.items() if name not in used]
    for ending in (*by_kind["caption"][1:], *by_kind["other"], *unused):
        if ending != "json":  # nothing reads it, and it is counted
            record.setdefault(ending, sample.names[ending])
    return record


def _text(sample: _Sample, ending: str) -> str:
    try:
        text = sample.members[ending].decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRecord(f"its .{ending} is not UTF-8 text") from None
    if len(text) > RECORD_LIMIT:
        raise BadRecord(f"its .{ending} has more than {RECORD_LIMIT:,} characters")
    return text


def _put_names(value: Any, known: dict[str, str], used: set[str]) -> None:
    """Wherever a member's name stands for a picture, put the picture's, and add that to `used`."""
    for place, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if isinstance(item, list) and place in NAMES:
            item = value[place] = [known.get(i, i) if isinstance(i, str) else i for i in item]
            used |= {i for i in item if isinstance(i, str)} & set(known.values())
        if isinstance(item, (dict, list)):
            _put_names(item, known, used)
        elif place in NAMES and isinstance(item, str) and item in known:
            value[place] = known[item]
            used.add(known[item])


def _put_beside(record: dict[str, Any], names: list[str]) -> None:
    """The pictures of a record that names none of the members: as many as it names, or all."""
    key = next((key for key in ("image", "images") if record.get(key)), "")
    given = record.get(key)
    count = len(given) if isinstance(given, list) else 1
    if key and count != len(names):
        raise BadRecord(f"it names {count} picture(s), and {len(names)} lie beside it")
    if isinstance(given, list) or not key and len(names) > 1:
        record[key or "images"] = names
    else:
        record[key or "image"] = names[0]


# -- the tar --------------------------------------------------------------------------------------


def _samples(path: Path) -> Iterator[_Sample]:
    """The members of a tar that stand side by side and are of one record."""
    sample = _Sample("")
    for name, fault, content in _members(path):
        key, ending = _split(name)
        if not ending:  # such as .DS_Store, or README
            continue
        if key != sample.key:
            if sample.key:
                yield sample
            sample = _Sample(key)
        sample.fault = sample.fault or fault
        sample.size += len(content)
        if len(sample.members) >= MEMBERS or sample.size > RECORD_BYTES:
            sample.fault = f"it has more than {MEMBERS:,} members, or {RECORD_BYTES:,} bytes"
            sample.members.clear()
        else:
            sample.add(ending, name, content)
    if sample.key:
        yield sample


def _split(name: str) -> tuple[str, str]:
    """`a/0001.left.JPG` -> ("a/0001", "left.jpg")."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    first, _, ending = last.partition(".")
    return (f"{folder}{slash}{first}", ending.lower()) if first else ("", "")


def _members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(name, why it cannot be used or "", content) of every file of a tar, and of what is none."""
    try:
        with open(path, "rb") as file, unzipped(file) as content:
            yield from _of_stream(content, path)
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def _of_stream(file: IO[bytes], path: Path) -> Iterator[tuple[str, str, bytes]]:
    told: dict[str, str] = {}  # name and size, as a header said them of the next member
    while True:
        block = file.read(BLOCK)
        if block and not block.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise _damaged(path, f"is cut short or damaged ({error})") from None
        if member.size < 0:
            raise _damaged(path, "has a member of a negative size")
        if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            told |= _told(_exactly(file, member.size, path, HEADER_BYTES), member.type, path)
            continue
        size = int(told.get("size", member.size))
        name = told.get("path", member.name)
        fault = _problem_of(name, member, told)
        told = {}
        if member.type not in REGULAR:
            _pass_over(file, size, path)
            if member.type not in (tarfile.DIRTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                yield name, fault, b""
        elif fault or size > PICTURE_BYTES:
            _pass_over(file, size, path)
            yield name, fault or f"a member has more than {PICTURE_BYTES:,} bytes", b""
        else:
            yield name, "", _exactly(file, size, path, PICTURE_BYTES)


def _problem_of(name: str, member: tarfile.TarInfo, told: dict[str, str]) -> str:
    shown = printable(name, 100)
    if member.type not in REGULAR:
        return f"the member {shown} is a link, a device or the like, not a file"
    if any(key.startswith("GNU.sparse") for key in told):
        return f"the member {shown} is a sparse file, which is not read"
    if name.startswith("/") or ".." in name.split("/"):
        return f"the name of the member {shown} leads out of the shard"
    return ""


def _told(data: bytes, kind: bytes, path: Path) -> dict[str, str]:
    """What a header says of the next member: `path` and `size`, and the names of other keys."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    data, start = data.rstrip(b"\0"), 0
    while start < len(data):
        match = _POSIX.match(data, start)
        end = start + int(match[1]) if match else 0
        if not match or end <= match.end() or data[end - 1 : end] != b"\n":
            raise _damaged(path, "has a POSIX header that is damaged")
        key = match[2].decode("utf-8", "replace")
        value = data[match.end() : end - 1].decode("utf-8", "surrogateescape")
        start = end
        if key == "size" and not re.fullmatch(r"\d{1,18}", value, re.ASCII):
            raise _damaged(path, "has a member without a size")
        if key in ("path", "size") or key.startswith("GNU.sparse"):
            found[key] = value
    return found


def _exactly(file: IO[bytes], size: int, path: Path, limit: int) -> bytes:
    """The content of a member, and past the padding behind it."""
    if size > limit:
        raise _damaged(path, f"has a header of more than {limit:,} bytes")
    content = file.read(size)
    if len(content) < size:
        raise _damaged(path, "is cut short")
    file.read(-size % BLOCK)
    return content


def _pass_over(file: IO[bytes], size: int, path: Path) -> None:
    left = size + -size % BLOCK
    while left:
        piece = file.read(min(left, PIECE))
        if not piece:
            raise _damaged(path, "is cut short")
        left -= len(piece)


def _damaged(path: Path, reason: str) -> PhiSightError:
    return PhiSightError(f"{path}: {reason}; {OTHER}")
