"""JSON that comes from a disk: read strictly, in bounded time and memory, and checked once, here.

`parse_json` takes what Python's own reader takes, except what two readers would take differently or
what fails far from here: a name that stands twice in an object, halves of characters, numbers of
more than 64 bits, values nested deeper than any of ours. `problems` compares a value with what it
should be, so that the code behind it can rely on its types:

    {"step": COUNT, "chain?": TEXT, "losses": [NUMBER], "sums": {"*": NUMBER}}

is an object with a count and, where it has one, a text, a list of numbers, and an object whose
values are numbers, whatever their names. Names that are not listed may be there. All errors are
`PhiSightError`s with the reason alone: the caller knows the file and the remedy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import shown
from errors import PhiSightError
from files import read_regular

BYTE_LIMIT = 64 * 2**20  # no JSON file or safetensors header of ours comes near this
DEPTH = 50  # of objects and lists in each other; ours have 4
# Python writes the bytes of a path that is not UTF-8 as U+DC80 to U+DCFF, which may stay.
HALF_CHARACTER = re.compile("[\ud800-\udc7f\udd00-\udfff]")
WHOLE_LIMIT = 2**64  # a seed; whatever counts something is far below it


# -- reading --------------------------------------------------------------------------------------


def read_json(path: Path, limit: int = BYTE_LIMIT, own: bool = True) -> dict[str, Any]:
    """The JSON object in a regular file; see `parse_json`. Raises `OSError` too."""
    return parse_json(read_regular(path, limit), own)


def parse_json(data: bytes, own: bool = True, what: str = "a JSON object") -> dict[str, Any]:
    """A JSON object. `own` False: of another program, whose numbers may be of any size; `what`: the
    name of the object in the error for a value of another kind."""
    try:
        value = json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, and bad UTF-8
        raise PhiSightError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise PhiSightError(f"not {what}")
    _check_values(value, own)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} stands in an object twice")
    return made


def _check_values(value: dict[str, Any], own: bool) -> None:
    """Raise for what Python's reader takes and nothing of ours writes."""
    level: list[Any] = [value]
    for _ in range(DEPTH):
        inner: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                inner += node.keys()
                inner += node.values()
            elif isinstance(node, list):
                inner += node
            elif isinstance(node, str):
                if not node.isascii() and HALF_CHARACTER.search(node):
                    raise PhiSightError(f"not JSON ({shown(node)} is not Unicode)")
            elif own and type(node) is int and abs(node) >= WHOLE_LIMIT:
                raise PhiSightError("not JSON (a number of more than 64 bits)")
        if not inner:
            return
        level = inner
    raise PhiSightError(f"not JSON (nested deeper than {DEPTH} levels)")


# -- what a value should be -----------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a value should be, in words and as a question."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


ANY = Kind("anything", lambda value: True)
COUNT = Kind("a whole number from 0 on", lambda v: type(v) is int and 0 <= v < 2**63)
COUNT_OR_NULL = Kind("a whole number from 0 on or null", lambda v: v is None or COUNT.holds(v))
POSITIVE = Kind("a number above 0", lambda v: _is_number(v) and math.isfinite(v) and v > 0)
NUMBER = Kind("a number", _is_number)
FINITE = Kind("a finite number", lambda v: _is_number(v) and math.isfinite(v))
NUMBER_OR_NULL = Kind("a number or null", lambda v: v is None or _is_number(v))
TEXT = Kind("a text", lambda v: isinstance(v, str))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
OBJECT = Kind("a JSON object", lambda v: isinstance(v, dict))
OBJECT_OR_NULL = Kind("a JSON object or null", lambda v: v is None or isinstance(v, dict))
LIST = Kind("a list", lambda v: isinstance(v, list))


def problems(value: Any, should: Any, path: str = "") -> Iterator[str]:
    """Where a value is not what it should be, as "step is missing" or "step is 'x', not ...".

    Args:
        should: a `Kind`; a list of one, which each element should be; or a dictionary of them by
            name ("name?": it may be missing; "*": all others).
        path: what the value is called.
    """
    if isinstance(should, Kind):
        if not should.holds(value):
            yield f"{path or 'it'} is {shown(value)}, not {should.words}"
    elif isinstance(should, list):
        if not isinstance(value, list):
            yield f"{path or 'it'} is {shown(value)}, not a list"
            return
        for index, inner in enumerate(value):
            yield from problems(inner, should[0], f"{path}[{index}]")
    elif not isinstance(value, Mapping):
        yield f"{path or 'it'} is {shown(value)}, not a JSON object"
    else:
        dotted = f"{path}." if path else ""
        names = {name.removesuffix("?"): kind for name, kind in should.items() if name != "*"}
        for name, kind in names.items():
            if name in value:
                yield from problems(value[name], kind, dotted + name)
            elif f"{name}?" not in should:
                yield f"{dotted}{name} is missing"
        for name in value if "*" in should else ():
            if name not in names:
                yield from problems(value[name], should["*"], f"{dotted}{shown(name)}")


def require(value: Any, should: Any) -> None:
    """Raise `PhiSightError` with the first of the `problems`."""
    for problem in problems(value, should):
        raise PhiSightError(problem)


# -- writing --------------------------------------------------------------------------------------


def json_bytes(name: str, value: dict[str, Any]) -> bytes:
    """JSON that reads back as it was; infinities and NaN pass, as Python's own reader takes them.

    Raises PhiSightError for what would come back as something else (keys that are not strings).
    """
    _check_keys(name, value, "")
    try:
        return (json.dumps(value, indent=2) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise PhiSightError(
            f"{name}: {error}; give it plain numbers, strings, lists and dictionaries"
        ) from error


def _check_keys(name: str, node: Any, path: str) -> None:
    if isinstance(node, dict):
        for key, inner in node.items():
            if not isinstance(key, str):
                raise PhiSightError(
                    f"{name}: the key {key!r} in {path or 'it'} is not a "
                    "string; JSON would change it, use a string"
                )
            _check_keys(name, inner, f"{path}.{key}".lstrip("."))
    elif isinstance(node, (list, tuple)):
        for inner in node:
            _check_keys(name, inner, path)
