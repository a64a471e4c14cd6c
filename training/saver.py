"""Saving beside the training: at most one save is in flight, and none fails in silence."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from errors import PhiSightError


class BackgroundSaver:
    """Runs saves one after another on a thread of its own.

    `start` returns as soon as the former save is done; what it is given must hold copies. An error
    of a save is raised by the next `check`, `start` or `wait`, with its cause.

    Attributes:
        waited: seconds that `start` and `wait` have held up their caller in all.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.waited = 0.0

    def start(self, save: Callable[[], object]) -> None:
        self.wait()

        def work() -> None:
            try:
                save()
            except BaseException as error:  # handed to the training thread, whatever it is
                self._error = error

        # Not a daemon: a program that ends in an error still finishes the save it has begun.
        self._thread = threading.Thread(target=work, name="save")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a save that has failed since the last call."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait without raising, where another error is on its way: this one is printed."""
        try:
            self.wait()
        except PhiSightError as error:
            print(f"warning: the last save failed: {error}", file=sys.stderr)

    def wait(self) -> None:
        """Return when no save is in flight. Raises as `check` does."""
        if self._thread is not None:
            clock = time.perf_counter()
            self._thread.join()
            self._thread = None
            self.waited += time.perf_counter() - clock
        self.check()
