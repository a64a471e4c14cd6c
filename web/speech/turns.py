"""Who is served next, where a few can be at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from web.errors import RequestError

LOOK_SECONDS = 0.05  # how often one who waits looks whether he is still waited for


class Turns:
    """`at_once` are served, in the order of asking, and `waiting` more may wait; `of_one` visitor
    at most, so that nobody fills the queue alone; the visitor "" is not counted."""

    def __init__(self, at_once: int, waiting: int, of_one: int, full: str, left: str) -> None:
        """`full`, `left`: keys of the texts of those who are refused, and of those who left."""
        self.at_once, self.most, self.of_one = at_once, at_once + waiting, of_one
        self._full, self._left = full, left
        self._changed = threading.Condition()
        self._asking: list[tuple[str, object]] = []  # (visitor, ticket), the first ones are served

    @contextmanager
    def take(self, visitor: str, left: Callable[[], bool]) -> Iterator[None]:
        """For as long as a turn lasts. Raises `RequestError` where too many wait, and when `left`
        says so before the turn has come."""
        ticket = (visitor, object())
        with self._changed:
            own = sum(asking == visitor for asking, _ in self._asking)
            if (visitor and own >= self.of_one) or len(self._asking) >= self.most:
                raise RequestError(self._full)
            self._asking.append(ticket)
        try:
            with self._changed:
                while ticket not in self._asking[: self.at_once]:
                    if left():
                        raise RequestError(self._left)
                    self._changed.wait(LOOK_SECONDS)
            yield
        finally:
            with self._changed:
                self._asking.remove(ticket)
                self._changed.notify_all()
