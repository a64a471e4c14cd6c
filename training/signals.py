"""Ctrl-C and SIGTERM, which a run answers between two steps."""

from __future__ import annotations

import signal
from types import FrameType

from system.processes import ASKING


class StopSignals:
    """SIGINT and SIGTERM ask for a stop after the step in hand; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignals:
        self._former = {s: signal.signal(s, self._ask) for s in ASKING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
