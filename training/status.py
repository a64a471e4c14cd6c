"""`train.py --status`: where a run stands, while it trains and after.

It reads files alone and loads no torch, so that it answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from errors import PhiSightError, run_main
from files import stamp_of
from reports.log import METRICS
from reports.status import Status, status_lines, status_of
from training.lock import holder_of
from training.options import STATUS, parse


def run_status(run: str | Path) -> Status:
    """Where a run stands. Raises PhiSightError."""
    return status_of(Path(run), holder_of(run))


class StatusReader:
    """The status of one run, read again only when its log, its checkpoints or its trainer have
    changed: whoever asks every few seconds reads a long log once for each record."""

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self._known: tuple[object, Status] | None = None

    def read(self) -> Status:
        """Raises PhiSightError."""
        holder = holder_of(self.run)
        try:
            found = [self.run / METRICS, *self.run.glob("checkpoint-*")]
            stamps = [(p.name, *stamp_of(p.stat())) for p in sorted(found) if p.exists()]
        except OSError as error:
            raise PhiSightError(f"{self.run}: {error.strerror}; look there") from error
        now = holder, stamps
        if self._known is None or self._known[0] != now:
            self._known = now, status_of(self.run, holder)
        return self._known[1]


def show_status(run: str, as_json: bool) -> int:
    """Print it: one screen, or one JSON object."""
    status = run_status(run)
    if as_json:
        print(json.dumps(status.as_json()))
    else:
        print("\n".join(status_lines(status)))
    return 0


def answer_if_asked() -> None:
    """If this process's command line asks for the status of a run, answer, and end the process."""
    if any(argument.split("=")[0] == STATUS for argument in sys.argv[1:]):
        run_main(main)


def main() -> int:
    config, options = parse(None)
    return show_status(options.status or config.run, options.json)
