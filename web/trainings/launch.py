"""Trainings that were started from the page: begun, found again, stopped.

What is known of one lies in its run's folder, below `.started`: the command, the process, and what
it has written to its output and its errors. So every server that shows the folder of runs knows it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import paths
from api.door import KEY
from documents import COUNT, NUMBER, TEXT, read_json, require
from errors import PhiSightError, printable
from reports.status import newest_save
from reports.watching import holder_of
from system import disk, locks
from system.processes import STOP, apart, born, signal_if
from web.errors import RequestError
from web.trainings import processes
from web.trainings.command import STARTED, Command

RECORD, OUTPUT, ERRORS, CODE = "training.json", "output.log", "errors.log", "code"
"""below `STARTED` in a run's folder"""
QUEUE = ".starting"  # in the folder of runs: held for as long as one is being started
_FORM = {"command": TEXT, "began": NUMBER, "process": COUNT, "born": TEXT}
TAIL_BYTES = 16 * 1024
LINES = 12  # of what a training said last
STARTING, RUNNING, ENDED, FAILED = "starting", "running", "ended", "failed"
STOPPED_BY_HAND = (0, -signal.SIGTERM, -signal.SIGINT, 130)  # exit codes of no failure


def start(runs: Path, folder: Path, command: Command, most: int) -> dict[str, Any]:
    """Begin a training as a process of its own.

    Raises `RequestError` where `most` trainings run already in the folder of runs, whoever started
    them, or the run is being trained; `PhiSightError` where the folder cannot be written to.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(runs):
            busy = [name for name in names(runs) if is_busy(runs / name)]
            if folder.name in busy:
                raise RequestError("training_already", name=folder.name)
            if len(busy) >= most:
                raise RequestError("training_busy", name=busy[0], most=most)
            return _begin(folder, command)
    except OSError as error:
        raise PhiSightError(
            f"{error.filename or folder}: {error.strerror}; make the folder of runs writable"
        ) from error


@contextlib.contextmanager
def _one_at_a_time(runs: Path) -> Iterator[None]:
    """Among all servers of this folder of runs: two starts at once must not both find it idle."""
    queue = os.open(runs / QUEUE, os.O_RDWR | os.O_CREAT | disk.NO_FOLLOW, 0o600)
    try:
        locks.take(queue, wait=True)
        yield
    finally:
        os.close(queue)


def _begin(folder: Path, command: Command) -> dict[str, Any]:
    noted = folder / STARTED
    noted.mkdir(parents=True, exist_ok=True)
    (noted / CODE).unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != KEY}
    with _made_anew(noted / OUTPUT) as output, _made_anew(noted / ERRORS) as errors:
        process = subprocess.Popen(
            [sys.executable, str(paths.PROJECT / "train.py"), *command.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            **apart(),  # the end of this server's terminal is not the training's
        )
    record = {
        "command": command.line,
        "began": time.time(),
        "process": process.pid,
        "born": born(process.pid),
    }
    written = noted / f"{RECORD}.new"
    written.write_text(json.dumps(record), encoding="utf-8", newline="\n")
    disk.replace(written, noted / RECORD)
    threading.Thread(target=_note_end, args=(process, noted), daemon=True).start()
    return record


def _made_anew(path: Path) -> IO[bytes]:
    """A file to write to in place of what lies there. Raises `OSError`."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def _note_end(process: subprocess.Popen, noted: Path) -> None:
    """Wait for a training, and note how it ended; nobody does where this server ends before it."""
    code = process.wait()
    with contextlib.suppress(OSError):  # the run's folder was removed
        (noted / CODE).write_text(str(code), encoding="utf-8", newline="\n")


# -- what is known of them -------------------------------------------------------------------------


def names(runs: Path) -> list[str]:
    """The folders of runs."""
    try:
        found = [path.name for path in runs.iterdir() if path.is_dir()]
    except OSError:  # not made yet, or none that can be looked into
        return []
    return sorted(name for name in found if not name.startswith("."))


def record_of(folder: Path) -> dict[str, Any] | None:
    """What was noted when a run's training was started from the page; None where none was, or the
    note cannot be read."""
    try:
        record = read_json(folder / STARTED / RECORD, 1 << 20)
        require(record, _FORM)
    except (OSError, PhiSightError):
        return None
    return record


def is_held(folder: Path) -> bool:
    """Whether somebody trains a run; what is no lock is held by nobody."""
    try:
        return bool(holder_of(folder))
    except PhiSightError:
        return False


def is_alive(record: dict[str, Any]) -> bool:
    """Whether the process of a training that was started from the page has not ended."""
    return bool(record["born"]) and born(record["process"]) == record["born"]


def is_busy(folder: Path) -> bool:
    """Whether a run is trained, or about to be: the first seconds of a start have no lock yet."""
    record = record_of(folder)
    return is_held(folder) or (record is not None and is_alive(record))


def training_json(folder: Path) -> dict[str, Any] | None:
    """A training that was started from the page, for the page; None where none was."""
    record = record_of(folder)
    if record is None:
        return None
    state, said = ENDED, tail(folder / STARTED / OUTPUT)
    if is_held(folder):
        state = RUNNING
    elif is_alive(record):
        state = STARTING
    elif has_failed(folder):
        state, said = FAILED, tail(folder / STARTED / ERRORS) or said
    return {
        "name": folder.name,
        "command": record["command"],
        "began": record["began"],
        "state": state,
        "lines": said,
    }


def has_failed(folder: Path) -> bool:
    """Whether the training that was last started has failed. Its exit code is not known where the
    server ended before it: then its errors tell."""
    try:
        code = int((folder / STARTED / CODE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = tail(folder / STARTED / ERRORS)[-1:] or [""]
        return last[0].startswith("error:") or "Error" in last[0].partition(" ")[0]
    return code not in STOPPED_BY_HAND


def failure_of(folder: Path) -> str:
    """The line that a training ended with which was started from the page and has failed; else
    empty."""
    training = training_json(folder)
    if training is None or training["state"] != FAILED:
        return ""
    return (training["lines"] or ["ended without a word"])[-1].removeprefix("error: ")


def tail(path: Path) -> list[str]:
    """The last lines of a file, each safe to be shown."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = [line for line in text.splitlines() if line.strip()]
    return [printable(line, 500) for line in lines[-LINES:]]


# -- stopping and going on -------------------------------------------------------------------------


def stop(folder: Path) -> None:
    """Ask the training of a run to save and stop. Raises `RequestError` where none runs here."""
    found = processes.holder(folder) if processes.HAS_PROC else None
    if found is None:  # it has not taken the lock yet, if it has only just been started
        record = record_of(folder)
        found = (record["process"], record["born"]) if record else None
    # Not SIGINT, of which a second one would stop the training without a save.
    if found is None or not signal_if(*found, STOP):
        raise RequestError("training_not_running", name=folder.name)


def check_resumable(folder: Path) -> None:
    """Raises `RequestError` for a run that has nothing to go on from."""
    if newest_save(folder) is None:
        raise RequestError("training_nothing_saved", name=folder.name)
