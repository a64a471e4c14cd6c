"""The runs of a sweep as processes: `train.py` for each, and `evaluate.py` afterwards if wanted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import config as configs
from checkpoints import checkpoints_in
from errors import PhiSightError, printable
from evaluation.run_figures import RunFigures, keep_evaluation, read_run
from files import write_whole
from paths import PROJECT
from sweeps.plan import PlannedRun
from system.processes import apart, interrupt
from training.config_file import toml_lines
from training.signals import StopSignals

FINISHED, STOPPED, FAILED, WAITING = "finished", "stopped", "failed", "not begun"
TAIL = 4096  # bytes of a log in which the error is looked for


@dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    run: PlannedRun
    state: str = WAITING
    error: str = ""
    """one line: why it failed"""
    was_finished: bool = False
    """whether nothing had to be trained"""


class Sweep:
    """A folder with the runs of a plan: RUN/, RUN.toml, which it was started with, and RUN.log.

    Args:
        jobs: how many processes run at once; the machine's cores are shared among them.
        evaluate: whether `evaluate.py` is asked about every finished run.
        say: is told a line whenever a run ends.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int = 1,
        evaluate: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.jobs, self.evaluate, self.say = folder, jobs, evaluate, say
        self.share = max(1, (os.cpu_count() or 1) // jobs)  # threads of one process
        self._lock = threading.Lock()  # of the two below
        self._children: set[subprocess.Popen] = set()
        self._stopping = False

    def run(self, runs: Sequence[PlannedRun]) -> tuple[list[Outcome], bool]:
        """Train what is not finished; what became of each run, and whether all of it was asked to
        stop. SIGINT and SIGTERM save and stop every run; a second SIGINT stops them at once.

        Raises:
            PhiSightError: the sweep's folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for one in runs:
                write_whole(self.folder / f"{one.name}.toml", self._config_file(one))
        except OSError as error:
            raise PhiSightError(
                f"{self.folder}: {error.strerror}; make it writable, or name another --folder"
            ) from error
        outcomes = {one.name: Outcome(one) for one in runs}
        with StopSignals() as stop, ThreadPoolExecutor(self.jobs, "sweep") as pool:
            waiting = {pool.submit(self._one, one) for one in runs}
            while waiting:
                done, waiting = self._next(waiting, stop)
                for future in done:
                    outcome = future.result()
                    outcomes[outcome.run.name] = outcome
                    if outcome.state != WAITING:
                        ended = sum(o.state != WAITING for o in outcomes.values())
                        self.say(f"[{ended}/{len(runs)}] {told(outcome)}")
            stopped = stop.requested
        return list(outcomes.values()), stopped

    def _next(self, waiting: set[Future], stop: StopSignals) -> tuple[set[Future], set[Future]]:
        """Those that ended, and the rest; a signal is passed on to the processes meanwhile."""
        while True:
            try:
                done, rest = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                if stop.requested and not self._stopping:
                    self.say("stopping: every run saves where it stands")
                    self._interrupt()
                if done:
                    return done, rest
            except KeyboardInterrupt:  # the second one
                self._interrupt()

    def _interrupt(self) -> None:
        with self._lock:
            again, self._stopping = self._stopping, True
            for child in self._children:
                interrupt(child, again)

    # -- one run, in a thread of the pool ---------------------------------------------------------

    def _one(self, run: PlannedRun) -> Outcome:
        folder = self.folder / run.name
        try:
            was_finished = is_finished(folder, run)
            if not was_finished:
                failed = self._train(run, folder)
                if failed and not self._stopping:
                    return Outcome(run, FAILED, failed)
                if not checkpoints_in(folder):
                    return Outcome(run, WAITING)
                if not read_run(folder).finished:
                    return Outcome(run, STOPPED)
            if self.evaluate and not self._stopping and not read_run(folder).evaluation:
                if failed := self._evaluate(run, folder):
                    return Outcome(run, FAILED, failed, was_finished)
            return Outcome(run, FINISHED, was_finished=was_finished)
        except (PhiSightError, OSError) as error:
            return Outcome(run, FAILED, printable(error))

    def _config_file(self, run: PlannedRun) -> bytes:
        lines = toml_lines({"preset": run.preset} | _plain(run))
        return f"# One run of a sweep.\n{lines}".encode()

    def _train(self, run: PlannedRun, folder: Path) -> str:
        """Train or go on; why that failed, or empty."""
        arguments = ["--config", f"{folder}.toml", "--run", str(folder), "--resume-if-any"]
        # One that goes on has its number of threads in its checkpoint: its results depend on it.
        if self.jobs > 1 and "threads" not in run.fields and not checkpoints_in(folder):
            arguments += ["--threads", str(self.share)]
        log = self.folder / f"{run.name}.log"
        with log.open("wb") as output:
            code, _ = self._child("train.py", arguments, output)
        return why_ended("train.py", code, log)

    def _evaluate(self, run: PlannedRun, folder: Path) -> str:
        """Ask the questions; why that failed, or empty."""
        log = self.folder / f"{run.name}.evaluation.log"
        with log.open("wb") as output:
            code, printed = self._child(
                "evaluate.py", ["--run", str(folder), "--json"], output, is_read=True
            )
        if self._stopping:
            return ""
        if failed := why_ended("evaluate.py", code, log):
            return failed
        keep_evaluation(folder, printed)
        return ""

    def _child(
        self, program: str, arguments: Sequence[str], output: BinaryIO, is_read: bool = False
    ) -> tuple[int, bytes]:
        """Run a command to its end: its exit code, and what it printed where that `is_read`; what
        else it says goes to `output`. Once all is to stop, nothing is begun."""
        environment = dict(os.environ)
        if self.jobs > 1:  # torch's threads of what trains are told by --threads too
            environment.setdefault("OMP_NUM_THREADS", str(self.share))
        with self._lock:
            if self._stopping:
                return 0, b""
            # A group of its own: Ctrl-C in a terminal comes to this process, which passes it on.
            child = subprocess.Popen(
                [sys.executable, str(PROJECT / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if is_read else output,
                stderr=output if is_read else subprocess.STDOUT,
                env=environment,
                **apart(session=False),
            )
            self._children.add(child)
        try:
            printed, _ = child.communicate()
        finally:
            with self._lock:
                self._children.discard(child)
        return child.returncode, printed or b""


def _plain(run: PlannedRun) -> dict[str, Any]:
    return {n: list(v) if isinstance(v, tuple) else v for n, v in run.fields.items()}


def is_finished(folder: Path, run: PlannedRun) -> bool:
    """Whether a finished run lies there and is the one that is planned, also in the fields that the
    file leaves to the preset. One with others is not: `train.py` says then what differs."""
    if not checkpoints_in(folder):
        return False
    found = read_run(folder)
    if not found.finished or found.config is None:
        return False
    planned = configs.replace(configs.default_config(run.preset), **run.fields)
    # These say where things lie and how they are computed, not what the run is.
    free = {*configs.fields_without_effect(), *configs.fields_known_by_facts(), "threads"}
    return all(
        getattr(found.config, name) == getattr(planned, name)
        for name in configs.FIELDS
        if name in run.fields or name not in free
    )


def why_ended(program: str, code: int, log: Path) -> str:
    """The one line of a command that did not end well, or empty."""
    if code == 0:
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return printable(errors[-1].removeprefix("error: "), 500)
    how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return printable(f"{program} {how}; see {log}: {last}", 500)


def told(outcome: Outcome) -> str:
    """One line for people."""
    name = outcome.run.name
    if outcome.state == FAILED:
        return f"{name}: failed: {outcome.error}"
    if outcome.was_finished:
        return f"{name}: finished before"
    return f"{name}: {outcome.state}"


def figures_of(folder: Path, outcome: Outcome) -> RunFigures:
    """What the run's folder says, or nothing where there is no run."""
    path = folder / outcome.run.name
    try:
        return read_run(path)
    except PhiSightError:
        return RunFigures(path)
