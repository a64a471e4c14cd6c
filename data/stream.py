"""Records of a JSON file of any size, one after the other, in memory that does not grow with it.

Two forms are read: one JSON list of records, and one record a line (JSONL). Only a window of the
text is held, so the largest record sets the memory and not the file; a record has a size limit, or
one lost quotation mark would make the rest of the file one record. A file that is compressed by
gzip is read as what it holds.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, TextIO, cast

from errors import PhiSightError

CHUNK = 1 << 20  # characters read at a time
RECORD_LIMIT = 1 << 24  # characters of one record; LLaVA's longest has some ten thousand
LONGEST_MARK = 16  # longer than -Infinity and than an escaped character: what a cut can hide
WHITE_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's own: str.isspace() knows more
GZIP = b"\x1f\x8b"  # begins what is compressed by gzip
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # begin a text that some editors save
UNREADABLE = (OSError, UnicodeDecodeError, EOFError, zlib.error)  # what reading a text may raise
END = object()


@dataclass(frozen=True, slots=True)
class NotRead:
    """Stands in for a record that could not be made of what the file holds."""

    reason: str

    def __str__(self) -> str:
        return self.reason


class NotJson(NotRead):
    """Stands in for a record whose line could not be decoded."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"not JSON ({self.reason})"


class RepeatedKeys(dict):
    """An object that has a key more than once: the last of its values, and which key it was."""

    repeated: str


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    marked, counts = RepeatedKeys(found), Counter(key for key, _ in pairs)
    marked.repeated = next(key for key, count in counts.items() if count > 1)
    return marked


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def read_records(
    path: Path, chunk: int = CHUNK, limit: int = RECORD_LIMIT
) -> Iterator[tuple[str, object]]:
    """Every record of a JSON list or JSONL file, with the place to name in a message.

    A line that is not JSON is given as `NotJson`. Raises PhiSightError, when it comes to it, for a
    file that is missing, empty, not UTF-8, or neither form, and for a pipe: data are read more than
    once. In a list it names the record.
    """
    if path.is_fifo():
        raise PhiSightError(f"{path}: is a pipe, which is read only once; save it as a file")
    with open_text(path) as file:
        window = _Window(file, path, chunk)
        first = window.first_character()
        if first == "{":
            yield from _lines(window, limit, must_begin_well=True)
        elif first == "[":
            yield from _list(window, limit)
        else:
            _refuse(window, limit)


def read_lines(
    path: Path, chunk: int = CHUNK, limit: int = RECORD_LIMIT
) -> Iterator[tuple[str, object]]:
    """Every line that is not blank, decoded, with its place. Raises as `read_records` does."""
    with open_text(path) as file:
        window = _Window(file, path, chunk)
        window.first_character()
        yield from _lines(window, limit, must_begin_well=False)


def kind_of(value: object) -> str:
    """What a JSON value is, in words for a person."""
    if value is None:
        return "missing"
    if (value.strip() if isinstance(value, str) else value) in ("", [], {}):
        return "empty"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "a number")


