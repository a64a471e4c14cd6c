"""How records lie in files: one module a kind of file, all read as a stream.

A container is a module with `is_one(path) -> bool` and `read(path, pictures)`, which gives every
record with the place to name in a message: `("a.json record 3", {...})`. A record that cannot be
made of what is there is given as `data.stream.NotRead`. Pictures that lie inside are handed to
`pictures.keep`, and the record then holds their names. What a record means is the matter of
`data.dataset`.

A file's kind is seen from how it begins, and not from its name; only a table of text, which begins
with anything, is known by its ending. A folder holds files of these kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from data.containers import folders, one_file
from data.pictures import Pictures


def container_of(path: Path) -> ModuleType | None:
    """The container that reads a file or folder; None for JSON and JSONL."""
    return folders if folders.is_one(path) else one_file.container_of(path)


def read_records(path: Path, pictures: Pictures = Pictures()) -> Iterator[tuple[str, object]]:
    """Every record of a file or folder, with the place to name in a message.

    Raises PhiSightError, when it comes to it, for what cannot be read.
    """
    yield from (folders if folders.is_one(path) else one_file).read(path, pictures)
