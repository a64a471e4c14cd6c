"""Text of unknown origin in a Markdown file: it is shown as it is, and does nothing.

Names of runs, bases and layers come out of files that anybody may have written. What is not made
of harmless characters alone is escaped, one by one, so that no text makes a link, a picture, HTML,
a heading, or a column of a table.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from errors import printable

LONGEST = 400  # characters of a text that are shown
_HARMLESS = re.compile(r"[A-Za-z0-9/][A-Za-z0-9._/+:,=-]*")
_NUMBER = r"\(?[+-]?\d[\d,]*(?:\.\d+)?%?\)?"
_NUMBERS = re.compile(rf"-|{_NUMBER}(?: (?:to |of )?{_NUMBER})*")
# Any ASCII punctuation may stand behind a backslash (CommonMark 0.31, 2.4).
_ESCAPED = {ord(character): f"\\{character}" for character in string.punctuation}


def name(text: object) -> str:
    """A name or a value: as code where its characters are harmless, else escaped."""
    line = printable(text, LONGEST)
    return f"`{line}`" if _HARMLESS.fullmatch(line) else escaped(line)


def listed(value: object) -> str:
    """A value, or those of a tuple; as `name`."""
    if isinstance(value, tuple):
        return ", ".join(map(name, value))
    return name(value) if value != "" else "(empty)"


def escaped(text: object) -> str:
    """A text on one line in which every mark stands for itself."""
    return printable(text, LONGEST).translate(_ESCAPED) or "(empty)"


def cell(text: object) -> str:
    """A text for a cell of a table: numbers as they are, else as `name`."""
    line = printable(text, LONGEST)
    return line if _NUMBERS.fullmatch(line) else name(line)


def number(value: object, pattern: str) -> str:
    """A number in a format; a dash for what is none, such as null for one that was not finite."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return format(value, pattern) if is_number else "-"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are Markdown already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
