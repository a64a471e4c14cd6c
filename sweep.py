"""Train every combination of some settings, each as a run of its own, and rank what came of them.

    python sweep.py sweep.toml                 # into runs/sweep, named after the file
    python sweep.py sweep.toml --jobs 2        # two runs at once, which share the cores
    python sweep.py sweep.toml --list          # the runs that it stands for; nothing is trained

The file is explained in sweeps/plan.py. The same command again goes on where it was stopped and
trains nothing that is finished.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import threads  # noqa: F401 (before torch is loaded)

import config as configs
from errors import INTERRUPTED, PhiSightError, SurvivingOutput, run_main
from evaluation.compare import text_of, write_comparison
from paths import located
from sweeps.children import FINISHED, Sweep
from sweeps.plan import PlannedRun, read_sweep
from sweeps.summary import MARKDOWN, Summary
from training.lock import RunLock

MOST_JOBS = 256


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = configs.Parser(prog="sweep.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="TOML: [run] with fixed fields, [sweep] with lists")
    parser.add_argument("--folder", help="where its runs are kept (runs/NAME of the file)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
    parser.add_argument(
        "--evaluate", action="store_true", help="ask every finished run the held-out questions"
    )
    parser.add_argument("--list", action="store_true", help="print the runs, and train nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(arguments)
    if not 1 <= options.jobs <= MOST_JOBS:
        raise PhiSightError(f"--jobs {options.jobs}: must be from 1 to {MOST_JOBS}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 where all runs are finished, 1 where one is not."""
    options = parse(arguments)
    runs = read_sweep(options.file)
    folder = Path(options.folder or located(f"runs/{Path(options.file).stem or 'sweep'}"))
    if options.list:
        print_plan(runs, options.json)
        return 0

    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    with RunLock(folder, "--folder"):  # one sweep in a folder, as one training in a run
        outcomes, stopped = Sweep(folder, options.jobs, options.evaluate, say).run(runs)
        summary = Summary(folder, outcomes)
        summary.write()
        write_comparison(summary.runs, folder)
    if options.json:
        print(json.dumps(summary.as_json()))
    else:
        print("\n" + "\n\n".join(f"{one.title}\n\n{text_of(one)}" for one in summary.tables()[:1]))
        print(f"\nall of it in {folder / MARKDOWN}, curves in {folder / 'comparison.html'}")
    for line in summary.failures:
        print(f"error: {line}", file=sys.stderr)
    if stopped:
        print("interrupted: the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    return 0 if all(outcome.state == FINISHED for outcome in outcomes) else 1


def print_plan(runs: list[PlannedRun], as_json: bool) -> None:
    """The runs by name, as lines or as one JSON object."""
    if as_json:
        print(json.dumps({"runs": [{"name": r.name, "choices": r.choices} for r in runs]}))
        return
    for run in runs:
        print(run.name)
    print(f"{len(runs)} runs")


if __name__ == "__main__":
    sys.stdout = SurvivingOutput(sys.stdout)  # runs go on where nobody reads what is told of them
    run_main(main)
