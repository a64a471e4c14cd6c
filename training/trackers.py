"""Other programs that show the log of a run: TensorBoard and trackio.

The log, metrics.jsonl, is what counts, and a tracker shows what it holds: at every start of a
process, and wherever the run goes back to a checkpoint, the tracker forgets what it was given of
this run and is given the log from its first record on. So nothing stands in a curve twice after a
resume or a rollback, nothing is missing that a killed process had not handed on, and a run that was
begun without a tracker can be resumed with one.

None of it is part of a run's state, and no number of a step depends on it. A tracker that cannot
begin stops the start, when nothing is lost. One that fails later is warned of once and given up,
and the training goes on: all that it would have shown stands in the log, and the next start with it
shows it again. Hours of training are worth more than a curve.

A new tracker is a class with the methods of `Tracker` and a line in `TRACKERS`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import paths
from errors import PhiSightError, printable
from reports.alerts import alert_text
from reports.log import METRICS, TIMING, MetricsLog, read_metrics, without_abandoned
from reports.status import sample_text

SAVES = "saves"  # under "timing" of a record: see `training.weight_change`
NOT_CURVES = ("kind", "step", "total_steps")


class Tracker(Protocol):
    """What shows a run. Every method may raise whatever its library does."""

    def begin(self) -> str:
        """Forget what was given of this run; what to type to look at it."""

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Take numbers and Markdown of a step, by names such as "train/loss"."""

    def flush(self) -> None:
        """Return when what was given would outlast the process."""

    def close(self) -> None:
        """Nothing more will be given."""


class TensorBoard:
    """Event files in RUN/tensorboard, or in a folder for many runs."""

    def __init__(self, run: str, folder: str) -> None:
        self.folder = Path(folder, name_of(run)) if folder else Path(run, "tensorboard")
        self.seen_from = folder or run
        self._file: io.BufferedWriter | None = None

    def begin(self) -> str:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names, of which the first number is the time in s.
        second, part = divmod(time.time_ns(), 10**9)
        # Written here and not by torch's SummaryWriter, whose thread prints a traceback of its own
        # where the disk is full.
        self._file = (self.folder / f"events.out.tfevents.{second:010}.{part:09}").open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        # Whoever reads it forgets all events of this step and later ones.
        self._write(Event(session_log=SessionLog(status=SessionLog.START), step=0))
        return f"tensorboard --logdir {self.seen_from}"

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import scalar, text

        for name, value in numbers.items():
            self._write(Event(step=step, summary=scalar(name, value)))
        for name, words in texts.items():
            self._write(Event(step=step, summary=text(name, words)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Trackio:
    """A run of a trackio project, in the folder where trackio keeps its projects."""

    def __init__(self, run: str, project: str) -> None:
        self.project, self.name = project, name_of(run)
        self._run: Any = None

    def begin(self) -> str:
        import trackio

        self.close()
        with contextlib.redirect_stdout(io.StringIO()):  # it greets in a dozen lines
            for earlier in self._earlier_runs(trackio.Api()):
                earlier.delete()
            self._run = trackio.init(
                self.project, self.name, embed=False, auto_log_gpu=False, auto_log_cpu=False
            )
        return f"trackio show --project {self.project}"

    def _earlier_runs(self, api: Any) -> list[Any]:
        """What earlier processes gave of this run."""
        try:
            return [run for run in api.runs(self.project) if run.name == self.name]
        except ValueError:  # there is no such project yet
            return []

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        from trackio import Markdown

        self._run.log({**numbers, **{name: Markdown(words) for name, words in texts.items()}}, step)

    def flush(self) -> None:
        """It writes by itself, twice a second."""

    def close(self) -> None:
        if self._run is not None:
            import trackio

            with contextlib.redirect_stdout(io.StringIO()):
                trackio.finish()
            self._run = None


@dataclass(frozen=True)
class TrackerKind:
    """One of the trackers, as the command line has it."""

    make: Callable[[str, str], Tracker]
    """the folder of a run, and what was given with the flag -> the tracker"""
    given: str
    """what is given with the flag"""
    optional: bool
    """whether it can be left out"""
    version: str
    """of the package, which has the name of the tracker, that the tests have seen"""
    help: str


TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": TrackerKind(
        TensorBoard,
        "FOLDER",
        optional=True,
        version="2.21.0",
        help="show the log in TensorBoard too: in RUN/tensorboard, or in FOLDER beside other runs",
    ),
    "trackio": TrackerKind(
        Trackio,
        "PROJECT",
        optional=False,
        version="0.43.0",
        help="show the log in a project of trackio too",
    ),
}


