"""The learning rate of every step, a pure function of its number."""

from __future__ import annotations

import math

from config import SCHEDULES
from errors import PhiSightError


def lr_at(
    step: float, total_steps: float, warmup_fraction: float, peak: float, schedule: str = "linear"
) -> float:
    """The learning rate of the step that follows `step` finished ones: nothing to save or restore.
    A run that was gone on with in other steps has positions between two of the first ones.

    It rises linearly from 0 over the first `warmup_fraction` of the steps (rounded up), and then
    falls to 0 at `total_steps` in a line or half a cosine, or stays at `peak`. "linear" equals
    transformers' `get_linear_schedule_with_warmup`, so with a warm-up the very first rate is 0. A
    run of one step has no warm-up: it would train nothing.

    Raises:
        PhiSightError: the schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise PhiSightError(
            f"schedule: {schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}"
        )
    warmup_steps = math.ceil(total_steps * warmup_fraction) if total_steps > 1 else 0
    if step < warmup_steps:
        return peak * (step / warmup_steps)
    if schedule == "constant":
        return peak
    remaining = max(0, total_steps - step) / max(1, total_steps - warmup_steps)  # 1 -> 0
    if schedule == "linear":
        return peak * remaining
    return peak * 0.5 * (1 - math.cos(math.pi * remaining))
