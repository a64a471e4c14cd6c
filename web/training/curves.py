"""The series of a log, for the page to draw: all points of a short one, the shape of a long one."""

from __future__ import annotations

import bisect
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reports.log import TIMING

MOST_POINTS = 1000  # of a series in one answer; a chart has fewer pixels across
OWNERS = 8  # whose gradient norms are shown
_OWNER = re.compile(r"[A-Za-z0-9_.-]{1,40}")  # an owner's name, which a log may hold anything as
Point = tuple[float, float]
Series = dict[str, list[Point]]


def series_of(records: Sequence[Mapping[str, Any]]) -> Series:
    """Every series with points, by its name, (step, value) in the order of the steps."""
    from reports.curves import points  # with Pillow: not at the start of the app

    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    series = {
        "loss": points(train, "loss"),
        "validation_loss": points(evaluations, "validation_loss"),
        **{name: points(evaluations, "alignment", name) for name in ("right", "swapped", "blank")},
        "learning_rate": points(train, "lr"),
        "gradient_norm": points(train, "gradient_norm"),
        **{f"norm_{name}": points(train, "gradient_norms", name) for name in _owners(train)},
        "tokens_per_second": points(train, TIMING, "tokens_per_second"),
        "memory_mb": points(train, TIMING, "memory_mb"),
        "cuda_memory_mb": points(train, TIMING, "cuda_memory_mb"),
    }
    return {name: sorted(found) for name, found in series.items() if found}


def _owners(train: Sequence[Mapping[str, Any]]) -> list[str]:
    found: dict[str, None] = {}
    for record in train:
        for name in record.get("gradient_norms") or ():
            if name not in found and _OWNER.fullmatch(name):
                found[name] = None
                if len(found) == OWNERS:
                    return list(found)
    return list(found)


def part_of(
    points: Sequence[Point], since: float | None, until: float | None, most: int = MOST_POINTS
) -> list[Point]:
    """The points of the steps from `since` to `until`, thinned to at most `most`. Those of `since`
    itself are among them: an evaluation is logged after the training record of its step."""
    steps = [step for step, _ in points]
    first = 0 if since is None else bisect.bisect_left(steps, since)
    last = len(points) if until is None else bisect.bisect_right(steps, until)
    return thinned(points[first:last], most)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` of the points: the first, the last, and the lowest and the highest of every
    stretch between, so that a jump of one step is still seen."""
    if len(points) <= most:
        return list(points)
    inner, stretches = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for index in range(stretches):
        part = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        lowest = min(range(len(part)), key=lambda at: part[at][1])
        highest = max(range(len(part)), key=lambda at: part[at][1])
        kept += [part[at] for at in sorted({lowest, highest})]
    return [*kept, points[-1]]


def table_of(series: Series) -> Iterator[str]:
    """All points as CSV, a row a step, in pieces."""
    by_step: dict[float, dict[str, float]] = {}
    for name, points in series.items():
        for step, value in points:
            by_step.setdefault(step, {})[name] = value
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["step", *series])
    for step in sorted(by_step):
        row = by_step[step]
        writer.writerow([int(step), *(row.get(name, "") for name in series)])
        if text.tell() > 2**16:
            yield text.getvalue()
            text.seek(0)
            text.truncate()
    yield text.getvalue()
