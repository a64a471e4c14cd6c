"""Compiled code is kept on the disk, in a folder that is named after what it was compiled from.

numba notices that a function's own file has changed, and not that of a function that it calls. So
the folder's name has a hash of all files of this room, the versions of numba and llvmlite, and
the target.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba

from ops.kernels.target import choose

ROOM = Path(__file__).parent
COMPLETE = "complete-"  # begins the name of an empty file: what follows was compiled once


@functools.cache
def cache_folder() -> Path | None:
    """Where code for the chosen target is kept: under XDG_CACHE_HOME, by default
    ~/.cache/phisight; None where nothing can be written."""
    digest = hashlib.sha256()
    for path in sorted(ROOM.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for fact in (numba.__version__, llvmlite.__version__, platform.python_version(), choose()[0]):
        digest.update(fact.encode())
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "phisight" / "kernels" / digest.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder if os.access(folder, os.W_OK) else None


def prepare(what: str, compile_all: Callable[[], None]) -> None:
    """Where it was not done before on this machine: compile `what` by `compile_all`, and say how
    long it took."""
    folder = cache_folder()
    done = folder / (COMPLETE + what.replace(" ", "-")) if folder else None
    if done and done.is_file():
        return
    print(
        f"compiling {what} for this processor"
        + ("" if folder else " (at each start: no cache folder can be written)"),
        file=sys.stderr,
        flush=True,
    )
    started = time.perf_counter()
    compile_all()
    print(f"compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if done:
        done.touch()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call, for threads without Python's lock, and keep it on the disk.

    float32 is as it is written: no sum is taken in another order, and NaN stays NaN.
    """
    settings: Any = numba.config
    folder, before = cache_folder(), settings.CACHE_DIR
    settings.CACHE_DIR = str(folder or "")  # read while a function is decorated
    try:
        return numba.njit(nogil=True, cache=folder is not None, error_model="numpy")(function)
    finally:
        settings.CACHE_DIR = before
