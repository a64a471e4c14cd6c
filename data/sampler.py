"""The order of the data: a pure function of (seed, epoch, lengths): a position is two integers.

Conversations of very different lengths are packed into rows of one length; nothing about that is
remembered between steps, it is computed again from the same numbers.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Collection, Sequence

from errors import PhiSightError

PACKING_WINDOW = 1024  # conversations packed together: large fills rows better, small mixes better


def shuffled(count: int, seed: int, epoch: int, purpose: str) -> list[int]:
    """0..count-1 in an order that depends on nothing but the arguments (no library's generator)."""

    def key(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{epoch}/{purpose}/{index}".encode()).digest()

    return sorted(range(count), key=key)


def pack(order: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Best-fit decreasing: each conversation, longest first, into the fullest row that has room.

    Args: `order`: indices to pack; `lengths`: tokens of every index; `row_tokens`: room in a row.
    Returns rows of indices. Raises `PhiSightError` for a conversation longer than a row.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in sorted(order, key=lambda i: -lengths[i]):  # stable: ties keep the shuffled order
        length = lengths[index]
        if length > row_tokens:
            raise PhiSightError(
                f"--row-tokens {row_tokens}: shorter than a conversation of {length} tokens;"
                f" give at least {length} (or 0 for the longest conversation)"
            )
        place = bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        insort(open_rows, (room - length, row))
    return rows


def plan(
    seed: int,
    epoch: int,
    lengths: Sequence[int],
    row_tokens: int,
    without: Collection[int] = frozenset(),
) -> list[list[int]]:
    """The rows of one epoch, each a list of conversation indices, in the order of training; those
    `without` are left out. With 0 `row_tokens` each conversation has a row of its own."""
    order = [i for i in shuffled(len(lengths), seed, epoch, "order") if i not in without]
    if not row_tokens:
        return [[i] for i in order]
    rows: list[list[int]] = []
    for start in range(0, len(order), PACKING_WINDOW):
        rows += pack(order[start : start + PACKING_WINDOW], lengths, row_tokens)
    return [rows[i] for i in shuffled(len(rows), seed, epoch, "rows")]
