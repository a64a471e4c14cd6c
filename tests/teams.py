"""Teams of threads, for what the processes of a run share: cheaper to start than processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier, BrokenBarrierError
from typing import Any


@dataclass
class Member:
    """One of a `data.team.Team`."""

    rank: int
    size: int
    barrier: Barrier
    board: list[str]
    """what each has given to an exchange, as it would go over the wire"""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share_of(self, items: Sequence) -> Sequence:
        return items[self.rank :: self.size]

    def from_first(self, work: Callable[[], Any]) -> Any:
        return self.exchange(work() if self.is_first else None)[0]

    def exchange(self, value: Any) -> list[Any]:
        self.board[self.rank] = json.dumps(value)
        self.barrier.wait(60)
        given = [json.loads(text) for text in self.board]
        self.barrier.wait(60)  # nobody writes before all have read
        return given


def together(size: int, work: Callable[[Member], Any]) -> list[Any]:
    """What `work` returns for each of so many members that run at once. Raises what one raises."""
    barrier, board = Barrier(size), [""] * size

    def run(rank: int) -> Any:
        try:
            return work(Member(rank, size, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        begun = [threads.submit(run, rank) for rank in range(size)]
    errors = [error for each in begun if (error := each.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
        raise error  # the cause before what the others met
    return [each.result() for each in begun]
