"""Prove resume: kill training runs again and again, and compare what comes out with a run that
was never killed, to the bit.

    python tools/torture_resume.py --kills 50 [--seed S] [--jobs J] [--json] [--out runs/torture]

Every process is a real `train.py` that gets a real SIGKILL, either from here at a random instant or
from itself at an aimed place: in the nth fsync of a save, right after the nth rename, and so on.
For the aimed ones this file starts itself as the child, wraps the function in question and calls
`train.main`; the code that is trained with knows nothing of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoints  # noqa: E402
import config as configs  # noqa: E402
from data.world import write_world  # noqa: E402
from errors import PhiSightError, run_main  # noqa: E402
from reports.log import TIMING, deterministic_part, read_metrics  # noqa: E402

MARKER = "torture.json"  # a folder without it was not made here and is not touched
MISSES = 10  # attempts of one kind in a row that ended before their place: then it is never reached
PATIENCE = 3  # kills of one run between two saves, so that all of a run is hit and not its end only
HANG_SECONDS = 600.0  # at least; a process of these runs takes seconds


# -- where kills strike ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Before or after a call of `function`, "module:name"; with `inside`, a call made while that
    one is under way. `calls`: at least so many are made in each unit that `left` counts."""

    function: str
    moment: str
    inside: str = ""
    calls: int = 1


_ADD = "data.features:FeatureStore.add"
_LOAD = "checkpoints:load"
_VERIFY = "checkpoints:verify"

# Only functions of the standard library and public ones of ours are named, so that the inside of a
# save may change. The counts of calls are lower bounds: a call that never comes kills nobody.
PLACES: dict[str, dict[str, Place]] = {
    "step": {
        "forward": Place("model.projector:ImageProjector.forward", "after", "train:train_step"),
        "backward": Place("torch:Tensor.backward", "after"),
        "before-update": Place("optim:AdamW.step", "before"),
        "after-update": Place("optim:AdamW.step", "after"),
    },
    "save": {
        "fsync": Place("os:fsync", "before", calls=10),
        "tensors": Place("safetensors.torch:save_file", "after", calls=4),
    },
    "verify": {
        "start": Place(_VERIFY, "before"),
        "middle": Place("hashlib:sha256", "before", _VERIFY, calls=100),  # one a tensor
        "end": Place(_VERIFY, "after"),
    },
    "rename": {
        "before": Place("os:replace", "before"),
        "after": Place("os:replace", "after"),
    },
    "prune": {
        "before": Place("shutil:rmtree", "before"),
        "middle": Place("os:unlink", "after", "shutil:rmtree", calls=7),  # one a file
        "after": Place("shutil:rmtree", "after"),
    },
    "evaluation": {
        "middle": Place("meter:packed_batches", "after", "meter:evaluate", calls=2),
        "after": Place("meter:evaluate", "after"),
    },
    "features": {
        "tower": Place("model.vision:VisionTower.__call__", "after", _ADD),
        "shard": Place("safetensors.torch:save_file", "after", _ADD),
        "before-rename": Place("os:replace", "before", _ADD),
        "after-rename": Place("os:replace", "after", _ADD),
    },
    "resume": {
        "load": Place("hashlib:sha256", "before", _LOAD, calls=100),
        "generators": Place("resume.rng:set_rng_state", "after"),
        "before-log": Place("metrics:MetricsLog.truncate_to", "before"),
        "after-log": Place("metrics:MetricsLog.truncate_to", "after"),
    },
}
RANDOM = "random"
KINDS = (RANDOM, *PLACES)
# What these functions do before the first step is no save: a shard, the quarantine file, a load.
AFTER_THE_FIRST_STEP = ("save", "verify", "rename", "prune")


@dataclass(frozen=True)
class Aim:
    """One kill to come: its kind, and unless that is random the place and the number of the call.
    As text, `save/fsync:7`."""

    kind: str
    place: str = ""
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind}/{self.place}:{self.number}" if self.place else self.kind

    @classmethod
    def parse(cls, text: str) -> Aim:
        """The inverse of `str`. Raises PhiSightError."""
        names, _, number = text.partition(":")
        kind, _, place = names.partition("/")
        if place not in PLACES.get(kind, {}) or not number.isdecimal() or int(number) < 1:
            raise PhiSightError(f"--child {text}: not KIND/PLACE:NUMBER; see {Path(__file__).name}")
        return cls(kind, place, int(number))


# -- the child ------------------------------------------------------------------------------------


class Trap:
    """Ends this process, as a kill from outside does, at the `number`-th call that counts; calls
    may come from any thread."""

    def __init__(self, number: int, armed: bool) -> None:
        self.left, self.armed = number, armed
        self._lock = threading.Lock()

    def arm(self) -> None:
        self.armed = True

    def count(self) -> None:
        with self._lock:
            self.left -= self.armed
            if self.armed and self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def nothing() -> None:
    pass


