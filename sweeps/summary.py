"""What came of a sweep: its runs ranked by validation loss and by alignment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import PhiSightError
from evaluation.comparison import Table, as_json, names_of, notes_of, tables_of
from evaluation.run_figures import FIGURES, RunFigures
from files import write_whole
from reports.markdown import cell, escaped, table
from sweeps.children import FAILED, Outcome, figures_of

JSON, MARKDOWN = "summary.json", "summary.md"
LOSS, ALIGNMENT = "validation_loss", "alignment"


def ranked(runs: Sequence[RunFigures], figure: str) -> list[str]:
    """Names of the runs that have this figure, the best first; equal ones in their order."""
    sign = 1 if FIGURES[figure].best == "low" else -1
    known = [
        (sign * value, number, name)
        for number, (name, run) in enumerate(zip(names_of(runs), runs, strict=True))
        if (value := run.figures[figure]) is not None
    ]
    return [name for _, _, name in sorted(known)]


def alignment_of(runs: Sequence[RunFigures]) -> str:
    """The figure that ranks by alignment: of the held-out questions where every run that has one
    was asked them, else of training's own meter."""
    measured = [run for run in runs if run.figures[ALIGNMENT] is not None]
    asked = all(run.figures["held_out_alignment"] is not None for run in measured)
    return "held_out_alignment" if measured and asked else ALIGNMENT


def ranking(runs: Sequence[RunFigures]) -> Table:
    """The runs, the lowest validation loss first, each with its place by alignment; then those
    without a validation loss."""
    by = alignment_of(runs)
    by_loss, by_alignment = ranked(runs, LOSS), ranked(runs, by)
    named = dict(zip(names_of(runs), runs, strict=True))
    rows = []
    for name in [*by_loss, *(name for name in named if name not in by_loss)]:
        places = [
            str(order.index(name) + 1) if name in order else "-"
            for order in (by_loss, by_alignment)
        ]
        values = [
            "-" if (value := named[name].figures[f]) is None else format(value, FIGURES[f].pattern)
            for f in (LOSS, by)
        ]
        rows.append([places[0], name, values[0], places[1], values[1], named[name].state])
    heads = ["place by loss", "run", FIGURES[LOSS].title, "place by alignment", FIGURES[by].title]
    return Table("Runs by validation loss and by alignment", [*heads, "state"], rows)


class Summary:
    """A sweep's outcomes with the figures of its runs."""

    def __init__(self, folder: Path, outcomes: Sequence[Outcome]) -> None:
        self.folder, self.outcomes = folder, outcomes
        self.runs = [figures_of(folder, outcome) for outcome in outcomes]

    @property
    def failures(self) -> list[str]:
        return [f"{o.run.name}: {o.error}" for o in self.outcomes if o.state == FAILED]

    def tables(self) -> list[Table]:
        """The ranking, and all that `evaluate.py compare` shows."""
        return [ranking(self.runs), *tables_of(self.runs)]

    def as_json(self) -> dict[str, Any]:
        """For programs: the names by rank, then everything of every run."""
        by = alignment_of(self.runs)
        all_of_it = as_json(self.runs)
        for entry, outcome in zip(all_of_it["runs"], self.outcomes, strict=True):
            entry |= {
                "state": outcome.state,
                "error": outcome.error,
                "choices": outcome.run.choices,
            }
        return {
            "by_validation_loss": ranked(self.runs, LOSS),
            "by_alignment": ranked(self.runs, by),
            "alignment_is": by,
            **all_of_it,
        }

    def markdown(self) -> str:
        """The same as a page; all text is shown as it is."""
        parts = ["# A sweep\n"]
        if self.failures:
            lines = "\n".join(f"- {escaped(line)}" for line in self.failures)
            parts.append(f"## Failed\n\n{lines}\n")
        for one in self.tables():
            cells = [[cell(text) for text in row] for row in one.rows]
            parts.append(f"## {one.title}\n\n{table(one.heads, cells)}\n")
        if notes := notes_of(self.runs):
            parts.append("## Notes\n\n" + "\n".join(f"- {escaped(note)}" for note in notes) + "\n")
        return "\n".join(parts)

    def write(self) -> None:
        """Both files into the sweep's folder. Raises `PhiSightError` where they cannot be."""
        try:
            text = json.dumps(self.as_json(), indent=1, ensure_ascii=False)
            write_whole(self.folder / JSON, (text + "\n").encode())
            write_whole(self.folder / MARKDOWN, self.markdown().encode())
        except OSError as error:
            raise PhiSightError(
                f"{self.folder}: {error.strerror}; make room or make it writable, and run again:"
                " what is trained is kept"
            ) from error
