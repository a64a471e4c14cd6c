"""A sweep's TOML file -> the runs that it stands for.

[run]                       # fields that every run has; "preset" too
max_steps = 300

[sweep]                     # a run for every combination of these lists
seed = [0, 1, 2]
learning_rate = [1e-3, 3e-3]
adapter = [                 # fields that are chosen together: tables, under a name of your own
  { name = "small", lora_rank = 4, lora_alpha = 4.0 },
  { name = "large", lora_rank = 32, lora_alpha = 32.0 },
]
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import config as configs
from config import FIELDS, shown
from errors import PhiSightError
from evaluation.comparison import value_text
from presets import DEFAULT_PRESET
from training.config_file import check_names, fields_of, preset_of, toml_of

TABLES = ("run", "sweep")
OF_THE_SWEEP = ("run",)  # fields that it gives itself
NAME, LABEL = "name", re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,40}")
MOST_RUNS = 1000
BESIDE = (".toml", ".log", ".evaluation.log")  # what a run's name is given for a file of its own
LONGEST_NAME = 100  # characters; what is longer is numbered
_UNSAFE = re.compile(r"[^A-Za-z0-9._+=-]+")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    name: str
    """of its folder, made of what is its own"""
    fields: dict[str, Any]
    """config fields that the file gives for it"""
    preset: str = DEFAULT_PRESET
    choices: dict[str, str] = field(default_factory=dict)
    """name of a list of the sweep -> which of its values this run has, as a text"""


@dataclass(frozen=True)
class _Choice:
    """One value of one list."""

    text: str
    fields: dict[str, Any]


def read_sweep(path: str) -> list[PlannedRun]:
    """The runs of a file, in the order of its lists, the last one fastest.

    Raises:
        PhiSightError: it cannot be read, is not TOML, or has a table, key or value that cannot be
            used; a field that is misspelt is named with the nearest one.
    """
    return planned(toml_of(path, path), path)


def planned(tables: Mapping[str, Any], where: str) -> list[PlannedRun]:
    """The same of what a file holds; `where` names it in errors."""
    for name in tables:
        if name not in TABLES:
            near = difflib.get_close_matches(name, TABLES, n=1, cutoff=0.5)
            remedy = f"did you mean [{near[0]}]?" if near else "write [run] and [sweep]"
            raise PhiSightError(f"{where}: {shown(name)} is not a table of a sweep; {remedy}")
    fixed, lists = dict(_table(tables, "run", where)), _table(tables, "sweep", where)
    preset = preset_of(fixed, f"{where}: [run]")
    fixed = _fields(fixed, f"{where}: [run]")
    if not lists:
        raise PhiSightError(f"{where}: [sweep] has no list; write one such as seed = [0, 1, 2]")
    axes = {name: _choices(name, values, where) for name, values in lists.items()}
    count = 1
    for choices in axes.values():
        count *= len(choices)
    if count > MOST_RUNS:
        raise PhiSightError(f"{where}: [sweep] makes {count:,} runs; make at most {MOST_RUNS:,}")
    _check_owners(fixed, axes, where)
    runs = [
        PlannedRun(
            _name({name: choice.text for name, choice in zip(axes, combination)}),
            fixed | {n: v for choice in combination for n, v in choice.fields.items()},
            preset,
            {name: choice.text for name, choice in zip(axes, combination)},
        )
        for combination in itertools.product(*axes.values())
    ]
    for run in runs:
        try:
            configs.replace(configs.default_config(preset), **run.fields)
        except PhiSightError as error:
            raise PhiSightError(f"{where}: run {run.name}: {error}") from error
    return _numbered(runs)


def _table(tables: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = tables.get(name, {})
    if not isinstance(value, dict):
        raise PhiSightError(f"{where}: {name} is {shown(value)}; write a table [{name}]")
    return value


def _fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    check_names(values, where)
    for name in OF_THE_SWEEP:
        if name in values:
            raise PhiSightError(
                f"{where}: {name} is given by the sweep, which names its runs; leave it out"
            )
    return fields_of(values, where)


def _choices(name: str, values: Any, where: str) -> list[_Choice]:
    """The values of one list, each with the fields that it sets."""
    place = f"{where}: [sweep]"
    if not isinstance(values, list) or not values:
        check_names([name], place)  # a misspelt field is the likelier error
        raise PhiSightError(f"{place}: {name} is {shown(values)}; write a list of values")
    if all(isinstance(value, dict) for value in values):
        return _distinct([_joint(name, n, v, place) for n, v in enumerate(values)], name, place)
    if any(isinstance(value, dict) for value in values):
        raise PhiSightError(f"{place}: {name} mixes tables and values; write one kind")
    fields = [_fields({name: value}, place) for value in values]
    return _distinct([_Choice(value_text(one[name]), one) for one in fields], name, place)


def _joint(name: str, number: int, table: Mapping[str, Any], place: str) -> _Choice:
    """A table of fields that are chosen together."""
    if name in FIELDS or not LABEL.fullmatch(name):
        raise PhiSightError(
            f"{place}: {shown(name)} holds tables; give such a list a short name of your own, of"
            " letters and digits, that is no config field"
        )
    given = dict(table)
    text = given.pop(NAME, str(number))
    if not isinstance(text, str) or not text.strip():
        raise PhiSightError(f"{place}: {name}: name is {shown(text)}; write a text")
    return _Choice(text, _fields(given, f"{place}: {name} {shown(text)}"))


def _distinct(choices: list[_Choice], name: str, place: str) -> list[_Choice]:
    counts = Counter(choice.text for choice in choices)
    if twice := [text for text, count in counts.items() if count > 1]:
        raise PhiSightError(f"{place}: {name} has {shown(twice[0])} twice; write it once")
    return choices


def _check_owners(
    fixed: Mapping[str, Any], axes: Mapping[str, Sequence[_Choice]], where: str
) -> None:
    """Each field is given in one place: else one of them would silently win."""
    owner = dict.fromkeys(fixed, "[run]")
    for name, choices in axes.items():
        for given in {name: 0 for choice in choices for name in choice.fields}:
            if given in owner:
                raise PhiSightError(
                    f"{where}: {given} is in {owner[given]} and in {name} of [sweep]; write it once"
                )
            owner[given] = f"{name} of [sweep]"


def _name(choices: Mapping[str, str]) -> str:
    return ",".join(f"{name}={_UNSAFE.sub('-', text)}" for name, text in choices.items())


def _numbered(runs: list[PlannedRun]) -> list[PlannedRun]:
    """The runs under names that no two share and that a folder can have, with the files beside
    them."""
    made = []
    names = Counter(run.name for run in runs)
    beside = {f"{name}{ending}" for name in names for ending in BESIDE}
    for number, run in enumerate(runs):
        is_short = len(run.name) <= LONGEST_NAME
        is_usable = is_short and names[run.name] == 1 and run.name not in beside
        name = run.name if is_usable else f"run-{number:04d}"
        made.append(PlannedRun(name, run.fields, run.preset, run.choices))
    return made
