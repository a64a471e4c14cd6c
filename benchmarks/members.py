"""Every base with every encoder and every projector: trained, killed, resumed, merged and asked.

    python -m benchmarks.members --out runs/members                  # all cells, two at a time
    python -m benchmarks.members --base qwen3 --encoder siglip       # some of them
    python -m benchmarks.members --cells 12                          # so many, spread over all
    python -m benchmarks.members --sizes                             # the lines of each member

The members have small random weights. Each cell trains 20 steps (NF4, LoRA with dropout, stored
features); a second run of it gets a SIGKILL at a drawn step and resumes, and every tensor of its
checkpoints and every record of its log has to be equal to the bit. That run is merged within its
certificate, and the merged folder has to answer a question about a picture as the run does.

A cell that was done is not done again. Prints a line for each; writes members.json and members.md
to `--out`. The exit code is 1 where a cell failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import threads  # noqa: F401 (before torch is loaded)

from benchmarks.cells import ENCODERS, ROOT, Cell, Grid, Outcome, all_cells
from benchmarks.machine import describe_machine
from config import PROJECTORS, Parser
from data.chat_forms import FORMS
from errors import PhiSightError, run_main
from files import write_whole
from model import encoders, families, projectors
from reports.markdown import table
from tools.small.bases import BASES


def chosen(cells: Sequence[Cell], count: int) -> list[Cell]:
    """`count` cells, among which every base, encoder and projector comes as evenly as can be: by a
    diagonal through the table, then the one beside it. All for 0."""
    rooms = [list(dict.fromkeys(names)) for names in zip(*map(members, cells), strict=True)]

    def diagonal(cell: Cell) -> tuple[int, ...]:
        base, encoder, projector = (r.index(n) for r, n in zip(rooms, members(cell), strict=True))
        _, encoders, projectors = map(len, rooms)
        # One step more at each turn, so that not every encoder comes with one projector alone.
        turned = (projector - base - base // projectors) % projectors
        return turned, (encoder - base) % encoders, base

    return sorted(cells, key=diagonal)[: count or len(cells)]


def members(cell: Cell) -> tuple[str, str, str]:
    return cell.base, cell.encoder, cell.projector


def markdown(outcomes: Iterable[Outcome]) -> str:
    """A row for each base and encoder, a column for each projector: what was seen there."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for outcome in outcomes:
        cell = outcome.cell
        rows.setdefault((cell.base, cell.encoder), {})[cell.projector] = told(outcome)
    names = [name for name in PROJECTORS if any(name in cells for cells in rows.values())]
    return table(
        ["base", "encoder", *names],
        [[*members, *(cells.get(n, "") for n in names)] for members, cells in rows.items()],
    )


def told(outcome: Outcome) -> str:
    """A cell of the table."""
    if outcome.problems:
        return "failed: " + "; ".join(outcome.problems).replace("|", "/")
    place, _, step = outcome.killed.rpartition(":")
    before, after = outcome.loss
    return (
        f"{outcome.picture_tokens}; {place.removeprefix('step/')} {step}, {outcome.resumed_from};"
        f" {after - before:+.0e}"
    )


# -- the size of each member ----------------------------------------------------------------------

ROOMS: dict[str, tuple[Any, Collection[Any]]] = {
    "base": (families, families.FAMILIES.values()),
    "chat form": (importlib.import_module("data.chat_forms"), FORMS),
    "encoder": (encoders, encoders.ENCODERS.values()),
    "projector": (projectors, projectors.PROJECTORS.values()),
}
"""kind -> the package, and what its table holds"""


def sizes() -> str:
    """The lines of each file that holds a member, and of all that is shared beside them."""
    rows = []
    for kind, (package, held) in ROOMS.items():
        shared = 0
        for name, path, lines in files_of(package):
            module = importlib.import_module(name)
            own = any(value is member for value in vars(module).values() for member in held)
            if own and path.name != "__init__.py":
                rows.append([kind, f"`{path.resolve().relative_to(ROOT)}`", str(lines)])
            else:
                shared += lines
        folder = Path(package.__file__).resolve().parent.relative_to(ROOT)
        rows.append([kind, f"shared by all, in `{folder}/`", str(shared)])
    return table(["member", "file", "lines"], rows)


def files_of(package: Any) -> list[tuple[str, Path, int]]:
    """The modules of a package by name, with their files and the lines of these."""
    paths = [(package.__name__, Path(package.__file__))]
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        folder = Path(package.__file__).parent
        paths.append((found.name, folder / f"{found.name.rpartition('.')[2]}.py"))
    return [(n, p, len(p.read_text(encoding="utf-8").splitlines())) for n, p in paths]


# -- the command ----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.sizes:
        print(sizes())
        return 0
    asked = (options.base, options.encoder, options.projector)
    cells = [
        cell
        for cell in all_cells()
        if all(want in (None, name) for want, name in zip(asked, members(cell), strict=True))
    ]
    cells = chosen(cells, options.cells)
    grid, clock, outcomes = Grid(options.out, options.seed), time.monotonic(), []
    grid.prepare(cells)
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            for outcome in pool.map(grid.outcome, cells):
                outcomes.append(outcome)
                print(f"{len(outcomes)} of {len(cells)}: {line_of(outcome)}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return finish(options.out, outcomes, time.monotonic() - clock)


def line_of(outcome: Outcome) -> str:
    """What is said of a cell when it is done."""
    if outcome.problems:
        return f"{outcome.cell}: FAILED: {'; '.join(outcome.problems)}"
    return (
        f"{outcome.cell}: killed {outcome.killed}, resumed from {outcome.resumed_from}, identical;"
        f" merged {outcome.loss[0]:.4f} -> {outcome.loss[1]:.4f}; answered; {outcome.seconds:g} s"
    )


def finish(out: Path, outcomes: Sequence[Outcome], seconds: float) -> int:
    """Write what was seen, say how many cells were right; the exit code."""
    order = {cell: number for number, cell in enumerate(all_cells())}
    outcomes = sorted(outcomes, key=lambda outcome: order[outcome.cell])
    right = sum(not outcome.problems for outcome in outcomes)
    total = f"{right} of {len(outcomes)} cells are right; {seconds:.0f} s"
    found = {
        "machine": describe_machine(),
        "right": right,
        "cells": [asdict(outcome) for outcome in outcomes],
    }
    write_whole(out / "members.json", (json.dumps(found, indent=1) + "\n").encode())
    write_whole(out / "members.md", f"{markdown(outcomes)}\n\n{total}\n".encode())
    print(total)
    return 0 if right == len(outcomes) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises PhiSightError."""
    parser = Parser(prog="benchmarks.members", description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=BASES, help="cells of this base alone")
    parser.add_argument("--encoder", choices=ENCODERS, help="cells of this encoder alone")
    parser.add_argument("--projector", choices=PROJECTORS, help="cells of this projector alone")
    parser.add_argument("--cells", type=int, default=0, help="so many, spread over all (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the kills (0)")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time (2)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/members"), help="folder (%(default)s)"
    )
    parser.add_argument("--sizes", action="store_true", help="print the lines of each member")
    options = parser.parse_args(arguments)
    for name, least in (("cells", 0), ("jobs", 1)):
        if getattr(options, name) < least:
            raise PhiSightError(f"--{name} {getattr(options, name)}: must be at least {least}")
    return options


if __name__ == "__main__":
    run_main(main)
