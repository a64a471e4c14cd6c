"""Whether a change made anything slower, or worse: ratios to references of the same run.

    python benchmarks/run.py                        # all measures
    python benchmarks/run.py --quick                # three of them
    python benchmarks/run.py --only decode,pictures --turns 30
    python benchmarks/run.py --update --repeat 3    # commit what three runs gave, and their bands
    python benchmarks/run.py --compare FILE         # what an earlier --json FILE says; --update too

Ends with 1 where a ratio is worse than that of benchmarks/results.json by more than its band. A
measure that is past its band is measured once more before it counts, by the turns of both tries.
benchmarks/suite/table.py says what each measure is.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.processes import in_a_process
from benchmarks.suite import results
from benchmarks.suite.material import Material
from benchmarks.suite.table import GROUPS, MEASURES, Measure
from benchmarks.suite.turns import Taken, take
from benchmarks.suite.verdict import WORSE, Found, notes, repeated, table, verdict, verdicts
from config import Parser
from errors import PhiSightError, run_main

MOST_TURNS = 1000


def chosen(options: argparse.Namespace) -> list[str]:
    """Names of the measures that were asked for, in the table's order."""
    if options.only is None:
        return [name for name, one in MEASURES.items() if one.quick or not options.quick]
    given = options.only.split(",")
    for name in given:
        if name not in MEASURES:
            raise PhiSightError(f"--only {name}: no such measure; choose of {', '.join(MEASURES)}")
    return [name for name in MEASURES if name in given]


def measure(
    names: list[str],
    committed: Mapping[str, float],
    measures: Mapping[str, Measure],
    threads: int,
    turns: int | None,
) -> dict[str, Found]:
    """Take the turns of these measures; what is worse than committed is measured twice."""
    measured: dict[str, Found] = {}
    with tempfile.TemporaryDirectory(prefix="phisight-bench-") as folder:
        material, started = Material(Path(folder), threads), time.perf_counter()
        needs = {need for name in names for need in GROUPS[MEASURES[name].group].needs}
        asked = {"folder": folder, "threads": threads, "needs": sorted(needs)}
        in_a_process("benchmarks.suite.material", asked, threads)
        print(f"material: {time.perf_counter() - started:.1f} s", flush=True)
        for group in GROUPS.values():
            wanted = [name for name in names if MEASURES[name].group == group.name]
            if not wanted:
                continue
            taken = Taken(group)
            for attempt in (1, 2):
                take(taken, material, turns if group.turns > 1 else None)
                own = {name: taken.of(MEASURES[name]) for name in wanted}
                slow = [
                    name
                    for name, one in own.items()
                    if verdict(measures[name], one.ratio, committed.get(name)) == WORSE
                ]
                if attempt == 1 and slow and group.turns > 1:
                    print(f"{', '.join(slow)}: worse than committed; measured again", flush=True)
                    continue
                break
            measured |= own
            ratios = ", ".join(f"{name} {one.ratio:.3f}" for name, one in own.items())
            print(f"{group.name}: {taken.seconds:.1f} s; {ratios}", flush=True)
    return {name: measured[name] for name in names}


def report_of(
    measured: dict[str, Found], machine: dict[str, Any], machine_class: str, seconds: float
) -> dict[str, Any]:
    """What --json writes and --compare reads."""
    return {
        "class": machine_class,
        "machine": machine,
        "seconds": round(seconds, 1),
        "measures": {name: one.to_json() for name, one in measured.items()},
    }


def compare(
    measured: Mapping[str, Found],
    committed: Mapping[str, float],
    measures: Mapping[str, Measure],
    asked: list[str],
) -> int:
    """Print the table; 1 where a measure is worse than committed by more than its band, else 0."""
    print(table(measured, committed, measures))
    ratios = {name: one.ratio for name, one in measured.items()}
    for note in notes(ratios, committed, asked, measures):
        print(note)
    said = verdicts(ratios, committed, measures)
    worse = [name for name, word in said.items() if word == WORSE]
    if worse:
        print(f"worse than committed by more than their bands: {', '.join(worse)}")
    return 1 if worse else 0


def read_report(path: Path) -> tuple[dict[str, Found], str, dict[str, Any]]:
    """The figures, the class of machine, and the machine in a file of --json. Raises
    `PhiSightError`."""
    content = results.read_checked(path, results.REPORT, "give a file that --json wrote")
    for name in content["measures"]:
        if name not in MEASURES:
            raise PhiSightError(f"{path}: {name}: no such measure; give a file of this version")
    figures = [spec.name for spec in dataclasses.fields(Found)]
    found = {
        name: Found(**{figure: one[figure] for figure in figures})
        for name, one in content["measures"].items()
    }
    return found, content["class"], content["machine"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join(MEASURES)}")
    quick = ", ".join(name for name, one in MEASURES.items() if one.quick)
    parser.add_argument("--quick", action="store_true", help=f"only {quick}")
    parser.add_argument("--threads", type=int, default=1, help="of every process (%(default)s)")
    parser.add_argument("--turns", type=int, help="of each side (each measure has its own number)")
    parser.add_argument("--repeat", type=int, default=1, help="so often; the medians count (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--update", action="store_true", help="write what is measured to --results")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="measure nothing: compare a file of --json"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=results.FILE,
        metavar="FILE",
        help="the committed figures (%(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.threads < 1:
        raise PhiSightError("--threads: must be at least 1")
    if options.turns is not None and not 1 <= options.turns <= MOST_TURNS:
        raise PhiSightError(f"--turns: must be 1 to {MOST_TURNS}")
    if not 1 <= options.repeat <= MOST_TURNS:
        raise PhiSightError(f"--repeat: must be 1 to {MOST_TURNS}")
    for path in (options.json, options.results if options.update else None):
        if path is not None and not path.parent.is_dir():  # known before minutes are spent
            raise PhiSightError(f"{path}: there is no such folder; make it, or name another file")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    asked, known = chosen(options), results.read_results(options.results)
    started = time.perf_counter()
    if options.compare:
        measured, machine_class, machine = read_report(options.compare)
        asked = []
        committed, measures = results.committed_of(known, machine_class)
    else:
        machine = describe_machine()
        machine_class = results.class_of(machine, options.threads)
        committed, measures = results.committed_of(known, machine_class)
        print(f"{machine['processor']}; {machine_class}; load {machine['load']}", flush=True)
        if not committed:
            print("nothing is committed for this kind of machine: --update does it", flush=True)
        again = {} if options.update else committed
        runs = [
            measure(asked, again, measures, options.threads, options.turns)
            for _ in range(options.repeat)
        ]
        measured = runs[0] if len(runs) == 1 else repeated(runs)
        print(f"{(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
    if options.json:
        seconds = time.perf_counter() - started
        report = report_of(measured, machine, machine_class, seconds)
        results.write_json(options.json, report)
    code = compare(measured, committed, measures, asked)
    if options.update:
        results.update(options.results, machine_class, machine, measured)
        print(f"{options.results}: updated")
        return 0
    return code


if __name__ == "__main__":
    run_main(main)
