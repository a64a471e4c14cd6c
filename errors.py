"""The one error type that people see, and the wrapper that prints it as one line."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

EXIT_CODE = 2
INTERRUPTED = 130  # what shells give a program that Ctrl-C ended


class PhiSightError(Exception):
    """Something a person can mend. The message is one line: the thing, the reason, the remedy."""


def key_problems(kind: str, expected: set[str], found: set[str]) -> list[str]:
    """ "... is missing" and "... is unexpected" for every name that is in one set only."""
    return [f"{kind}{name} is missing" for name in sorted(expected - found)] + [
        f"{kind}{name} is unexpected" for name in sorted(found - expected)
    ]


def printable(text: object, limit: int = 0) -> str:
    """A text of unknown origin on one line, safe for a terminal and a log.

    White space becomes single spaces. Control characters, halves of surrogate pairs and all else
    that is not seen become escapes, as \\x1b. What is longer than `limit` (0: no limit) is cut.
    """
    line = str(text)
    if limit and len(line) > limit:
        line = line[: limit - 3] + "..."
    line = " ".join(line.split())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class SurvivingOutput:
    """Standard output for a program that must not end because nobody reads it any more, such as a
    training whose `| tee log` has died: what is written then goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable, *arguments: str) -> None:
        try:
            call(*arguments)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # Python's own last flush finds it too
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_main(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code; a `PhiSightError` becomes one line and exit code 2."""
    # A name or an id that standard output cannot encode is printed with escapes, as stderr does it.
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")
    try:
        code = main()
    except PhiSightError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        trains = os.path.basename(sys.argv[0]) == "train.py"
        more = "; --resume goes on from there" if trains else ""
        print(f"interrupted: what was saved is kept{more}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `... | head` closed the pipe: nothing is lost and nobody is reading
        sys.stderr.close()
        sys.exit(0)
    # What is alive ends with the program. Python would look through all of it for garbage first,
    # which takes 0.4 s where torch is loaded; triton's library would call what is left a leak.
    if "triton" not in sys.modules:
        gc.freeze()
    sys.exit(code or 0)
