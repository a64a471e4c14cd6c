"""Exports that were begun from the page: one runs at a time, in a process of its own that ends with
the server; what it wrote lies in the server's own folder until it is downloaded and removed."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paths
from api.logs import failed
from documents import read_json
from errors import PhiSightError
from web.errors import NotThere, RequestError
from web.temporary import check_disk, own_folder
from web.trainings.children import TookTooLong, lines_of
from web.trainings.command import Value
from web.trainings.downloads import bytes_of
from web.trainings.forms import export_arguments

FOLDER = "exports"
SECONDS = 4 * 3600.0  # of one export
KEPT = 12  # exports; more are refused until one is removed
LINES = 40  # the last ones that an export printed
RUNNING, DONE, FAILED, ENDED = "running", "done", "failed", "ended"
FIGURES = (
    "what",
    "loss_before",
    "loss_after",
    "loss_difference",
    "greedy_equal",
    "within_tolerance",
    "alignment",
    "measured_on",
    "tolerance",
)


@dataclass
class Job:
    """One export."""

    id: str
    run: str
    form: str
    folder: Path
    """what is written; its name is that of the download"""
    command: str
    began: float
    state: str = RUNNING
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LINES))
    ended: threading.Event = field(default_factory=threading.Event)
    """set to have it end"""

    def as_json(self) -> dict[str, Any]:
        certificate = certificate_in(self.folder) if self.state == DONE else None
        return {
            "id": self.id,
            "run": self.run,
            "form": self.form,
            "name": self.folder.name,
            "command": self.command,
            "began": self.began,
            "state": self.state,
            "lines": list(self.lines),
            "bytes": bytes_of(self.folder) if self.state == DONE else None,
            "certificate": certificate,
        }


def certificate_in(folder: Path) -> dict[str, Any] | None:
    """What the certificate beside exported weights says; None where the form has none."""
    for path in sorted(folder.glob("*_certificate.json")):
        try:
            written = read_json(path)
        except (OSError, PhiSightError):
            return None
        return {name: written.get(name) for name in FIGURES}
    return None


class Exports:
    """The exports of one server, from any thread."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._changing = threading.Lock()

    def begin(self, run: Path, checkpoint: Path, form: str, options: dict[str, Value]) -> Job:
        """Raises `RequestError` while another one runs, or where too many lie there; PhiSightError
        for options that cannot be used, and where the disk is nearly full."""
        id = secrets.token_hex(8)
        place = own_folder() / FOLDER / id
        step = checkpoint.name.removeprefix("checkpoint-").lstrip("0") or "0"
        out = place / f"{run.name}-step-{step}-{form}"
        arguments = export_arguments(form, str(checkpoint), str(out), options)
        shown = export_arguments(form, str(checkpoint), f"exports/{out.name}", options)
        job = Job(id, run.name, form, out, f"{_EXPORT} {paths.typed(*shown)}", time.time())
        check_disk(own_folder())
        with self._changing:
            if any(other.state == RUNNING for other in self._jobs.values()):
                raise RequestError("export_busy")
            if len(self._jobs) >= KEPT:
                raise RequestError("export_many", most=KEPT)
            place.parent.mkdir(mode=0o700, exist_ok=True)
            place.mkdir(mode=0o700)
            self._jobs[id] = job
            self._threads[id] = threading.Thread(
                target=self._run, args=(job, arguments), name="export", daemon=True
            )
            self._threads[id].start()
        return job

    def _run(self, job: Job, arguments: list[str]) -> None:
        state = FAILED
        try:
            script = str(paths.PROJECT / "export.py")
            for line in lines_of([script, *arguments], job.ended.is_set, SECONDS):
                if isinstance(line, int):
                    state = FAILED if line else DONE
                elif line.strip():
                    job.lines.append(line.replace(f"{job.folder.parent}/", ""))
            if job.ended.is_set():
                state = ENDED
        except TookTooLong:
            job.lines.append(f"ended after {SECONDS / 3600:.0f} hours")
        except OSError as error:
            job.lines.append(f"could not be started: {error.strerror}")
        except Exception as error:  # in a thread of its own: nobody else would tell it
            failed("an export", error)
            job.lines.append("failed on the server, whose log says why")
        finally:
            job.state = state  # whatever happened: while one runs, no other may

    def all(self) -> list[Job]:
        """The newest first."""
        with self._changing:
            return list(reversed(self._jobs.values()))

    def get(self, id: str) -> Job:
        """Raises `NotThere`."""
        job = self._jobs.get(id)
        if job is None:
            raise NotThere("export_gone")
        return job

    def remove(self, id: str) -> None:
        """End an export, and remove what it wrote. Raises `NotThere`."""
        with self._changing:
            job, thread = self._jobs.pop(id, None), self._threads.pop(id, None)
        if job is None or thread is None:
            raise NotThere("export_gone")
        job.ended.set()
        thread.join()
        shutil.rmtree(job.folder.parent, ignore_errors=True)

    def close(self) -> None:
        """End all of them."""
        for job in self.all():
            job.ended.set()
        for thread in list(self._threads.values()):
            thread.join()


_EXPORT = paths.command("export.py")
