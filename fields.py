"""How a field of the config is declared: its default, its help, what it may be, what it means."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping, Sequence
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
# What follows the last colon of a data source, where it is a number, is how often it is taken.
WEIGHT = re.compile(r"(.+):([0-9]{1,6}(?:\.[0-9]{1,6})?)", re.DOTALL)
FOLDERS = Bounds("folders, each with a name", all)
DATA = Bounds(
    "files or folders, each with nothing behind it or a :NUMBER over 0",
    lambda values: all(v and (not (m := WEIGHT.fullmatch(v)) or float(m[2]) > 0) for v in values),
)
# Far more than a picture has patches would only take memory.
QUERIES = Bounds("from 1 to 4096", lambda value: 1 <= value <= 4096)
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
    repeated: bool = False,
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
        repeated: the field is a tuple of texts whose flag is given once for each of them; a text
            alone stands for a list of one, and an empty one for none.
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
        "repeated": repeated,
    }
    return dataclasses.field(default=default, metadata=metadata)


def as_texts(value: str | Sequence[str]) -> tuple[str, ...]:
    """The texts of a `repeated` field, of which one alone may stand for a list of one."""
    texts = (value,) if isinstance(value, str) else tuple(value)
    return () if texts == ("",) else texts  # as `--images ""` is given


def split_weight(text: str) -> tuple[str, float]:
    """`a.json:2` -> ("a.json", 2.0); without a number behind the last colon the weight is 1."""
    match = WEIGHT.fullmatch(text)
    return (match[1], float(match[2])) if match else (text, 1.0)


def shown(value: Any) -> str:
    """The value as an error names it; what a file holds may be of any length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        return "a value too long to be shown"
    return text if len(text) <= 100 else text[:97] + "..."


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def of_kind(value: Any, kind: Any, formerly: Mapping[Any, Any]) -> Any:
    """A value from JSON or TOML as a field of type `kind` holds it: a list becomes a tuple and a
    whole number a float where the field is one; `formerly` as in `declared`.

    Raises:
        TypeError: it is of another type; the message is what was expected.
    """
    if type(value) in map(type, formerly):
        value = formerly[value]
    if kind is float and type(value) is int and abs(value) < 2**1023:  # else too large for one
        value = float(value)
    is_names = typing.get_origin(kind) is tuple
    if is_names and isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = tuple(value)
    if type(value) is not (tuple if is_names else kind):
        raise TypeError("a list of texts" if is_names else TYPE_NAMES[kind])
    return value
