"""From the start of `infer.py` to its first token, and from its answer to its end.

    python -m benchmarks.cold_start [--run runs/tiny] [--repeats 5]

Each start is a process of its own, and the whole of it is measured. What was read from the disk
before is in the system's memory: the first start of all is left out. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.processes import ROOT, environment
from config import Parser
from errors import PhiSightError, run_main


def start(command: Sequence[str], threads: int | None = None) -> tuple[float, float, float]:
    """Seconds of `python COMMAND` to the first byte that it prints, and from the last one of that
    line to the end; processor seconds of it all. `threads`: None for what the command itself takes.

    Raises `PhiSightError` when it fails.
    """
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    own = None if threads is None else environment(threads)
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, cwd=ROOT, env=own
    ) as process:
        assert process.stdout is not None
        output = process.stdout.fileno()
        newest = os.read(output, 1)
        first = time.perf_counter() - clock
        while newest not in (b"\n", b""):
            newest = os.read(output, 1)
        answered = time.perf_counter()
        code = process.wait()
        ended = time.perf_counter() - answered
    if code:
        raise PhiSightError(f"{command[0]}: gave no answer; see what it said above")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return first, ended, spent


def main() -> None:
    parser = Parser(prog="cold_start.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/tiny", help="run or checkpoint folder (%(default)s)")
    parser.add_argument("--image", default="cache/world/images/held_out_000000.png")
    parser.add_argument("--prompt", default="What is the colour of the cross?")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.repeats < 1:
        raise PhiSightError("--repeats: must be at least 1")
    command = [
        "infer.py",
        "--run",
        options.run,
        "--image",
        options.image,
        "--prompt",
        options.prompt,
    ]
    start(command)
    found = zip(*(start(command) for _ in range(options.repeats)), strict=True)
    names = ("first_token_seconds", "end_seconds", "processor_seconds")
    facts = {
        name: {"median": sorted(values)[len(values) // 2], "least": min(values)}
        for name, values in zip(names, found, strict=True)
    }
    rounded = {n: {key: round(value, 2) for key, value in of.items()} for n, of in facts.items()}
    print(json.dumps(rounded | {"busy": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    run_main(main)
