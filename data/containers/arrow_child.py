"""What the child process of `data.containers.arrow` does: rows of a table, as JSON and bytes.

It keeps the file open at the row where it stands, so that the next call goes on from there; a child
that is new begins at the file's start and passes over the rows that were given.
"""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.stream import RECORD_LIMIT
from errors import PhiSightError

PIECE = 16 << 20  # bytes of rows that a call gives, and that a batch holds, about
FILES = 8  # that are held open at once
MOST_ROWS = 1024  # of a batch
ROW_BYTES = 256 << 20  # of the pictures of one row
FREE_ROWS = 100_000  # a file may say that it has so many, and beyond that eight a byte
SCHEMA_DEPTH = 64
NOT_READ = "(not read)"
PICTURE_KEYS = ("image", "images")
TURN_KEYS = ("conversations", "messages", "texts")
OTHER = "fetch or export it again"


@dataclass
class _Open:
    stamp: list[int]
    rows: Iterator[dict[str, Any] | str]


_open: dict[tuple[str, int], _Open] = {}  # (path, the next row to be given) -> a file


def rows(
    data: bytes,
    path: str,
    name: str,
    kind: str,
    first: int,
    stamp: list[int],
    seen: list[int] | None = None,
) -> tuple[dict[str, Any], bytes]:
    """Some rows from the row `first` on, as many as make `PIECE` bytes.

    Returns ({"pictures": bytes of all pictures, "end": whether those were the last rows}, the bytes
    of the pictures one after the other, and a line of JSON a row: `record`, `fault` (why it cannot
    be read; "") and `pictures`, which are places in the record and sizes).

    Raises PhiSightError for a file that is no such table, or was changed since it was `seen`.
    """
    if seen is not None and seen != stamp:
        raise PhiSightError(f"{name}: was changed while it was read; run again")
    at = _open.pop((path, first), None)
    if at is None or at.stamp != stamp:
        at = _Open(stamp, _rows(path, name, kind, first))
    lines, blobs, size = [], [], 0
    while size < PIECE:
        row = next(at.rows, None)
        if row is None:
            break
        line, pictures = _line(row)
        lines.append(line)
        blobs += pictures
        size += len(line) + sum(map(len, pictures))
    else:
        while len(_open) >= FILES:  # whoever still reads that one begins anew
            del _open[next(iter(_open))]
        _open[path, first + len(lines)] = at
    end = (path, first + len(lines)) not in _open
    value = {"pictures": sum(map(len, blobs)), "end": end}
    return value, b"".join(blobs) + "\n".join(lines).encode()


# -- rows as JSON ---------------------------------------------------------------------------------


def _line(row: dict[str, Any] | str) -> tuple[str, list[bytes]]:
    """A row as JSON, and its pictures."""
    if isinstance(row, str):
        return _fault(row)
    found: list[tuple[list[str | int], bytes]] = []
    try:
        record = _plain(row, [], found)
        for key in TURN_KEYS:
            if key in record:
                record[key] = _by_turn(record[key])
        line = json.dumps(
            {"record": record, "fault": "", "pictures": [(at, len(b)) for at, b in found]}
        )
    except RecursionError:
        return _fault("nested too deeply")
    except (TypeError, ValueError) as error:
        return _fault(str(error))
    if len(line) > RECORD_LIMIT:
        return _fault(f"it has more than {RECORD_LIMIT:,} characters")
    if sum(len(content) for _, content in found) > ROW_BYTES:
        return _fault(f"its pictures have more than {ROW_BYTES:,} bytes")
    return line, [content for _, content in found]


def _fault(reason: str) -> tuple[str, list[bytes]]:
    reason = " ".join(reason.split())[:300]
    return json.dumps({"record": None, "fault": reason, "pictures": []}), []


