"""Kill a process of a run on two machines, and compare the end with that of an unbroken run.

    python -m tools.two_agents [--ways by-hand,elastic] [--ranks 0,1] [--steps 24] [--json]

Two agents of torchrun stand for two machines: each starts one process, and they find each other at
a port of 127.0.0.1, as those of two machines do over their network. When the run has come half way
one of its processes gets a real SIGKILL. Then, by hand, both agents are started again with
`--resume`; or, elastic, the agents were started with `--max-restarts` and start both processes
again. Tensors, random states, place in the data and log must then be equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import checkpoints
import config as configs
import paths
from errors import PhiSightError, run_main
from tools.torture.findings import differences, last_logged
from tools.torture_resume import say, write_world_quietly

WAYS = ("by-hand", "elastic")
RESTARTS = 3
HANG_SECONDS = 600.0  # of two agents; they take seconds
PAUSE = 0.02  # seconds between two looks at the log
MARKER = "two-agents.json"  # a folder without it was not made here and is not touched


@dataclass(frozen=True)
class Killed:
    """One run that lost a process, and how it ended."""

    way: str
    rank: int
    step: int
    """the last one in the log when the kill struck"""
    saved: int
    """the newest checkpoint then: what the run goes on from"""
    problems: list[str]


class Agents:
    """Two agents of torchrun on this machine, each with one process of the same run, from `with`
    to the end of it."""

    def __init__(self, arguments: list[str], log: Path, restarts: int = 0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        self.command = [
            sys.executable, "-m", "torch.distributed.run",
            "--nnodes=2", "--nproc-per-node=1", f"--max-restarts={restarts}",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=two-agents",
            "--local-addr=127.0.0.1",
            "--", str(paths.PROJECT / "train.py"), *arguments,
        ]  # fmt: skip
        self.log = log

    def __enter__(self) -> Agents:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see `training/ranks.py`
        }
        with self.log.open("ab") as log:
            self.processes = [
                subprocess.Popen(
                    self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
                )
                for _ in range(2)
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for process in self.processes:  # an agent that is terminated ends its own process first
            process.terminate()
        for process in self.processes:
            process.wait()

    def codes(self) -> list[int]:
        """The exit codes of both. Raises PhiSightError when one does not end."""
        deadline = time.monotonic() + HANG_SECONDS
        try:
            return [process.wait(deadline - time.monotonic()) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise PhiSightError(
                f"two agents: no end within {HANG_SECONDS:.0f} s; see {self.log}"
            ) from None

    def succeed(self) -> None:
        """Wait for both. Raises PhiSightError where one fails."""
        if any(codes := self.codes()):
            print(self.log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
            raise PhiSightError(
                f"two agents: ended with {codes}; the output is above and in {self.log}"
            )

    def kill(self, rank: int, run: Path, step: int) -> int:
        """Send SIGKILL to a rank as soon as the log tells of the step; the step it has come to.

        Raises:
            PhiSightError: the agents end before.
        """
        deadline = time.monotonic() + HANG_SECONDS
        while (logged := last_logged(run)) < step:
            if time.monotonic() > deadline or any(p.poll() is not None for p in self.processes):
                raise PhiSightError(f"two agents: did not come to step {step}; see {self.log}")
            time.sleep(PAUSE)
        for agent in self.processes:
            for child in children_of(agent.pid):
                if f"RANK={rank}" in environment_of(child):
                    os.kill(child, signal.SIGKILL)
                    return logged
        raise PhiSightError(f"two agents: rank {rank} ended before it could be killed")


def children_of(parent: int) -> list[int]:
    """The processes that a process has started (Linux)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name of a program, in parentheses, may hold spaces and parentheses itself.
            fields = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        if int(fields[1]) == parent:
            found.append(int(status.parent.name))
    return found


def environment_of(process: int) -> list[str]:
    """NAME=VALUE of the environment that a process began with; nothing where it has ended."""
    try:
        return (
            Path(f"/proc/{process}/environ")
            .read_text(encoding="utf-8", errors="replace")
            .split("\0")
        )
    except (FileNotFoundError, ProcessLookupError):
        return []


def flags(out: Path, run: Path, steps: int) -> list[str]:
    """Of a short run over the world in `out`."""
    fields = {
        "run": run,
        "data": out / "world/train.json",
        "images": out / "world/images",
        "features": out / "features",
        "max_steps": steps,
        "batch_size": 2,
        "validation_fraction": 0.1,
        "save_steps": max(1, steps // 4),
        "log_steps": 1,
        "evaluate_steps": 0,
        "threads": 1,
        "device": "cpu",
    }
    return [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]


def broken(out: Path, way: str, rank: int, steps: int) -> Killed:
    """Train a run, kill one of its processes half way, have it go on, and compare it."""
    run, log = out / f"{way}-{rank}", out / f"{way}-{rank}.log"
    elastic = way == "elastic"
    arguments = [*flags(out, run, steps), "--resume-if-any"]
    with Agents(arguments, log, restarts=RESTARTS * elastic) as agents:
        step = agents.kill(rank, run, 5 * steps // 8)  # between two saves
        saved = checkpoints.resolve(run).step
        if elastic:
            agents.succeed()
        elif not all(codes := agents.codes()):
            raise PhiSightError(f"two agents: ended with {codes}, although rank {rank} was killed")
    if not elastic:
        with Agents(["--resume", f"--run={run}"], log) as agents:
            agents.succeed()
    return Killed(way, rank, step, saved, differences(out / "unbroken", run))


def new_place(out: Path) -> None:
    """An empty folder for all of it; an older one of this program is removed."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise PhiSightError(f"{out}: holds other things; give a new folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).write_text("{}\n", encoding="utf-8", newline="\n")


def chosen(text: str, known: tuple[str, ...], flag: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise PhiSightError(f"{flag} {unknown[0]}: is not one of {', '.join(known)}; name those")
    return names


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises PhiSightError."""
    parser = configs.Parser(prog="two_agents.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ways", default=",".join(WAYS), help="to go on (default: %(default)s)")
    parser.add_argument("--ranks", default="0,1", help="to be killed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="of a run (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=60, help="of the world (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/two-agents"), help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    options.ways = chosen(options.ways, WAYS, "--ways")
    options.ranks = [int(rank) for rank in chosen(options.ranks, ("0", "1"), "--ranks")]
    for name, least in (("steps", 8), ("pictures", 10)):
        if getattr(options, name) < least:
            raise PhiSightError(f"--{name} {getattr(options, name)}: must be at least {least}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 when a run did not end identical; 2 on errors."""
    options = parse(arguments)
    began, out = time.monotonic(), options.out.absolute()
    new_place(out)
    write_world_quietly(out / "world", options.pictures)
    with Agents(flags(out, out / "unbroken", options.steps), out / "unbroken.log") as agents:
        agents.succeed()
    say(f"unbroken: step {checkpoints.resolve(out / 'unbroken').step}")
    runs = []
    for way in options.ways:
        for rank in options.ranks:
            run = broken(out, way, rank, options.steps)
            verdict = "; ".join(run.problems) or "identical to the unbroken run"
            say(f"{way}: rank {rank} killed at step {run.step}, {run.saved} saved; {verdict}")
            runs.append(run)
    identical, seconds = sum(not run.problems for run in runs), time.monotonic() - began
    if options.json:
        print(json.dumps({"runs": [asdict(run) for run in runs], "identical": identical}))
    else:
        print(
            f"{identical} of {len(runs)} runs ended identical to the unbroken one; {seconds:.0f} s"
        )
    return 0 if identical == len(runs) else 1


if __name__ == "__main__":
    run_main(main)
