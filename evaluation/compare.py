"""`python evaluate.py compare RUN RUN ...`: tables on the terminal, a picture and a page.

python evaluate.py compare runs/first runs/second
python evaluate.py compare runs/sweep/*/ --out runs/sweep     # every run of a sweep
python evaluate.py compare runs/first runs/second --json
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path

import config as configs
from errors import PhiSightError, printable
from evaluation.comparison import Table, as_json, curves_of, notes_of, tables_of
from evaluation.pages import rendered
from evaluation.run_figures import RunFigures, read_run
from files import write_whole
from paths import located
from reports.overlay import draw_overlay

PICTURE, PAGE = "comparison.png", "comparison.html"
MOST_RUNS = 200
SHOWN = 300  # characters of a cell


def main(arguments: list[str]) -> int:
    """Compare the runs that are named. Raises `PhiSightError` for one that is not there."""
    parser = configs.Parser(prog="evaluate.py compare", description="Several runs side by side.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that train.py wrote to")
    parser.add_argument(
        "--out",
        default=located("runs/comparison"),
        help=f"folder for {PICTURE} and {PAGE} (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(arguments)
    runs = read_runs(options.runs)
    write_comparison(runs, Path(options.out))
    if options.json:
        print(json.dumps(as_json(runs)))
        return 0
    for table in tables_of(runs):
        print(f"{table.title}\n\n{text_of(table)}\n")
    for note in notes_of(runs):
        print(f"note: {printable(note)}")
    print(f"curves in {Path(options.out) / PICTURE}, all of it in {Path(options.out) / PAGE}")
    return 0


def read_runs(names: Sequence[str]) -> list[RunFigures]:
    """Each run once, in the order in which they are named."""
    paths = list({os.path.realpath(name): Path(name) for name in names}.values())
    if len(paths) > MOST_RUNS:
        raise PhiSightError(f"compare: {len(paths)} runs; name at most {MOST_RUNS}")
    return [read_run(path) for path in paths]


def write_comparison(runs: Sequence[RunFigures], out: Path) -> None:
    """The picture and the page, whole or not at all."""
    draw_overlay(curves_of(runs), out / PICTURE)
    try:
        write_whole(out / PAGE, page_of(runs, (out / PICTURE).read_bytes()).encode())
    except OSError as error:
        raise PhiSightError(
            f"{out / PAGE}: {error.strerror}; name a writable folder with --out"
        ) from error


def page_of(runs: Sequence[RunFigures], picture: bytes) -> str:
    """One HTML file that needs no other: tables, notes and the picture. All text is escaped."""
    return rendered(
        "compare_page.html",
        title="Runs side by side",
        count=len(runs),
        notes=[printable(note) for note in notes_of(runs)],
        tables=[shown(table) for table in tables_of(runs)],
        curves=base64.b64encode(picture).decode(),
    )


def shown(table: Table) -> Table:
    """The table with every cell on one line and of a length that can be read."""
    return Table(
        table.title,
        [printable(head, SHOWN) for head in table.heads],
        [[printable(cell, SHOWN) for cell in row] for row in table.rows],
    )


def text_of(table: Table) -> str:
    """Columns of one width each, for a terminal."""
    table = shown(table)
    lines = [table.heads, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