# -- the window -----------------------------------------------------------------------------------


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A text file in UTF-8, whether it is compressed by gzip or not.

    Raises PhiSightError; what is read from it raises one of `UNREADABLE`.
    """
    try:
        file = open(path, "rb")
        return io.TextIOWrapper(unzipped(file), encoding="utf-8-sig", newline=newline)
    except FileNotFoundError:
        raise PhiSightError(f"{path}: no such file; check the name") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def unzipped(file: io.BufferedReader) -> IO[bytes]:
    """What an open file holds, decompressed where it is compressed by gzip; closed with it."""
    if file.peek(len(GZIP))[: len(GZIP)] != GZIP:
        return file
    packed = gzip.GzipFile(fileobj=file)
    packed.myfileobj = file  # type: ignore[assignment]  # which it then closes
    return cast(IO[bytes], packed)


def unreadable(path: Path, error: Exception) -> PhiSightError:
    """What to tell of one of `UNREADABLE`, which reading a file raised."""
    if isinstance(error, UnicodeDecodeError):
        if b"\0" in error.object and not error.object.startswith(UTF_16):
            kinds = "not text, and of none of the kinds in docs/data.md"
            return PhiSightError(f"{path}: {kinds}; unpack or convert it, and name what comes out")
        return PhiSightError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8")
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
        return PhiSightError(
            f"{path}: its gzip is damaged or cut short ({error}); fetch or export it again"
        )
    reason = getattr(error, "strerror", None) or error
    return PhiSightError(f"{path}: cannot be read ({reason}); give a data file")


class _Window:
    """A stretch of a text file that slides over it. `text` is what is held."""

    def __init__(self, file: TextIO, path: Path, chunk: int) -> None:
        self.file, self.path, self.chunk = file, path, chunk
        self.text, self.at_end = "", False
        self._line, self._column = 1, 1  # of text[0]

    def slide(self, used: int) -> None:
        """Let go of `text[:used]` and read on, at least as much as is left: a record that needs
        many looks is then read in time proportional to its length."""
        self._line, self._column = self.place(used)
        rest = self.text[used:]
        try:
            more = self.file.read(max(self.chunk, len(rest)))
        except UNREADABLE as error:
            raise unreadable(self.path, error) from error
        self.at_end = not more
        self.text = rest + more

    def place(self, position: int) -> tuple[int, int]:
        """Line and column, from 1, of `text[position]` in the file."""
        newlines = self.text.count("\n", 0, position)
        if not newlines:
            return self._line, self._column + position
        return self._line + newlines, position - self.text.rfind("\n", 0, position)

    def first_character(self) -> str:
        """The first that is not white space, or the odd white space that JSON has no place for."""
        while not self.text.strip():
            if self.at_end:
                raise PhiSightError(f"{self.path}: the file is empty; fetch or export it again")
            if len(self.text) > RECORD_LIMIT:
                raise PhiSightError(f"{self.path}: begins with nothing but white space; check it")
            self.slide(0)
        if self.text.lstrip().startswith("{"):
            return "{"
        return self.text[_after_white_space(self.text, 0)]


def _after_white_space(text: str, position: int) -> int:
    match = WHITE_SPACE.match(text, position)
    return match.end() if match else position


# -- one record a line ----------------------------------------------------------------------------


def _lines(window: _Window, limit: int, must_begin_well: bool) -> Iterator[tuple[str, object]]:
    """Only a newline separates records: splitlines() would also cut at U+2028, which JSON may
    hold."""
    number = position = 0
    while True:
        number += 1
        end = window.text.find("\n", position)
        while end < 0 and not window.at_end and len(window.text) - position <= limit:
            window.slide(position)
            position = 0
            end = window.text.find("\n")
        line = window.text[position : len(window.text) if end < 0 else end]
        if len(line) > limit:
            record: object = NotJson(f"the line is longer than {limit:,} characters")
        else:
            record = decode(line) if line.strip() else END
        if record is not END:
            if must_begin_well and isinstance(record, NotJson):
                raise PhiSightError(
                    f"{window.path}: neither a JSON list nor one JSON object a line; "
                    "put the records into one list [...]"
                )
            must_begin_well = False
            yield f"{window.path.name} line {number}", record
        while end < 0 and not window.at_end:  # the rest of a line that is too long
            window.slide(len(window.text))
            end = window.text.find("\n")
        if end < 0:
            return
        position = end + 1


def decode(text: str) -> object:
    """The value of one whole JSON text, or `NotJson`."""
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError as error:
        return NotJson(f"{error.msg} at line {error.lineno} column {error.colno}")
    except ValueError:  # Python refuses to read a number of thousands of digits
        return NotJson("a number is too long")
    except RecursionError:
        return NotJson("nested too deeply")


# -- one list -------------------------------------------------------------------------------------


def _list(window: _Window, limit: int) -> Iterator[tuple[str, object]]:
    position = _after_white_space(window.text, 0) + 1
    number, ended = 0, False
    while not ended:
        value, position, ended = _next_value(window, position, number + 1, limit)
        if value is not END:
            number += 1
            yield f"{window.path.name} record {number}", value
    while True:
        position = _after_white_space(window.text, position)
        if position < len(window.text):
            _fail(window, f"after record {number}, the end of the list", "Extra data", position)
        if window.at_end:
            return
        window.slide(position)
        position = 0


def _next_value(
    window: _Window, position: int, number: int, limit: int
) -> tuple[object, int, bool]:
    """The value at `position` (or END), where the next begins, and whether the list has ended.

    Whatever fails is tried again with more text as long as the window's end may be what cut it.
    """
    while True:
        text = window.text
        reason, place = "a number is too long", None
        try:
            value, after, ended = _value_and_mark(text, position, may_end=number == 1)
            if after - position <= limit:
                return value, after, ended
            _too_long(window, number, limit, "")
        except json.JSONDecodeError as error:
            reason, place = error.msg, error.pos
            may_be_cut = place >= len(text) - LONGEST_MARK or reason.startswith("Unterminated")
        except ValueError:  # a number of thousands of digits; they may be the front of a float
            may_be_cut = True
        except RecursionError:
            reason, may_be_cut = "nested too deeply", False
        if window.at_end or not may_be_cut:
            _fail(window, f"record {number}", reason, place)
        if len(text) - position > limit:
            _too_long(window, number, limit, _described(window, reason, place))
        window.slide(position)
        position = 0


def _value_and_mark(text: str, position: int, may_end: bool) -> tuple[object, int, bool]:
    """A value counts only with the mark behind it: the digits at a window's end may go on."""
    position = _after_white_space(text, position)
    if may_end and text[position : position + 1] == "]":
        return END, position + 1, True
    value, position = _decoder.raw_decode(text, position)
    position = _after_white_space(text, position)
    mark = text[position : position + 1]
    if mark not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    return value, position + 1, mark == "]"


def _described(window: _Window, reason: str, position: int | None) -> str:
    if position is None:
        return reason
    line, column = window.place(position)
    return f"{reason} at line {line} column {column}"


def _fail(window: _Window, where: str, reason: str, position: int | None) -> NoReturn:
    raise PhiSightError(
        f"{window.path}: not JSON ({where}: {_described(window, reason, position)}); "
        "fetch or export it again"
    ) from None


def _too_long(window: _Window, number: int, limit: int, reason: str) -> NoReturn:
    raise PhiSightError(
        f"{window.path}: record {number} has more than {limit:,} characters"
        f"{reason and f' ({reason})'}; look there for a lost quotation mark, or split the record"
    ) from None


def _refuse(window: _Window, limit: int) -> NoReturn:
    """What is neither a list nor an object: name it, if it is JSON at all."""
    while not window.at_end and len(window.text) <= limit:
        window.slide(0)
    value = decode(window.text) if window.at_end else NotJson("it begins with neither [ nor {")
    if isinstance(value, NotJson):
        raise PhiSightError(f"{window.path}: not JSON ({value.reason}); fetch or export it again")
    raise PhiSightError(
        f"{window.path}: holds {kind_of(value)}, not a list; give a list of records"
    )
