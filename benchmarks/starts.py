"""Cold starts: from typing a question to its first token, the whole process, in turns."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.processes import command, in_a_process, seconds_of
from benchmarks.turns import LLAMA, LLAMA_OF_FILE, Shape
from data.world import write_world

QUESTION = "What is there?"


def short_run(shape: Shape, work: Path) -> Path:
    """A run over the base of `shape`, for `infer.py`: the tiny preset's, after one step."""
    world, run = work / "world", work / f"run-{shape.name}"
    if not world.is_dir():
        write_world(world, pictures=8, held_out=1, turns=3)
    if not run.is_dir():
        given = {
            "preset": "tiny",
            "base": shape.folder,
            "base-cache": work / "bases",
            "data": world / "train.json",
            "images": world / "images",
            "features": work / "features",
            "run": run,
            "validation-fraction": 0.3,
            "batch-size": 1,
            "max-steps": 1,
            "evaluate-steps": 0,
        }
        flags = [word for name, value in given.items() for word in (f"--{name}", value)]
        command("train.py", *flags, threads=1)
    return run


def cold_starts(
    shape: Shape,
    sides: Sequence[str],
    threads: int,
    repeats: int,
    files: Mapping[str, Path],
    python: str | None,
    work: Path,
) -> list[dict[str, Any]]:
    """For each side, the seconds of a process that loads the model, reads a short question and
    has its first token; and of the very first one of ours, which fills what is kept on the disk.

    The other sides get token ids; ours also loads its adapter, CLIP and tokenizer, as it always
    does.
    """
    run = short_run(shape, work)
    ask = ("infer.py", "--run", run, "--prompt", QUESTION, "--max-new-tokens", 1, "--json")
    starts: dict[str, Callable[[], object]] = {"ours": partial(command, *ask, threads=threads)}
    if "transformers" in sides:
        asked = {"first": str(shape.folder), "cache": str(work / "bases"), "threads": threads}
        starts["transformers"] = partial(in_a_process, "benchmarks.torch_sides", asked, threads)
    for side in (LLAMA, LLAMA_OF_FILE):
        if side in sides:
            wanted = {"first": str(files[side]), "threads": threads}
            module = "benchmarks.llama_cpp_side"
            starts[side] = partial(in_a_process, module, wanted, threads, python or sys.executable)
    very_first = seconds_of(starts["ours"])
    seen: dict[str, list[float]] = {side: [] for side in starts}
    for _ in range(repeats):
        for side, start in starts.items():
            seen[side].append(seconds_of(start))
    return [
        {
            "shape": shape.name,
            "threads": threads,
            "side": side,
            "first_token_seconds": round(statistics.median(seconds), 2),
            "very_first_seconds": round(very_first, 2) if side == "ours" else None,
        }
        for side, seconds in seen.items()
    ]


def table(cold: Sequence[Mapping[str, Any]]) -> str:
    """A line for each side."""
    lines = ["\nfirst token of a new process, seconds"]
    for one in cold:
        first = one["very_first_seconds"]
        more = f"   (the very first: {first:.2f})" if first is not None else ""
        lines.append(
            f"{one['shape']:10}{one['threads']:>2} threads  {one['side']:18}"
            f"{one['first_token_seconds']:>8.2f}{more}"
        )
    return "\n".join(lines)
