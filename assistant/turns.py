"""Work that is done for one answer at a time, in turns."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from assistant.answer import Answer


class Turns:
    """A lock that is given in the order of asking, and that whoever has gone does not wait for.

    Work in parts takes a turn for each, so that others come between them.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[Answer] = deque()  # the first one has its turn

    @contextmanager
    def turn(self, answer: Answer) -> Iterator[bool]:
        """Waits for the turn of an answer, which lasts as long as the block. False, without having
        waited on, when the answer is cancelled."""
        with self._changed:
            self._line.append(answer)
            answer.when_cancelled = self._wake  # before looking: a later call finds it
            self._changed.wait_for(lambda: answer.cancelled or self._line[0] is answer)
        try:
            yield not answer.cancelled
        finally:
            answer.when_cancelled = None
            with self._changed:
                self._line.remove(answer)
                self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