def check_installed(name: str) -> None:
    """Raise `PhiSightError` if the package of a tracker is not there; it is not imported."""
    if importlib.util.find_spec(name) is None:
        raise PhiSightError(
            f"--{name}: needs the package {name}; pip install {name}=={TRACKERS[name].version}"
        )


def name_of(run: str) -> str:
    """What a tracker knows a run by: its path in the project, or on this machine, so that two runs
    in folders of the same name are two."""
    path = Path(os.path.abspath(run))
    if path.is_relative_to(paths.PROJECT):
        return str(path.relative_to(paths.PROJECT))
    return str(path.relative_to(path.anchor))


class Trackers:
    """The trackers of a run, which follow its log as long as a `with` block lasts."""

    def __init__(self, run: str, log: MetricsLog | None, asked: Mapping[str, str]) -> None:
        """`log`: None on every process but the first, where nothing is done; `asked`: names of
        trackers, with what was given with their flags."""
        self._log = log
        self._trackers = {
            name: TRACKERS[name].make(run, given) for name, given in asked.items() if log
        }

    def __enter__(self) -> Trackers:
        """Raises `PhiSightError` where one cannot begin."""
        try:
            for name, tracker in self._trackers.items():
                look = tracker.begin()
                print(f"{name}: shows this run with: {look}")
                self._give(tracker)
        # What a library of others raises is not known here.
        except Exception as error:
            self._close()
            raise PhiSightError(
                f"--{name}: cannot begin ({printable(error, 300)}); mend it, or leave it out"
            ) from error
        if self._log and self._trackers:
            self._log.followers.append(self._follow)
        return self

    def __exit__(self, *_: object) -> None:
        if self._log and self._follow in self._log.followers:
            self._log.followers.remove(self._follow)
        self._close()

    def _close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _give(self, tracker: Tracker) -> None:
        """All that the log holds and that was not undone."""
        assert self._log is not None
        for record in without_abandoned(read_metrics(self._log.path)):
            for entry in entries_of(record):
                tracker.log(*entry)
        tracker.flush()

    def _follow(self, record: Mapping[str, Any]) -> None:
        def take(tracker: Tracker) -> None:
            if record.get("kind") == "rollback":  # what was shown of the steps since is undone
                tracker.begin()
                self._give(tracker)
                return
            for entry in entries_of(record):
                tracker.log(*entry)
            tracker.flush()

        self._each(take)

    def _each(self, do: Callable[[Tracker], None]) -> None:
        """Do it with each tracker that has not failed yet."""
        for name, tracker in [*self._trackers.items()]:
            try:
                do(tracker)
            except Exception as error:  # whatever its library raises; see above for why it goes on
                del self._trackers[name]
                print(
                    f"warning: --{name}: failed ({printable(error, 300)}) and is left out from here"
                    f" on; a --resume with --{name} shows everything",
                    file=sys.stderr,
                )


def show_log(run: str, asked: Mapping[str, str]) -> None:
    """Have trackers show the log of a run that is not trained on, if it has one. Raises as a start
    does."""
    path = Path(run) / METRICS
    if asked and path.exists():
        with contextlib.closing(MetricsLog(path)) as log, Trackers(run, log, asked):
            pass


# -- a record, as trackers take it ----------------------------------------------------------------


def entries_of(
    record: Mapping[str, Any],
) -> Iterator[tuple[int, dict[str, float], dict[str, str]]]:
    """(step, numbers, texts) for the record and for each save that it tells of. Names begin with
    the record's kind, as in "train/gradient_norms/lora"."""
    kind, step = record.get("kind", "record"), record.get("step", 0)
    texts = {}
    if samples := record.get("samples"):
        texts["samples"] = "\n".join(f"- {sample_text(sample)}" for sample in samples)
    if kind == "alert":
        texts["alerts"] = alert_text(record)
    told = {name: value for name, value in record.items() if name not in NOT_CURVES}
    numbers = dict(_numbers(told, kind))
    if kind == "rollback":
        texts["rollbacks"] = f"from step {record['from_step']}: {record['reason']}"
    yield step, numbers, texts
    for save in (record.get(TIMING) or {}).get(SAVES, ()):
        owners = {name: value for name, value in save.items() if isinstance(value, Mapping)}
        yield save["step"], dict(_numbers(owners, "save")), {}


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Every number in a value that is not in a list, with its place."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{path}/{name}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)
