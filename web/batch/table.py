"""The rows of a batch as a file: CSV and a table to paste for spreadsheets, JSONL for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from web import texts

Form = Literal["csv", "tsv", "jsonl"]
MEDIA = {"csv": "text/csv", "tsv": "text/tab-separated-values", "jsonl": "application/jsonl"}
MARK = "\ufeff"  # tells a spreadsheet that a CSV is UTF-8
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run
COLUMNS = {
    "picture": "picture",
    "question": "question",
    "answer": "answer",
    "error": "batch_error",
    "seconds": "batch_seconds",
}
"""of a table: name in JSONL, and text of the head"""


@dataclass(frozen=True)
class TableRow:
    picture: str
    question: str
    answer: str | None
    error: str | None
    seconds: float | None


def table(form: Form, rows: Iterable[TableRow], language: str, head: bool = True) -> str:
    """The rows as text. `head`: begin with the columns' names in a language; JSONL has none."""
    if form == "jsonl":
        return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO(newline="")
    writer = csv.writer(text, dialect="excel-tab" if form == "tsv" else "excel")
    if head:
        writer.writerow(texts.text(key, language) for key in COLUMNS.values())
    for row in rows:
        writer.writerow(cell(value) for value in asdict(row).values())
    return (MARK if head and form == "csv" else "") + text.getvalue()


def cell(value: str | float | None) -> str:
    """A cell that spreadsheets take for text, and never for a formula."""
    told = "" if value is None else str(value)
    return f"'{told}" if told.startswith(FORMULA) else told
