"""Processes: whether one lives, when it was born, how it is started apart, asked to stop, ended.

A number of a process is given out again. When a process was born tells it from another one of its
number: Linux says so in /proc, other POSIX systems by `ps`, Windows by `GetProcessTimes`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from system import windows

PROC = Path("/proc")


def cores() -> int:
    """Processors that this process may use; all of the machine where the system does not tell."""
    allowed = getattr(os, "sched_getaffinity", None)  # of Linux alone
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def lives(process: int) -> bool:
    """Whether a process of this number is there, whoever's it is."""
    if process <= 0:  # no process: asking for it would ask for our own group
        return False
    if os.name == "nt":  # where `os.kill` ends the process, whatever it is sent
        return bool(windows.born(process))
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def born(process: int) -> str:
    """When a process was born, as the system tells it; empty where it has ended."""
    if os.name == "nt":
        return windows.born(process)
    if not (PROC / "self" / "stat").exists():
        return _born_by_ps(process)
    try:
        said = (PROC / str(process) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = said.rpartition(")")[2].split()  # its name may have spaces and brackets
    return "" if state in "ZX" else fields[18]


def _born_by_ps(process: int) -> str:
    """To the second, in words that depend neither on the language nor on the time of year."""
    try:
        said = subprocess.run(
            ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(process)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=os.environ | {"LC_ALL": "C", "TZ": "UTC"},
            timeout=10,
            check=False,
        ).stdout.decode("ascii", "replace")
    except (OSError, subprocess.TimeoutExpired):  # there is no ps
        return ""
    state, _, birth = " ".join(said.split()).partition(" ")
    return "" if state.startswith("Z") else birth


def signal_if(process: int, birth: str, number: int) -> bool:
    """Send a signal to the process that was born then; False where it has ended.

    Linux holds on to the process while it is looked at. Elsewhere another one could get its number
    between the two calls, which no system gives out again so soon.
    """
    if not hasattr(os, "pidfd_open"):
        is_there = bool(birth) and born(process) == birth
        return is_there and _sent(process, number)
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return False
    try:
        if not birth or born(process) != birth:  # asked behind the opening
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def _sent(process: int, number: int) -> bool:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True


STOP: int = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)
"""what asks a training to save and stop, however often; SIGTERM ends one of Windows at once"""
ASKING: tuple[int, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
)
"""the signals that a training takes for that request"""


def apart(session: bool = True) -> dict[str, Any]:
    """What to give to `Popen` for a process that Ctrl-C in this terminal does not reach, nor with
    `session` the terminal's end, and whose own children can be ended with it."""
    if os.name == "nt":
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"start_new_session": True} if session else {"process_group": 0}


def interrupt(process: subprocess.Popen, again: bool) -> None:
    """Do to one that was started `apart` what Ctrl-C does, the first time or `again`; of no effect
    where it has ended."""
    with contextlib.suppress(ProcessLookupError):
        if os.name != "nt":
            process.send_signal(signal.SIGINT)
        elif again:
            process.terminate()
        else:
            process.send_signal(STOP)


def end_group(process: subprocess.Popen, patience: float) -> None:
    """Ask a process that was started `apart` to end, with its children, and see to it. On Windows
    it ends at once, and its children are left to end by themselves."""
    kill_group = getattr(os, "killpg", None)
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", None)):
        if process.poll() is not None:
            return
        try:
            if kill_group is None or number is None:
                process.kill()
            else:
                kill_group(process.pid, number)
            process.wait(patience)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue
