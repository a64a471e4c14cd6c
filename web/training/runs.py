"""The runs of a folder: which there are, and how each of them stands. All of it is read anew at
each request; what has not changed since is known by its stamps."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import PhiSightError, printable
from reports.log import METRICS
from reports.status import FINISHED, RUNNING, Status, status_of
from reports.watching import LOCK, StatusReader, holder_of
from web.errors import NotThere
from web.training.curves import Series, series_of
from web.training.logs import LogReader, read_small_log
from web.trainings import launch

MOST_RUNS = 200  # that are listed, the newest
MOST_OPEN = 6  # whose records are held in memory
LONGEST_NAME = 200
NOTE = f"{launch.STARTED}/{launch.RECORD}"
# What a run is seen to be doing, beside the states of `reports.status`.
PREPARING, TRAINING, EVALUATING, SAVING = "preparing", "training", "evaluating", "saving"
FAILED, DAMAGED = "failed", "damaged"
_SAVING = re.compile(r"\.tmp-checkpoint-[0-9]{6,18}-.*")


class Run:
    """One run whose records are held, for its dashboard and its curves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, LogReader()
        self.lock = threading.Lock()
        self._status = StatusReader(folder, self.log.read)
        self._mark, self._drawn, self._series = secrets.token_hex(4), (-1, -1), Series()

    def read(self) -> tuple[Status | None, str]:
        """How it stands, by what can be read of it, and the error of a file that cannot; hold
        `lock` meanwhile, and as long as what is read is used."""
        try:
            status = self._status.read()
        except PhiSightError as error:
            return self._read_in_part(), printable(error, 500)
        if status.logged_at is None:
            self.log.forget()
        return status, ""

    def _read_in_part(self) -> Status | None:
        """By the records before the first fault of the log; None where it is not the log alone."""
        with contextlib.suppress(PhiSightError):  # it may be this one that is told already
            self.log.read(self.folder / METRICS)
        try:
            return status_of(self.folder, holder_of(self.folder), lambda path: self.log.records)
        except PhiSightError:
            return None

    def series(self) -> Series:
        """What can be drawn of the records that were read last."""
        now = self.log.generation, len(self.log.records)
        if self._drawn != now:
            self._drawn, self._series = now, series_of(self.log.kept())
        return self._series

    @property
    def version(self) -> str:
        """Changes when points that were given already are not of the run any more."""
        back = sum(record.get("kind") == "rollback" for record in self.log.records)
        return f"{self._mark}-{self.log.generation}-{back}"


class Runs:
    """The runs below a folder, for many readers at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._readers: dict[str, StatusReader] = {}
        self._open: OrderedDict[str, Run] = OrderedDict()

    def folder_of(self, name: str) -> Path:
        """The folder of a run. Raises `NotThere` for what is no name of one in this folder: nothing
        leads out of it, no link either."""
        folder = self.root / name
        is_name = 0 < len(name) <= LONGEST_NAME and name.isprintable() and name[0] != "."
        with contextlib.suppress(OSError):  # no name of the disk's, or nothing to be looked into
            if is_name and "/" not in name and not folder.is_symlink() and is_run(folder):
                return folder
        raise NotThere("run_not_there")

    def open(self, name: str) -> Run:
        """A run whose records are held from now on. Raises `NotThere`."""
        folder = self.folder_of(name)
        with self._lock:
            run = self._open.pop(name, None) or Run(folder)
            self._open[name] = run
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        return run

    def listed(self) -> dict[str, Any]:
        """All runs as JSON: those that train now first, then the newest."""
        found = []
        try:
            names = os.listdir(self.root)
        except OSError:  # nothing was trained here yet
            names = []
        for name in names:
            try:
                folder = self.folder_of(name)
                found.append((touched(folder), name, folder))
            except (NotThere, OSError):
                continue  # no run, or removed just now
        found.sort(reverse=True)
        shown = found[:MOST_RUNS]
        with self._lock:
            self._readers = {
                name: self._readers.get(name) or StatusReader(folder, read_small_log)
                for _, name, folder in shown
            }
            rows = [summary(self._readers[name], name, at) for at, name, _ in shown]
        rows.sort(key=lambda row: (not row["running"], -row["updated"]))
        return {"runs": rows, "left_out": len(found) - len(shown)}


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run: its log, a checkpoint, or the lock or the note of one that
    begins, or could not begin."""
    if (folder / METRICS).is_file() or (folder / NOTE).is_file() or is_held(folder):
        return True
    try:
        return folder.is_dir() and any(folder.glob("checkpoint-*"))
    except OSError:
        return False


