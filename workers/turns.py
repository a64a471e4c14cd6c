"""Who may use the one model: one at a time, in the order of asking."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from workers.pool import LOOK_SECONDS, Cancelled, never


class Turns:
    """Threads wait here in order. A lock knows no order: who releases it and asks again at once, as
    a long recording does window by window, mostly gets it before those who wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asking: deque[object] = deque()  # the first one has the turn

    @contextmanager
    def take(self, cancelled: Callable[[], bool] = never) -> Iterator[None]:
        """For as long as a turn lasts. Raises `Cancelled` while it waits, when `cancelled` says
        so."""
        ticket = object()
        with self._changed:
            self._asking.append(ticket)
        try:
            while True:
                if cancelled():
                    raise Cancelled
                with self._changed:
                    if self._asking[0] is ticket:
                        break
                    self._changed.wait(LOOK_SECONDS)
            yield
        finally:
            with self._changed:
                self._asking.remove(ticket)
                self._changed.notify_all()
