"""Several runs side by side: what differs between them, and what came of it.

Runs that differ in nothing but their seed are one setting: it gets the mean over its seeds and the
range. Runs may be of different lengths, unfinished or damaged: every table says what each one is.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import config as configs
from evaluation.run_figures import DIGESTS, FIGURES, RunFigures
from reports.overlay import Curves

# The seed repeats a setting; another number of threads changes the last bits of its figures alone.
NO_SETTING = ("seed", "threads")
ABSENT = "-"


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone."""

    label: str
    runs: list[RunFigures]

    def values(self, figure: str) -> list[float]:
        """Of every run that has this figure."""
        found = [run.figures[figure] for run in self.runs]
        return [value for value in found if value is not None]

    def mean(self, figure: str) -> float | None:
        return statistics.fmean(values) if (values := self.values(figure)) else None


@dataclass(frozen=True)
class Table:
    """Cells are plain text; whoever shows them escapes them."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def names_of(runs: Sequence[RunFigures]) -> list[str]:
    """What each run is called: its folder, or its whole path where two folders have one name."""
    short = [run.name for run in runs]
    return [str(run.path) if short.count(run.name) > 1 else run.name for run in runs]


def differing_fields(runs: Sequence[RunFigures]) -> list[str]:
    """Config fields in which the runs differ whose config could be read, in the config's order;
    those that no result depends on, such as where features lie, are left out. Weights that lie in
    one place and are others follow by their digest."""
    known, free = [run.settings for run in runs if run.settings], configs.fields_without_effect()

    def differs(name: str) -> bool:
        return any(fields[name] != known[0][name] for fields in known)

    found = [name for name in configs.FIELDS if name not in free and differs(name)]
    return found + [of for name, of in DIGESTS.items() if name not in found and differs(of)]


def settings_of(runs: Sequence[RunFigures]) -> list[Setting]:
    """The runs by what differs but their seed, in the order in which they were given. A run without
    a config is a setting of its own."""
    differing = [name for name in differing_fields(runs) if name not in NO_SETTING]
    grouped: dict[Any, list[RunFigures]] = {}
    names = dict(zip((run.path for run in runs), names_of(runs), strict=True))
    for run in runs:
        own = tuple(
            f"{field}={value_text(run.settings[field])}" for field in differing if run.settings
        )
        grouped.setdefault(own if run.settings else run.path, []).append(run)
    return [
        Setting(names[alike[0].path] if len(alike) == 1 else ", ".join(key) or "all runs", alike)
        for key, alike in grouped.items()
    ]


def value_text(value: Any) -> str:
    """A value of a config field as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return str(value)


def tables_of(runs: Sequence[RunFigures]) -> list[Table]:
    """What came of each run, what differs between them, and the means over seeds."""
    names, settings = names_of(runs), settings_of(runs)
    shown = [name for name in FIGURES if any(run.figures[name] is not None for run in runs)]
    titles = [FIGURES[name].title for name in shown]
    tables = [
        Table(
            "What came of each run",
            ["run", "state", *titles],
            [
                [name, run.state, *(_text(figure, run.figures[figure]) for figure in shown)]
                for name, run in zip(names, runs, strict=True)
            ],
        )
    ]
    if differing := differing_fields(runs):
        rows = [
            [name, *(value_text(run.settings[f]) if run.settings else ABSENT for f in differing)]
            for name, run in zip(names, runs, strict=True)
        ]
        tables.append(Table("Settings that differ", ["run", *differing], rows))
    if any(len(setting.runs) > 1 for setting in settings):
        rows = [
            [s.label, str(len(s.runs)), *(_mean_and_range(s, figure) for figure in shown)]
            for s in settings
        ]
        tables.append(
            Table("Mean over the seeds of a setting (range)", ["setting", "runs", *titles], rows)
        )
    return tables


def notes_of(runs: Sequence[RunFigures]) -> list[str]:
    """What is not as it should be, a line each; and that lengths differ, where they do."""
    named = zip(names_of(runs), runs, strict=True)
    notes = [f"{name}: {note}" for name, run in named for note in run.notes]
    steps = sorted({run.step for run in runs if run.step})
    if len(steps) > 1:
        notes.append(
            f"the runs are of different lengths, {steps[0]:,} to {steps[-1]:,} steps: figures at"
            " the end of a longer one are not those of a better setting alone"
        )
    return notes


def curves_of(runs: Sequence[RunFigures]) -> list[Curves]:
    """One colour for each setting."""
    return [Curves(s.label, [run.records for run in s.runs]) for s in settings_of(runs)]


def as_json(runs: Sequence[RunFigures]) -> dict[str, Any]:
    """All of it for programs."""
    return {
        "runs": [
            {
                "name": name,
                "path": str(run.path),
                "step": run.step,
                "total_steps": run.total_steps,
                "finished": run.finished,
                "fields": {f: run.settings.get(f) for f in differing_fields(runs)},
                **run.figures,
                "notes": list(run.notes),
            }
            for name, run in zip(names_of(runs), runs, strict=True)
        ],
        "settings": [
            {
                "setting": setting.label,
                "runs": [str(run.path) for run in setting.runs],
                "mean": {name: setting.mean(name) for name in FIGURES},
                "low": {n: min(setting.values(n), default=None) for n in FIGURES},
                "high": {n: max(setting.values(n), default=None) for n in FIGURES},
            }
            for setting in settings_of(runs)
        ],
        "notes": notes_of(runs),
    }


def _text(figure: str, value: float | None) -> str:
    return ABSENT if value is None else format(value, FIGURES[figure].pattern)


def _mean_and_range(setting: Setting, figure: str) -> str:
    values = setting.values(figure)
    if len(values) < 2:
        return _text(figure, values[0] if values else None)
    low, high = _text(figure, min(values)), _text(figure, max(values))
    return f"{_text(figure, setting.mean(figure))} ({low} to {high})"
