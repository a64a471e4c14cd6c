"""The run whose weights are served, as `api.measures` writes gauges: it may be training still."""

from __future__ import annotations

import time
from pathlib import Path

from api.measures import gauge
from checkpoints import checkpoints_in
from errors import PhiSightError
from reports.log import METRICS
from reports.status import RUNNING
from reports.watching import StatusReader


class RunMeasures:
    """Gauges of one run. Without labels: there is one, and none where it has no log here, as one
    that was fetched from the hub or imported."""

    def __init__(self, source: str) -> None:
        """`source`: the checkpoint that is served, or its name on the hub."""
        run = Path(source).parent
        has_log = Path(source) in checkpoints_in(run) and (run / METRICS).is_file()
        self._reader = StatusReader(run) if has_log else None

    def page(self) -> str:
        """Its lines; none of what the run has not logged yet, and none while its log is damaged:
        the server's own measures are told all the same."""
        if self._reader is None:
            return ""
        try:
            status = self._reader.read()
        except PhiSightError:
            return ""
        save = status.save
        values = {
            "running": ("Whether a process trains the run.", status.state == RUNNING),
            "step": ("Optimizer steps of the run, as logged.", status.step),
            "total_steps": ("Steps that the run will have.", status.total_steps),
            "loss": ("Training loss, nats a token, as last logged.", status.loss),
            "tokens_per_second": (
                "Tokens that the run trains on a second, as last logged.",
                status.tokens_per_second,
            ),
            "last_save_age_seconds": (
                "Time since the newest checkpoint was written.",
                None if save is None else max(0.0, time.time() - save.at),
            ),
            "alerts": ("Alerts and rollbacks in the log of the run.", len(status.alerts)),
        }
        return "".join(
            gauge(f"training_{name}", text, float(value))
            for name, (text, value) in values.items()
            if value is not None
        )