def _plain(value: Any, place: list[str | int], found: list) -> Any:
    """A value as JSON has it; the pictures in it are added to `found` with their places."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if value == value else None  # pandas writes what is missing as not a number
    if isinstance(value, bytes):
        found.append((place, value))
        return ""
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:  # what the hub's data sets call an Image
            held = value["bytes"]
            return _plain(value["path"] if held is None else held, place, found)
        items = ((k, _plain(v, [*place, k], found)) for k, v in value.items())
        return {key: item for key, item in items if item is not None}
    if isinstance(value, list):
        return [_plain(item, [*place, at], found) for at, item in enumerate(value)]
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta)):
        return str(value)
    if isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    raise TypeError(f"it holds a value of the type {type(value).__name__}, which is not read")


def _by_turn(value: Any) -> Any:
    """Turns whose parts lie in lists, as a `Sequence` of the hub's data sets holds them, one by
    one: {"from": [a, b], "value": [c, d]} -> [{"from": a, "value": c}, ...]."""
    if not isinstance(value, dict) or not all(isinstance(part, list) for part in value.values()):
        return value
    counts = {len(part) for part in value.values()}
    if len(counts) != 1:
        return value
    turns = (zip(value, parts) for parts in zip(*value.values()))
    return [{key: part for key, part in turn if part is not None} for turn in turns]


# -- tables ---------------------------------------------------------------------------------------


def _rows(path: str, name: str, kind: str, first: int) -> Iterator[dict[str, Any] | str]:
    """Every row from `first` on: its fields, or why it cannot be read."""
    import pyarrow

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # which gives back what it is given back
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    try:
        given = _parquet(path, name, first) if kind == "parquet" else _ipc(path, name, kind, first)
        for batch, unread in given:
            mark = {column: [NOT_READ] for column in unread}
            step = max(1, min(len(batch), PIECE * len(batch) // max(batch.nbytes, 1)))
            for start in range(0, len(batch), step):
                for row in _fields(batch.slice(start, step)):
                    yield row | mark if isinstance(row, dict) else row
    except pyarrow.ArrowMemoryError as error:
        raise MemoryError from error
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PhiSightError(f"{name}: cannot be read ({reason}); {OTHER}") from error


def _fields(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; where one of them cannot be decoded, the others one by one."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
        return
    except (ValueError, KeyError, OverflowError) as error:
        if len(batch) == 1:
            yield str(error) or type(error).__name__
            return
    for number in range(len(batch)):
        yield from _fields(batch.slice(number, 1))


def _parquet(path: str, name: str, first: int) -> Iterator[tuple[Any, list[str]]]:
    import os

    from pyarrow import parquet

    file = parquet.ParquetFile(
        path,
        pre_buffer=False,  # a column is read as it is decoded, and not a row group at once
        buffer_size=1 << 20,
        thrift_string_size_limit=64 << 20,
        thrift_container_size_limit=1 << 20,
        schema_depth_limit=SCHEMA_DEPTH,
    )
    about = file.metadata
    _check_count(name, about.num_rows, os.path.getsize(path))
    wanted, unread = _columns(name, file.schema_arrow)
    for group in range(about.num_row_groups):
        count = about.row_group(group).num_rows
        if first >= count:
            first -= count
            continue
        each = max(1, about.row_group(group).total_byte_size // max(count, 1))
        size = min(max(PIECE // each, 1), MOST_ROWS)
        for batch in file.iter_batches(size, [group], wanted, use_threads=False):
            passed = min(first, len(batch))
            first -= passed
            yield batch.slice(passed), unread


def _ipc(path: str, name: str, kind: str, first: int) -> Iterator[tuple[Any, list[str]]]:
    import os

    import pyarrow
    from pyarrow import ipc

    source = pyarrow.OSFile(path)
    reader: Any
    if kind == "stream":
        schema = (reader := ipc.open_stream(source)).schema
        batches: Iterator[Any] = iter(reader)
    else:
        schema = (reader := ipc.open_file(source)).schema
        batches = map(reader.get_batch, range(reader.num_record_batches))
    wanted, unread = _columns(name, schema)
    total = 0
    for batch in batches:
        total += len(batch)
        _check_count(name, total, os.path.getsize(path))
        passed = min(first, len(batch))
        first -= passed
        if passed < len(batch):
            batch = batch.select(wanted)
            batch.validate(full=True)
            yield batch.slice(passed), unread


def _check_count(name: str, count: int, size: int) -> None:
    """A page of a few bytes can say that it repeats one value two thousand million times."""
    if count > FREE_ROWS + 8 * size:
        raise PhiSightError(f"{name}: says that it has {count:,} rows in {size:,} bytes; {OTHER}")


def _columns(name: str, schema: Any) -> tuple[list[str], list[str]]:
    """The columns that are read, and those that are not. Raises PhiSightError where a name stands
    twice, or nothing is left to be read."""
    names = list(schema.names)
    if twice := [column for column in names if names.count(column) > 1][:1]:
        raise PhiSightError(f"{name}: has the column {twice[0]!r:.60} twice; rename one of them")
    unread = [field.name for field in schema if _is_passed_over(field)]
    wanted = [column for column in names if column not in unread]
    if not wanted:
        raise PhiSightError(f"{name}: has no column that a record could be made of; check it")
    return wanted, unread


def _is_passed_over(field: Any) -> bool:
    """Whether a column holds numbers or bytes that no record is made of."""
    from pyarrow import types

    kind, listed = field.type, False
    while hasattr(kind, "value_type") and not types.is_dictionary(kind):
        kind, listed = kind.value_type, True
    if types.is_floating(kind):
        return listed
    binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return any(check(kind) for check in binary) and field.name not in PICTURE_KEYS
