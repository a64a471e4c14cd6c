"""What a run was started with, each time: RUN/starts.jsonl, a line for every start and resume.

The first line and the newest ones are kept, `MOST` of them in all. The file is written whole; a
training does not read its lines, and whoever shows one reads it strictly. It stays on this machine:
`checkpoints.py pack` and `export.py --push` leave it out, as it holds paths.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from documents import COUNT, TEXT, Kind, parse_json, require
from errors import PhiSightError, printable
from files import read_regular, write_whole

STARTS = "starts.jsonl"  # its name in a run's folder
MOST = 100  # lines, the first among them
BYTES = 16 * 2**20  # of the file; a line has 4 to 6 thousand, and at most some 70 thousand
ARGUMENTS = 2**16  # characters of a command line that are kept
_START = {
    "time": TEXT,
    "step": COUNT,
    "arguments": [TEXT],
    "git": Kind("null or a commit", lambda v: v is None or _is_commit(v)),
}


@dataclass(frozen=True)
class Starts:
    """How often a run was started, and what the last start was."""

    count: int
    """of those that are kept"""
    time: str
    step: int
    """that it went on from; 0 from the start"""
    command: str
    commit: str
    """of the code, empty where that is not known"""
    changed: bool
    """whether the code was not that of the commit"""


def _is_commit(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("commit"), str)
        and isinstance(value.get("changed"), bool)
    )


def add_start(run: str | Path, start: Mapping[str, Any], anew: bool) -> None:
    """Add a line to the file of a run. `anew`: earlier lines are of another run and go.

    Raises:
        PhiSightError: the file is none of ours, or cannot be written.
    """
    path = Path(run) / STARTS
    try:
        kept = [] if anew or not path.exists() else read_regular(path, BYTES).splitlines()
        lines = [*kept[:1], *kept[1:][-(MOST - 2) :], json.dumps(start).encode(), b""]
        write_whole(path, b"\n".join(lines))
    except OSError as error:
        raise PhiSightError(
            f"{path}: {error.strerror or error}; make room, or remove it: nothing depends on it"
        ) from error


def kept_arguments(arguments: tuple[str, ...]) -> list[str]:
    """The arguments of a command line, as far as there is room for them."""
    kept: list[str] = []
    left = ARGUMENTS
    for argument in arguments:
        left -= len(argument)
        if left < 0:
            return [*kept, "..."]
        kept.append(argument)
    return kept


def read_starts(run: str | Path) -> Starts | None:
    """What the file of a run says; None where there is none. Raises `PhiSightError`."""
    path = Path(run) / STARTS
    try:
        lines = read_regular(path, BYTES).splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; remove it") from error
    try:
        last = parse_json(lines[-1] if lines else b"", what="a start")
        require(last, _START)
    except PhiSightError as error:
        raise PhiSightError(f"{path}: its last line is {error}; remove it") from error
    git = last["git"] or {"commit": "", "changed": False}
    return Starts(
        count=len(lines),
        time=printable(last["time"], 40),
        step=last["step"],
        command=printable(f"train.py {shlex.join(last['arguments'])}", 1000),
        commit=printable(git["commit"], 64),
        changed=git["changed"],
    )


def start_text(starts: Starts) -> str:
    """Of the last start, for people."""
    code = ""
    if starts.commit:
        code = f"; code {starts.commit[:12]}{', changed' if starts.changed else ''}"
    place = f"from step {starts.step:,}" if starts.step else "from the start"
    times = "once" if starts.count == 1 else f"{starts.count} times, the last"
    return f"{times} at {starts.time} {place}: {printable(starts.command, 200)}{code}"
