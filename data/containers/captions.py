"""Pictures with captions: CSV and TSV files.

The first line names the columns. One of them names a picture (`image`, `file_name`, `path`...) and
one has its text (`caption`, `text`, `title`...); in the record they are called `image` and
`caption`. All other columns keep their names, and an empty cell is a key that the record has not.
What separates the cells is seen from the first line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from data.forms import LISTS, MADE
from data.pictures import Pictures
from data.record_keys import plain
from data.stream import RECORD_LIMIT, UNREADABLE, NotRead, open_text, unreadable
from errors import PhiSightError, printable

ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SEPARATORS = (",", "\t", ";", "|")
LINE = 1 << 20  # characters
COLUMNS = 1000
PICTURE_COLUMNS = (
    *("image", "images", "file_name", "filename", "filepath", "file_path", "file", "path"),
    *("image_path", "image_file", "image_name", "img", "img_path", "picture"),
)
CAPTION_COLUMNS = ("caption", "text", "title", "description", "captions", "alt_text", "sentence")
# A row with one of these columns is a record of another form, in which `text` has its own meaning.
OF_OTHER_FORMS = frozenset().union(*(form.keys for form in (*LISTS, *MADE)))


def is_one(path: Path) -> bool:
    """Whether a file is a table of text, by its name: nothing in one says so."""
    return path.name.lower().endswith(ENDINGS)


def read(path: Path, pictures: Pictures) -> Iterator[tuple[str, object]]:
    """Every row as a record, with its line; see `data.containers`.

    Raises PhiSightError for a file that is empty, not UTF-8, or whose quotes or columns are wrong.
    """
    try:
        with open_text(path, newline="") as file:
            lines = _Lines(file, path)
            separator = _separator(path, lines.peek())
            rows = csv.reader(lines, delimiter=separator, strict=True)
            names = _names(path, next(rows))
            lines.taken = 0
            for row in rows:
                if row:
                    yield f"{path.name} line {rows.line_num}", _record(names, row)
                lines.taken = 0
    except csv.Error as error:
        raise PhiSightError(
            f"{path}: line {rows.line_num}: {error}; mend its quotes, or write JSON"
        ) from None
    except UNREADABLE as error:
        raise unreadable(path, error) from error


class _Lines:
    """The lines of a file, of bounded length, and of bounded length together for one row."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path, self.taken = file, path, 0
        self._first = ""

    def peek(self) -> str:
        """The first line, which is then given again."""
        self._first = self._read()
        if not self._first:
            raise PhiSightError(f"{self.path}: the file is empty; fetch or export it again")
        return self._first

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line, self._first = self._first or self._read(), ""
        if not line:
            raise StopIteration
        self.taken += len(line)
        if len(line) > LINE or self.taken > RECORD_LIMIT:
            raise PhiSightError(
                f"{self.path}: a row is longer than {LINE:,} characters; look there for a lost"
                " quotation mark"
            )
        return line

    def _read(self) -> str:
        return self.file.readline(LINE + 1)


def _separator(path: Path, first: str) -> str:
    """What makes the most known columns of the first line, and then the most columns."""

    def score(separator: str) -> tuple[int, int]:
        names = [plain(name.strip(' "\r\n')) for name in first.split(separator)]
        known = (*PICTURE_COLUMNS, *CAPTION_COLUMNS, *OF_OTHER_FORMS)
        return sum(name in known for name in names), len(names)

    return max(SEPARATORS, key=score)


def _names(path: Path, first: list[str]) -> list[str]:
    """What the columns are called in a record. Raises PhiSightError for what names none."""
    names = [name.strip() for name in first]
    shown = printable(", ".join(names), 200)
    if len(names) > COLUMNS or len(set(names)) < len(names) or "" in names:
        raise PhiSightError(
            f"{path}: its first line ({shown}) names no columns, or one twice; name each once"
        )
    plainly = [plain(name) for name in names]
    picture = next((name for name in PICTURE_COLUMNS if name in plainly), None)
    caption = next((name for name in CAPTION_COLUMNS if name in plainly), None)
    other = any(name in plainly for name in OF_OTHER_FORMS)
    if not other and caption is None:
        raise PhiSightError(
            f"{path}: none of its columns ({shown}) has a caption; name them in the first line,"
            f" such as image{SEPARATORS[0]}caption"
        )
    if picture is not None:
        names[plainly.index(picture)] = "image"
    if caption is not None and not other:
        names[plainly.index(caption)] = "caption"
    return names


def _record(names: list[str], row: list[str]) -> object:
    if len(row) != len(names):
        return NotRead(f"it has {len(row)} cells where the first line has {len(names)}")
    return {name: cell for name, cell in zip(names, row) if cell.strip()}
