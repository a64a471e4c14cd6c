"""Numbers in a config.json, which anyone may have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

from errors import PhiSightError


def is_positive(value: object) -> TypeGuard[float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 < value < 1e300  # what a float holds


def flag(values: Mapping[str, object], name: str) -> bool:
    """True or false. Raises as `whole_number` does."""
    value = values.get(name)
    if not isinstance(value, bool):
        raise PhiSightError(f"{name}: must be true or false, not {value!r:.60}")
    return value


def whole_number(values: Mapping[str, object], name: str) -> int:
    """Raises `PhiSightError`, which begins with the key, for anything else."""
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise PhiSightError(f"{name}: must be a whole number above 0, not {value!r:.60}")
    return value


def number(values: Mapping[str, object], name: str) -> float:
    """Raises as `whole_number` does."""
    value = values.get(name)
    if not is_positive(value):
        raise PhiSightError(f"{name}: must be a number above 0, not {value!r:.60}")
    return float(value)
