"""Measuring processes: one that answers once, and one that waits for its turns.

Nothing here imports torch, so that whoever only starts processes begins at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import measuring
from errors import PhiSightError

ROOT = Path(__file__).resolve().parent.parent
SAID = 2000  # characters that an error repeats of what a process said at its end

Turn = Callable[[], dict[str, float]]
"""One turn of a measurement: name of a figure -> its value"""


def environment(threads: int) -> dict[str, str]:
    """Of a process that computes on so many threads, whichever library does it."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads))


def in_a_process(
    module: str, asked: Mapping[str, Any], threads: int, python: str = sys.executable
) -> dict[str, Any]:
    """What `python -m module`, asked with a JSON object, reports in its last line.

    Raises `PhiSightError` with the end of what it said when it fails.
    """
    words = [python, "-m", module, json.dumps(asked)]
    return measuring.last_line(_printed(module, words, threads))


def command(*words: object, threads: int) -> None:
    """A command of the project to its end. Raises `PhiSightError` with what it said if it fails."""
    _printed(str(words[0]), [sys.executable, *map(str, words)], threads)


def _printed(name: str, words: list[str], threads: int) -> str:
    done = subprocess.run(
        words, cwd=ROOT, env=environment(threads), text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise PhiSightError(f"{name}: ended with {done.returncode}: {done.stderr[-SAID:]}")
    return done.stdout


def seconds_of(start: Callable[[], object]) -> float:
    clock = time.perf_counter()
    start()
    return time.perf_counter() - clock


# -- processes that wait for their turns -----------------------------------------------------------


@contextlib.contextmanager
def waiting(module: str, asked: Mapping[str, Any], threads: int) -> Iterator[Turn]:
    """A turn is one line to `python -m module`, which has called `take_turns`, and one line back.

    While another process has its turn this one waits for a line, so that neither takes a core from
    the other, and what it loaded is loaded once. Raises `PhiSightError` with the end of what it
    said when it ends.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(asked)],
            cwd=ROOT,
            env=environment(threads),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
        )
        assert process.stdin is not None and process.stdout is not None
        to_process, from_process = process.stdin, process.stdout

        def turn() -> dict[str, float]:
            with contextlib.suppress(BrokenPipeError):
                to_process.write("turn\n")
                to_process.flush()
            if line := from_process.readline():
                return json.loads(line)
            process.wait()
            said.seek(0)
            raise PhiSightError(
                f"{module} {json.dumps(asked)}: ended with {process.returncode}:"
                f" {said.read()[-SAID:]}"
            )

        try:
            yield turn
        finally:
            with contextlib.suppress(BrokenPipeError):
                to_process.close()
            from_process.close()
            # No more lines come, so that it ends by itself, and removes what it wrote.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()
            process.wait()


def take_turns(turn: Turn) -> None:
    """In the process: give `turn()` for every line that comes, until none does."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what is measured may print
    for _ in sys.stdin:
        print(json.dumps(turn()), file=answers, flush=True)
