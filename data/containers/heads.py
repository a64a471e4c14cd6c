"""How a file begins, which tells its kind whatever it is called."""

from __future__ import annotations

from pathlib import Path

from data.stream import UNREADABLE, unzipped

BYTES = 512  # of a tar's first header


def head_of(path: Path) -> bytes:
    """The first bytes of a regular file, decompressed where it is compressed by gzip; empty for
    what cannot be read, which the reader of JSON tells of."""
    try:
        if not path.is_file():
            return b""
        with open(path, "rb") as file, unzipped(file) as content:
            return content.read(BYTES)
    except UNREADABLE:
        return b""
