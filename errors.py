"""The one error type that people see, and the wrapper that prints it as one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_CODE = 2
INTERRUPTED = 130  # what shells give a program that Ctrl-C ended


class PhiSightError(Exception):
    """Something a person can mend. The message is one line: the thing, the reason, the remedy."""


def key_problems(kind: str, expected: set[str], found: set[str]) -> list[str]:
    """"... is missing" and "... is unexpected" for every name that is in one set only."""
    return ([f"{kind}{name} is missing" for name in sorted(expected - found)]
            + [f"{kind}{name} is unexpected" for name in sorted(found - expected)])


def run_main(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code; a `PhiSightError` becomes one line and exit code 2."""
    try:
        code = main()
    except PhiSightError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        print("interrupted: what was saved is kept; run the same command again", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `... | head` closed the pipe: nothing is lost and nobody is reading
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code or 0)
