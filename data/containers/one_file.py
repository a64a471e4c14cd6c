"""One file, of whichever kind it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from data import stream
from data.containers import arrow, captions, webdataset
from data.pictures import Pictures

CONTAINERS = (arrow, webdataset, captions)  # the first that says `is_one` reads, or JSON is read


def container_of(path: Path) -> ModuleType | None:
    """What reads a file; None for JSON and JSONL."""
    return next((container for container in CONTAINERS if container.is_one(path)), None)


def read(path: Path, pictures: Pictures) -> Iterator[tuple[str, object]]:
    """Every record of a file, with its place; see `data.containers`. Raises PhiSightError."""
    container = container_of(path)
    yield from container.read(path, pictures) if container else stream.read_records(path)
