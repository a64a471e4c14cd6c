"""A whole data file at once, which the product never holds: for tests."""

from __future__ import annotations

from pathlib import Path

from data.dataset import Conversation, Quarantined
from data.sources import Source, read_conversations


def read_all(path: Path, strict: bool = False) -> tuple[list[Conversation], list[Quarantined]]:
    """The good conversations of a data file, and what was set aside."""
    quarantined: list[Quarantined] = []
    read = read_conversations(Source(Path(path)), quarantined, strict)
    return [conversation for _, conversation in read], quarantined
