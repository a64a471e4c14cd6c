"""Prove resume: kill training runs again and again, and compare what comes out with a run that
was never killed, to the bit.

    python tools/torture_resume.py --kills 50 [--seed S] [--jobs J] [--json] [--out runs/torture]

Every process is a real `train.py` that gets a real SIGKILL, either from here at a random instant or
from itself at an aimed place: in the nth fsync of a save, right after the nth rename, and so on.
For the aimed ones this file starts itself as the child; see `tools/torture/kills.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import config as configs
from data.world import write_world
from errors import PhiSightError, run_main
from reports.log import TIMING, read_metrics
from tools.torture.deal import Deal, Recipe, draw_aim, left
from tools.torture.findings import differences, look_at
from tools.torture.kills import KINDS, RANDOM, Aim, train_with_trap

ROOT = Path(__file__).resolve().parent.parent
MARKER = "torture.json"  # a folder without it was not made here and is not touched
PATIENCE = 3  # kills of one run between two saves, so that all of a run is hit and not its end only
HANG_SECONDS = 600.0  # at least; a process of these runs takes seconds


@dataclass(frozen=True)
class Attempt:
    """One process of a run: the kind of kill and its aim, if it is to be killed, the seconds after
    which a random kill strikes, and more flags for it."""

    kind: str = ""
    aim: Aim | None = None
    kill_after: float | None = None
    flags: Sequence[str] = ()


@dataclass
class Run:
    """One run that was killed: how often of each kind, and what was found wrong with it."""

    folder: Path
    kinds: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Torture:
    """Everything under one folder: the picture world, the run that is never killed, the others.

    Each run has a folder of its own and works in it, so that all of them are given the very same
    flags and end with the very same config.
    """

    def __init__(self, out: Path, recipe: Recipe, deal: Deal, seed: int, jobs: int) -> None:
        self.out, self.recipe, self.deal, self.seed, self.jobs = out, recipe, deal, seed, jobs
        self.runs: list[Run] = []
        self.start_seconds = self.loop_seconds = 0.0  # of the run that is never killed
        self._processes: set[subprocess.Popen] = set()
        self._stopping = False
        self._lock = threading.Lock()

    @property
    def reference(self) -> Path:
        return self.out / "whole" / "run"

    def prepare(self) -> None:
        """Make the world and train the run that is never killed. Raises PhiSightError."""
        try:
            if self.out.exists() and any(self.out.iterdir()) and not (self.out / MARKER).exists():
                raise PhiSightError(f"{self.out}: holds other things; give a new folder with --out")
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / MARKER).write_text(
                json.dumps(dataclasses.asdict(self.recipe)) + "\n", encoding="utf-8", newline="\n"
            )
            for old in [self.out / "whole", *self.out.glob("killed-*")]:
                shutil.rmtree(old, ignore_errors=True)
            write_world_quietly(self.out / "world", self.recipe.pictures)
        except OSError as error:
            raise PhiSightError(
                f"{self.out}: {error.strerror or error}; make room, or give another"
                " folder with --out"
            ) from error
        clock = time.monotonic()
        folder = self._new_folder("whole")
        code = self._process(folder, Attempt())
        seconds = time.monotonic() - clock
        self._stop_unless(code == 0, folder, code)
        if (step := checkpoints.resolve(self.reference).step) != self.recipe.steps:
            raise PhiSightError(
                f"the run ended at step {step}, not {self.recipe.steps}; ask for more --pictures"
            )
        self.loop_seconds = sum(
            record[TIMING]["seconds"] for record in read_metrics(self.reference / "metrics.jsonl")
        )
        self.start_seconds = max(0.0, seconds - self.loop_seconds)

    def torment(self) -> None:
        """Start, kill, resume and compare runs until enough kills have happened.

        Raises PhiSightError when a process ends with anything but a SIGKILL or 0.
        """
        with ThreadPoolExecutor(self.jobs) as pool:
            workers = [pool.submit(self._work) for _ in range(self.jobs)]
            try:
                for worker in workers:
                    worker.result()
            finally:
                self.stop()

    def stop(self) -> None:
        """End every process that is still going."""
        with self._lock:
            self._stopping = True
            for process in self._processes:
                process.kill()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._stopping or not self.deal.open:
                    return
                number = len(self.runs) + 1
                run = Run(self._new_folder(f"killed-{number:04d}"))
                self.runs.append(run)
            try:
                self._live(run, random.Random(f"{self.seed}/{number}"))
            except BaseException:
                self.stop()  # the other workers wait for their processes
                raise

    def _live(self, run: Run, generator: random.Random) -> None:
        """One run from its start to its end, and whatever befalls it on the way."""
        newest: int | None = None
        finished, in_vain = False, 0
        while not finished:
            attempt = self._next_attempt(newest, in_vain, generator)
            if (
                attempt.kind == "features"
            ):  # the store that the runs share is full: nothing to write
                remove(run.folder / "features")
            code = self._process(run.folder, attempt)
            if self._stopping:
                return
            killed = code == -signal.SIGKILL and attempt.aim is not None
            self._stop_unless(code == 0 or killed, run.folder, code)
            saved = look_at(run.folder / "run", newest, run.problems, self.recipe.save_steps)
            finished = code == 0 and not attempt.flags
            if attempt.kind:
                self._count(run, attempt, killed, saved)
            in_vain = in_vain + 1 if killed and saved == newest else 0
            newest = saved
        run.problems += differences(self.reference, run.folder / "run")
        run.problems = list(dict.fromkeys(run.problems))  # what was left damaged is seen again
        verdict = "; ".join(run.problems) or "identical to the run that was never killed"
        say(f"{run.folder.name}: finished after {len(run.kinds)} kills; {verdict}")
        if not run.problems:
            shutil.rmtree(run.folder)

    def _next_attempt(self, newest: int | None, in_vain: int, generator: random.Random) -> Attempt:
        """What befalls the next process of a run whose newest checkpoint is of that step, and whose
        last `in_vain` processes were killed before they saved anything."""
        units = {kind: left(kind, self.recipe, newest) for kind in self.deal.kinds}
        possible = [kind for kind in units if units[kind]]
        # Left alone up to its next save where kills have kept it from getting there, or where
        # none can strike before there is one (a resume needs something to resume).
        if self.deal.open and (in_vain == PATIENCE or (newest is None and not possible)):
            stop = ((newest or 0) // self.recipe.save_steps + 1) * self.recipe.save_steps
            return Attempt(flags=[f"--stop-at-step={stop}"] * (stop < self.recipe.steps))
        kind = self.deal.take(possible)
        if kind is None:
            return Attempt()
        kill_after = None
        aim = draw_aim(kind, units[kind], generator)
        if kind == RANDOM:
            rest = 1 - (newest or 0) / self.recipe.steps
            kill_after = generator.uniform(0, self.start_seconds + self.loop_seconds * rest)
        return Attempt(kind, aim, kill_after)

    def _count(self, run: Run, attempt: Attempt, killed: bool, saved: int | None) -> None:
        """Tell the deal how an attempt to kill the run ended, and the person of a kill."""
        if not killed:
            self.deal.missed(attempt.kind)
            return
        self.deal.hit(attempt.kind)
        run.kinds.append(attempt.kind)
        place = "no checkpoint" if saved is None else f"step {saved} saved"
        say(f"{run.folder.name}: killed, {attempt.aim}; {place}")

    # -- processes --------------------------------------------------------------------------------

    def _new_folder(self, name: str) -> Path:
        folder = self.out / name
        folder.mkdir()
        (folder / "features").symlink_to(Path("..") / "features")  # one store for all of them
        (self.out / "features").mkdir(exist_ok=True)
        return folder

    def _flags(self) -> list[str]:
        world, recipe = self.out.resolve() / "world", self.recipe
        fields = {
            "run": "run",
            "features": "features",
            "data": world / "train.json",
            "images": world / "images",
            "base": ROOT / "assets/tiny/phi3",
            "vision": ROOT / "assets/tiny/clip",
            "max_steps": recipe.steps,
            "epochs": 8,
            "batch_size": 2,
            "validation_fraction": 0.1,
            "save_steps": recipe.save_steps,
            "log_steps": recipe.log_steps,
            "evaluate_steps": recipe.evaluate_steps,
            "evaluation_conversations": 20,
            "keep_best": "true",
            "threads": 1,
            "device": "cpu",
        }
        return [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]

    def _process(self, folder: Path, attempt: Attempt) -> int:
        """Train in `folder` until the process ends, by itself, in the trap that is set for it, or
        killed from here; its exit code."""
        aim, kill_after = attempt.aim, attempt.kill_after
        command = [str(ROOT / "train.py")]
        if aim is not None and aim.kind != RANDOM:
            command = [str(Path(__file__).resolve()), "--child", str(aim), "--"]
        limit = max(HANG_SECONDS, 20 * (self.start_seconds + self.loop_seconds))
        with (folder / "process.log").open("ab") as log:
            log.write(f"---- {aim or 'undisturbed'}\n".encode())
            log.flush()
            with self._lock:
                if self._stopping:
                    return -signal.SIGKILL
                process = subprocess.Popen(
                    [sys.executable, *command, *self._flags(), "--resume-if-any", *attempt.flags],
                    cwd=folder,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                )
                self._processes.add(process)
        try:
            return process.wait(limit if kill_after is None else kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
            self._stop_unless(kill_after is not None, folder, f"no end within {limit:.0f} s")
            return code
        finally:
            with self._lock:
                process.kill()  # where waiting was interrupted; nothing once it has ended
                self._processes.discard(process)

    def _stop_unless(self, good: bool, folder: Path, code: int | str) -> None:
        if not good:
            log = folder / "process.log"
            print(log.read_text(errors="replace", encoding="utf-8"), file=sys.stderr)
            raise PhiSightError(
                f"{folder}: a training process ended with {code}; its output is above and in {log}"
            )


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, or only the link where it is one."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def write_world_quietly(folder: Path, pictures: int) -> None:
    """The picture world, without a word on stdout: that is kept for the result."""
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        write_world(folder, pictures=pictures, held_out=1)
    finally:
        sys.stdout = stdout


def say(line: str) -> None:
    """To the person who watches; stdout is kept for the result."""
    print(line, file=sys.stderr, flush=True)


# -- the command ----------------------------------------------------------------------------------


def summarise(runs: Sequence[Run], kinds: Collection[str], seconds: float) -> dict[str, Any]:
    """What `--json` prints. A kill is identical when the run that it hit ended identical."""
    by_kind = {
        kind: {
            "kills": sum(run.kinds.count(kind) for run in runs),
            "identical": sum(run.kinds.count(kind) for run in runs if not run.problems),
        }
        for kind in kinds
    }
    return {
        "kills": sum(row["kills"] for row in by_kind.values()),
        "identical": sum(row["identical"] for row in by_kind.values()),
        "runs": len(runs),
        "by_kind": by_kind,
        "seconds": round(seconds, 1),
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{'kind':<12}{'kills':>7}{'identical':>11}")
    for kind, row in result["by_kind"].items():
        print(f"{kind:<12}{row['kills']:>7}{row['identical']:>11}")
    print(
        f"{result['identical']} of {result['kills']} kills, in {result['runs']} runs, ended "
        f"identical to the run that was never killed; {result['seconds']:.0f} s"
    )


def names(text: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in chosen if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(KINDS)}")
    return chosen


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises PhiSightError."""
    parser = configs.Parser(prog="torture_resume.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="kills to make (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of what strikes when (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--kinds", type=names, default=KINDS, help=f"kinds of kills (default: {','.join(KINDS)})"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=Recipe.steps,
        help=f"optimiser steps a run (default: {Recipe.steps})",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=Recipe.pictures,
        help=f"pictures of the world (default: {Recipe.pictures})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/torture"),
        help="folder for all of it (default: runs/torture)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", type=Aim.parse, default=None, help=argparse.SUPPRESS)
    parser.add_argument("train_arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.train_arguments and options.child is None:
        parser.error(f"unrecognized arguments: {options.train_arguments[0]}")
    for name, least in (("kills", 1), ("jobs", 1), ("steps", 2), ("pictures", 10)):
        if getattr(options, name) < least:
            raise PhiSightError(f"--{name} {getattr(options, name)}: must be at least {least}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 when a run did not end identical; 2 on errors."""
    options = parse(arguments)
    if options.child is not None:
        return train_with_trap(options.child, options.train_arguments)
    clock = time.monotonic()
    deal = Deal(options.kills, options.kinds, options.seed)
    torture = Torture(
        options.out, Recipe(options.steps, options.pictures), deal, options.seed, options.jobs
    )
    torture.prepare()
    torture.torment()
    result = summarise(torture.runs, options.kinds, time.monotonic() - clock)
    if options.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return (
        0
        if result["identical"] == result["kills"] and not any(run.problems for run in torture.runs)
        else 1
    )


if __name__ == "__main__":
    run_main(main)
