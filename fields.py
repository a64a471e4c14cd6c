"""How a field of the config is declared: its default, its help, what it may be, what it means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PATH, PATH_OR_NAME = "path", "path or name"  # what a text is that says where something lies


@dataclass(frozen=True)
class Bounds:
    """Which values a field may have: in words, for the error, and as a predicate."""

    words: str
    hold: Callable[[Any], bool]


AT_LEAST_1 = Bounds("at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Bounds("0 or more", lambda value: value >= 0)
FINITE = Bounds("0 or more, and finite", lambda value: 0 <= value < float("inf"))
POSITIVE = Bounds("a positive number", lambda value: 0 < value < float("inf"))
UNDER_1 = Bounds("from 0 to under 1", lambda value: 0 <= value < 1)
# A row far longer than any base has positions would only take memory.
ROWS = Bounds("from 0 to 1048576", lambda value: 0 <= value <= 2**20)
# Far more threads than any machine has would end the process when they are started.
THREADS = Bounds("from 0 to 1024", lambda value: 0 <= value <= 1024)
# A list for people, who read it in one look.
SAMPLES = Bounds("from 0 to 16", lambda value: 0 <= value <= 16)
SEEDS = Bounds("from 0 to 4294967295", lambda value: 0 <= value < 2**32)  # what generators take


def declared(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    bounds: Bounds | None = None,
    changes_result: bool = True,
    known_by: str = "",
    place: str = "",
    old_checkpoints: Any = dataclasses.MISSING,
    formerly: Mapping[Any, Any] | None = None,
) -> Any:
    """Declare a field.

    Args:
        text: the help of its flag.
        changes_result: False where the field says where things lie, how often something is written
            or what listens later, and never what the next step computes: it may then differ
            between a checkpoint and the run that resumes it.
        known_by: the fact in a checkpoint's config.json that tells whether what the field names is
            still the same, wherever it lies now and whatever it is called.
        place: PATH or PATH_OR_NAME where the text says where something lies; see `paths`.
        old_checkpoints: the value that describes the checkpoints written before the field existed;
            without one, a checkpoint that lacks the field is refused.
        formerly: values of another type that the field had in older versions, in files and on
            command lines, each with the one that means the same now.
    """
    if choices:
        bounds = Bounds("one of " + ", ".join(choices), lambda value: value in choices)
    metadata = {
        "help": text,
        "choices": choices,
        "bounds": bounds,
        "changes_result": changes_result,
        "known_by": known_by,
        "place": place,
        "old_checkpoints": old_checkpoints,
        "formerly": formerly or {},
    }
    return dataclasses.field(default=default, metadata=metadata)


def shown(value: Any) -> str:
    """The value as an error names it; what a file holds may be of any length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        return "a value too long to be shown"
    return text if len(text) <= 100 else text[:97] + "..."