def wrap(
    function: str, before: Callable[[], None] = nothing, after: Callable[[], None] = nothing
) -> None:
    """Call `before` and `after` around every call of "module:name" or "module:Class.name"."""
    module_name, _, path = function.partition(":")
    *classes, name = path.split(".")
    module = importlib.import_module(module_name)
    owner: Any = functools.reduce(getattr, classes, module)
    original = getattr(owner, name)
    removes = original is shutil.rmtree

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        # A save also removes, to be sure, the folder that it has just renamed: that is no removal.
        if removes and not Path(arguments[0]).is_dir():
            return original(*arguments, **named)
        before()
        try:
            return original(*arguments, **named)
        finally:
            after()

    setattr(owner, name, wrapped)
    if inspect.isclass(owner):
        return
    for other in list(sys.modules.values()):  # `from safetensors.torch import save_file`
        if str(getattr(other, "__file__", None) or "").startswith(f"{ROOT}{os.sep}"):
            for alias, value in list(vars(other).items()):
                if value is original:
                    setattr(other, alias, wrapped)


def set_trap(aim: Aim) -> None:
    """Wrap what the aim names, so that this process ends there."""
    place = PLACES[aim.kind][aim.place]
    after_first_step = aim.kind in AFTER_THE_FIRST_STEP
    trap = Trap(aim.number, armed=not after_first_step)
    if after_first_step:
        wrap("optim:AdamW.step", after=trap.arm)
    depth = 0 if place.inside else 1  # of calls of the outer function, in whichever thread

    def enter() -> None:
        nonlocal depth
        depth += 1

    def leave() -> None:
        nonlocal depth
        depth -= 1

    def count() -> None:
        if depth:
            trap.count()

    if place.inside:
        wrap(place.inside, enter, leave)
    wrap(place.function, **{place.moment: count})


def train_with_trap(aim: Aim, arguments: Sequence[str]) -> int:
    """What the child does: `train.py ARGUMENTS`, killed where the aim says."""
    import train  # here: the parent does not train

    set_trap(aim)
    return train.main(list(arguments))