def touched(folder: Path) -> float:
    """When something was last written to a run, in seconds since 1970. Raises `OSError`."""
    stamps = [folder.stat().st_mtime]
    for name in (METRICS, LOCK, NOTE):
        path = folder / name
        if path.exists():
            stamps.append(path.stat().st_mtime)
    return max(stamps)


def summary(reader: StatusReader, name: str, updated: float) -> dict[str, Any]:
    """One run for the list."""
    row: dict[str, Any] = {"name": name, "updated": updated, "error": ""}
    row |= dict.fromkeys(("total_steps", "eta_seconds", "loss", *("right", "swapped", "blank")))
    try:
        status = reader.read()
    except PhiSightError as error:
        state, told = state_unread(reader.run, printable(error, 500))
        return row | {
            "step": 0,
            "error": told,
            "state": state,
            "running": launch.is_busy(reader.run),
        }
    state, row["error"] = state_of(reader.run, status, {}, 0)
    return row | {
        "state": state,
        "running": status.state == RUNNING or state == PREPARING,
        "step": status.step,
        "total_steps": status.total_steps,
        "eta_seconds": status.eta(time.time()),
        "loss": status.loss,
        **(status.evaluation or {}).get("alignment", {}),
    }


def is_held(folder: Path) -> bool:
    """Whether somebody trains a run."""
    try:
        return bool(holder_of(folder))
    except PhiSightError:  # no lock, but something else of its name
        return False


def state_of(folder: Path, status: Status, last: Mapping[str, Any], every: int) -> tuple[str, str]:
    """What a run is seen to be doing, and the error that it has ended with, if it is known. `last`:
    the last record of its log, and `every`: steps between evaluations, 0 if that is not known, by
    which one under way is seen."""
    if status.state == RUNNING:
        return _doing(folder, status, last, every), ""
    if status.state == FINISHED:
        return FINISHED, ""
    if launch.is_busy(folder):
        return PREPARING, ""  # it has not taken the lock yet
    error = last_error(folder)
    return (FAILED if error else status.state), error


def state_unread(folder: Path, error: str) -> tuple[str, str]:
    """The same of a run of which not all can be read, for this `error`. One that was started from
    the page and has logged nothing has nothing to read yet."""
    if not (folder / METRICS).exists():
        if launch.is_busy(folder):
            return PREPARING, ""
        if failure := last_error(folder):
            return FAILED, failure
    return DAMAGED, error


def _doing(folder: Path, status: Status, last: Mapping[str, Any], every: int) -> str:
    try:
        if any(_SAVING.fullmatch(name) for name in os.listdir(folder)):
            return SAVING
        begun = (folder / LOCK).stat().st_mtime
    except OSError:
        return PREPARING  # its folder is being made, or removed
    if status.logged_at is None or status.logged_at < begun:
        return PREPARING  # what is logged is of the process before
    kind, step = last.get("kind"), last.get("step", 0)
    is_due = kind == "train" and every > 0 and (step % every == 0 or step == status.total_steps)
    return EVALUATING if is_due or kind == "samples" else TRAINING


def last_error(folder: Path) -> str:
    """The line that a training ended with which was started from the page and has failed, unless
    somebody has trained the run since."""
    if error := launch.failure_of(folder):
        with contextlib.suppress(OSError):  # it never came to a lock
            ended = (folder / launch.STARTED / launch.ERRORS).stat().st_mtime
            return error if ended >= (folder / LOCK).stat().st_mtime else ""
    return error
