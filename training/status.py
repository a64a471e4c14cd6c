"""`train.py --status`: where a run stands, while it trains and after.

It reads files alone and loads no torch, so that it answers at once.
"""

from __future__ import annotations

import json
import sys

from errors import run_main
from reports.status import status_lines
from reports.watching import run_status
from training.options import STATUS, parse


def show_status(run: str, as_json: bool) -> int:
    """Print it: one screen, or one JSON object."""
    status = run_status(run)
    if as_json:
        print(json.dumps(status.as_json()))
    else:
        print("\n".join(status_lines(status)))
    return 0


def answer_if_asked() -> None:
    """If this process's command line asks for the status of a run, answer, and end the process."""
    if any(argument.split("=")[0] == STATUS for argument in sys.argv[1:]):
        run_main(main)


def main() -> int:
    config, options = parse(None)
    return show_status(options.status or config.run, options.json)