# -- which kill is next ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How long the runs are; what happens every so many steps follows from it."""

    steps: int = 24
    pictures: int = 60

    @property
    def save_steps(self) -> int:
        return max(1, self.steps // 6)

    @property
    def log_steps(self) -> int:
        return max(1, self.steps // 12)

    @property
    def evaluate_steps(self) -> int:
        return max(1, self.steps // 3)


def left(kind: str, recipe: Recipe, newest: int | None) -> int:
    """How many steps, saves, removals, evaluations … of a kind a run has before it, that resumes
    at the step `newest`, or starts if that is None. 0: the kind cannot strike."""
    start = newest or 0

    def every(steps: int) -> int:
        return sum(
            step % steps == 0 or step == recipe.steps for step in range(start + 1, recipe.steps + 1)
        )

    if start >= recipe.steps:
        return 0
    if kind == "step":
        return recipe.steps - start
    if kind in ("save", "verify", "rename"):
        return every(recipe.save_steps)
    if kind == "prune":  # the first save finds nothing to remove
        return every(recipe.save_steps) - (newest is None)
    if kind == "evaluation":
        return every(recipe.evaluate_steps)
    if kind == "resume":
        return int(newest is not None)
    return 1


def draw_aim(kind: str, units: int, generator: random.Random) -> Aim:
    """A place of the kind and the number of the call there, within the units that are left."""
    if kind == RANDOM:
        return Aim(kind)
    place = generator.choice(sorted(PLACES[kind]))
    return Aim(kind, place, generator.randint(1, units * PLACES[kind][place].calls))


class Deal:
    """Gives out kinds so that each gets a fair share: all of them in a random order, then again.
    May be asked from several threads."""

    def __init__(self, kills: int, kinds: Collection[str], seed: int) -> None:
        self.wanted, self.kinds = kills, tuple(kinds)
        self.kills = dict.fromkeys(self.kinds, 0)
        self._out, self._misses = 0, dict.fromkeys(self.kinds, 0)
        self._waiting: list[str] = []
        self._generator = random.Random(f"{seed}/kinds")
        self._lock = threading.Lock()

    @property
    def open(self) -> bool:
        """Whether more kills are wanted than were made and are on their way."""
        return sum(self.kills.values()) + self._out < self.wanted

    def take(self, possible: Collection[str]) -> str | None:
        """The next kind among the possible ones, or None: enough kills, or none is possible. Tell
        of its end with `hit` or `missed`."""
        with self._lock:
            if not self.open or not set(possible) & set(self.kinds):
                return None
            while not set(possible) & set(self._waiting):
                self._waiting += self._generator.sample(self.kinds, len(self.kinds))
            kind = next(kind for kind in self._waiting if kind in possible)
            self._waiting.remove(kind)
            self._out += 1
            return kind

    def hit(self, kind: str) -> None:
        with self._lock:
            self._out -= 1
            self.kills[kind] += 1
            self._misses[kind] = 0

    def missed(self, kind: str) -> None:
        """The process ended by itself. Raises PhiSightError where that is no chance any more."""
        with self._lock:
            self._out -= 1
            self._waiting.insert(0, kind)
            self._misses[kind] += 1
            if self._misses[kind] >= MISSES:
                raise PhiSightError(
                    f"kind {kind}: {MISSES} processes in a row ended before it "
                    "struck; the functions that it waits for are not called"
                )


# -- the torture ----------------------------------------------------------------------------------


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
            (self.out / MARKER).write_text(json.dumps(dataclasses.asdict(self.recipe)) + "\n")
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
        code = self._process(folder, None, [])
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
            units = {kind: left(kind, self.recipe, newest) for kind in self.deal.kinds}
            possible = [kind for kind in units if units[kind]]
            # Left alone up to its next save where kills have kept it from getting there, or where
            # none can strike before there is one (a resume needs something to resume).
            alone = self.deal.open and (in_vain == PATIENCE or (newest is None and not possible))
            kind = None if alone else self.deal.take(possible)
            aim = draw_aim(kind, units[kind], generator) if kind else None
            stop = ((newest or 0) // self.recipe.save_steps + 1) * self.recipe.save_steps
            more = [f"--stop-at-step={stop}"] if alone and stop < self.recipe.steps else []
            kill_after = None
            if kind == RANDOM:
                rest = 1 - (newest or 0) / self.recipe.steps
                kill_after = generator.uniform(0, self.start_seconds + self.loop_seconds * rest)
            if kind == "features":  # the store that the runs share is full: nothing to write
                remove(run.folder / "features")
            code = self._process(run.folder, aim, more, kill_after)
            if self._stopping:
                return
            self._stop_unless(
                code == 0 or (code == -signal.SIGKILL and aim is not None), run.folder, code
            )
            found = look_at(run.folder / "run", newest, run.problems, self.recipe.save_steps)
            finished = code == 0 and not more
            if code:
                self.deal.hit(kind)
                run.kinds.append(kind)
                place = "no checkpoint" if found is None else f"step {found} saved"
                print(f"{run.folder.name}: killed, {aim}; {place}", file=sys.stderr, flush=True)
            elif kind:
                self.deal.missed(kind)
            in_vain = in_vain + 1 if code and found == newest else 0
            newest = found
        run.problems += differences(self.reference, run.folder / "run")
        run.problems = list(dict.fromkeys(run.problems))  # what was left damaged is seen again
        verdict = "; ".join(run.problems) or "identical to the run that was never killed"
        print(
            f"{run.folder.name}: finished after {len(run.kinds)} kills; {verdict}",
            file=sys.stderr,
            flush=True,
        )
        if not run.problems:
            shutil.rmtree(run.folder)

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
            "threads": 1,
            "device": "cpu",
        }
        return [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]

    def _process(
        self,
        folder: Path,
        aim: Aim | None,
        more: Sequence[str],
        kill_after: float | None = None,
    ) -> int:
        """Train in `folder` until the process ends, by itself, in a trap of `aim`, or killed from
        here after so many seconds; its exit code."""
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
                    [sys.executable, *command, *self._flags(), "--resume-if-any", *more],
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
            print(log.read_text(errors="replace"), file=sys.stderr)
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


def look_at(
    run: Path, before: int | None, problems: list[str], save_steps: int = Recipe().save_steps
) -> int | None:
    """The step of the newest checkpoint of a run, None before the first save is complete. What a
    kill must never leave behind is added to `problems`; `before` is the newest step before it."""
    nothing_saved = before is None and not checkpoints.checkpoints_in(run)
    # The second save waits for the first: what is logged behind it comes after a checkpoint.
    if nothing_saved and last_logged(run) <= 2 * save_steps:
        return None
    for folder in checkpoints.checkpoints_in(run):  # a name is given to what was verified only
        problems += [
            f"{folder}: left damaged, {problem}" for problem in checkpoints.verify(folder)[:1]
        ]
    try:
        step = checkpoints.find_newest(run)[0].step
    except PhiSightError as error:
        problems.append(str(error))
        return None
    if before is not None and step < before:
        problems.append(f"{run}: step {before} was saved, the newest checkpoint is of step {step}")
    return step


def last_logged(run: Path) -> int:
    """The last step in the log of a run, 0 for none."""
    log = run / "metrics.jsonl"
    records = read_metrics(log, whole_bytes=0) if log.is_file() else []
    return max((record.get("step", 0) for record in records), default=0)


def differences(reference: Path, run: Path) -> list[str]:
    """What is not equal at the end of two runs: the checkpoint, a record of the metrics."""
    try:
        found = checkpoints.diff(reference, run)
        logs = [read_metrics(folder / "metrics.jsonl") for folder in (reference, run)]
    except PhiSightError as error:
        return [str(error)]
    problems = [] if found.identical else [str(found)]
    if len(logs[0]) != len(logs[1]):
        problems.append(f"metrics: {len(logs[1])} records, not {len(logs[0])}")
    expected, ended = ([deterministic_part(record) for record in log] for log in logs)
    for number in range(min(len(expected), len(ended))):
        if expected[number] != ended[number]:
            problems.append(
                f"metrics: record {number + 1} is {ended[number]}, not {expected[number]}"
            )
            break
    return problems


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
