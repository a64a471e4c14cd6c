"""The processes that share a piece of work on data; without others, this one does all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")


class Team(Protocol):
    """`rank` of `size` processes that all call the same methods in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_first(self) -> bool: ...

    def share_of(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's items: every `size`-th. All shares together are the items."""

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on the first process, a JSON value, on all of them; its
        `PhiSightError` too."""

    def exchange(self, value: Any) -> list[Any]:
        """The JSON value that each process gives, in the order of the processes, on all of them."""


class Alone:
    """A team of one."""

    rank, size, is_first = 0, 1, True

    def share_of(self, items: Sequence[Item]) -> Sequence[Item]:
        return items

    def from_first(self, work: Callable[[], Any]) -> Any:
        return work()

    def exchange(self, value: Any) -> list[Any]:
        return [value]


ALONE = Alone()


def in_order(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """The inverse of `Team.share_of`: what was made of each item of the shares, in the order of the
    items."""
    total = sum(map(len, shares))
    return [shares[place % len(shares)][place // len(shares)] for place in range(total)]
