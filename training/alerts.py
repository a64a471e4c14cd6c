"""When a run tells that something goes wrong. All thresholds stand here, with their reasons."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from reports.alerts import SLOWER, STARVED

SPIKE_MEMORY = 50
"""steps whose gradient norms are remembered: long enough that a few large ones leave the median
where it is, short enough that it follows norms which fall in the course of a training"""
SPIKE_AFTER = 20
"""steps before the first judgement: norms fall steeply while the adapter leaves zero"""
SPIKE_FACTOR = 10.0
"""times the median. Over the 955 steps of the tiny preset no norm was above 3.4 times it; at ten
times, clipping to `max_gradient_norm` keeps the length of a step and not its direction"""
MOST_ROLLBACKS = 10
"""of one run: data or a learning rate that need more are not mended by leaving rows out"""

STARVED_SHARE = 0.2
"""of the time of steps, spent waiting for batches that were begun a step ahead: a fifth of the
machine is idle, which is worth looking for its cause; less is lost to load at any time"""
RATE_SHARE = 0.5
"""of the median of tokens a second: rows of other lengths and a busy machine change the rate by
tenths; half of it is another program, a throttled processor or memory that is swapped"""
RATE_MEMORY, RATE_AFTER = 20, 5
"""logged windows that the median is over, at most and before the first judgement"""
SHORTEST_WINDOW = 1.0
"""seconds of steps; in less, the scheduler of the system decides what is measured"""


def is_spike(norm: float, recent: Sequence[float]) -> bool:
    """Whether a gradient norm is far above those of the steps before it, or not finite."""
    if not math.isfinite(norm):
        return True
    median = statistics.median(recent) if len(recent) >= SPIKE_AFTER else 0.0
    return norm > SPIKE_FACTOR * median > 0


class ClockAlerts:
    """What the clock tells of this process. None of it is in a checkpoint: a run that is resumed,
    perhaps on another machine, is compared with itself from there on."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=RATE_MEMORY)
        self._standing: set[str] = set()

    def of_window(self, window: Mapping[str, float]) -> list[dict[str, Any]]:
        """The alerts that begin with a logged window: the sums over its steps of "seconds",
        "wait_seconds" and "tokens"."""
        seconds = window["seconds"]
        if seconds < SHORTEST_WINDOW:
            return []
        rate, share = window["tokens"] / seconds, window.get("wait_seconds", 0.0) / seconds
        median = statistics.median(self._rates) if len(self._rates) >= RATE_AFTER else 0.0
        self._rates.append(rate)
        found = {
            STARVED: {"wait_share": round(share, 3)} if share > STARVED_SHARE else None,
            SLOWER: {"tokens_per_second": round(rate, 1), "median": round(median, 1)}
            if rate < RATE_SHARE * median
            else None,
        }
        standing = {name for name, facts in found.items() if facts}
        begun, self._standing = standing - self._standing, standing
        return [{"alert": name, **(found[name] or {})} for name in found if name in begun]
