"""What every side of benchmarks/decode.py is asked for, and how its clocks become figures.

Imports nothing outside Python's own library: llama.cpp's side runs under another interpreter.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Answer = Callable[[list[list[int]], int, float], list[float]]
"""(prompts, most tokens, most seconds) -> clocks: at the start, after the prompts (where the first
token is known), and after each further token of all prompts"""
WARM_UP = 8  # tokens of a first prompt that is not measured: compiling and repacking are done by it


@dataclass(frozen=True)
class Plan:
    """What one process measures: the same for every side."""

    threads: int = 1
    rows: int = 1
    """prompts at once"""
    contexts: tuple[int, ...] = (16, 64, 512, 2048)
    """tokens of each prompt, ascending"""
    decode_at: tuple[int, ...] = (16, 512, 2048)
    """those of `contexts` after which tokens are decoded"""
    tokens: int = 64
    """that are decoded after each, at most"""
    seconds: float = 20.0
    """of decoding after each, at most; but two tokens"""
    limit: float = 120.0
    """seconds: a prompt that would take longer to read, by the rate of the one before, is left
    out"""
    vocabulary: int = 1000
    """ids are drawn from 10 to here"""

    def prompts(self, context: int) -> list[list[int]]:
        """`rows` prompts of `context` random tokens, the same for every side."""
        draw = random.Random(context)
        return [
            [draw.randrange(10, self.vocabulary) for _ in range(context)] for _ in range(self.rows)
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def plan_of(text: str) -> Plan:
    """The plan that `to_json` wrote."""
    fields = json.loads(text)
    return Plan(**fields | {name: tuple(fields[name]) for name in ("contexts", "decode_at")})


class Clocks:
    """Readings of the clock after each token, and whether it is time to stop."""

    def __init__(self, tokens: int, seconds: float) -> None:
        self.tokens, self.seconds = tokens, seconds
        self.read = [time.perf_counter()]

    def tick(self) -> bool:
        """A token has come for every prompt; returns whether enough have."""
        self.read.append(time.perf_counter())
        decoded = len(self.read) - 2  # the first came of reading the prompts
        late = self.read[-1] - self.read[1] > self.seconds
        return decoded >= self.tokens or (late and decoded >= 2)


def measure(answer: Answer, plan: Plan) -> dict[str, Any]:
    """What `plan` asks for, of all rows together:

    "prefill", "decode": {context: tokens/s}; None for what `plan.limit` forbids.
    "decoded": {context: tokens of each row that "decode" was measured over}.
    "processor_share": of the time of its threads, what this process had of processors. Far under 1
    something else was running, unless the side leaves its threads idle.
    """
    answer(plan.prompts(WARM_UP), 2, plan.seconds)
    figures: dict[str, dict[str, float | None]] = {"prefill": {}, "decode": {}, "decoded": {}}
    rate: float | None = None
    wall, processor = time.perf_counter(), time.process_time()
    for context in plan.contexts:
        read, name = plan.rows * context, str(context)
        decodes = context in plan.decode_at
        if rate and read / rate > plan.limit:
            figures["prefill"][name] = None
            if decodes:
                figures["decode"][name] = figures["decoded"][name] = None
            continue
        clocks = answer(plan.prompts(context), plan.tokens if decodes else 0, plan.seconds)
        rate = figures["prefill"][name] = read / (clocks[1] - clocks[0])
        if decodes:
            steps = len(clocks) - 2
            figures["decode"][name] = plan.rows * steps / (clocks[-1] - clocks[1])
            figures["decoded"][name] = steps
    share = (time.process_time() - processor) / (time.perf_counter() - wall) / plan.threads
    return {**figures, "processor_share": round(share, 3)}


def memory() -> dict[str, float]:
    """Resident memory of this process now, and at its peak, in MB (10^6 bytes); Linux only."""
    lines = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line
    )
    return {
        name: round(int(lines[field].split()[0]) * 1024 / 1e6, 1)
        for name, field in (("resident_mb", "VmRSS"), ("peak_mb", "VmHWM"), ("own_mb", "RssAnon"))
    }


def report(facts: dict[str, Any]) -> None:
    """Hand the result of a measurement to the process that asked for it: the last line."""
    print(json.dumps(facts), flush=True)


def last_line(printed: str) -> dict[str, Any]:
    """What `report` said."""
    return json.loads(printed.strip().splitlines()[-1])


def argument(arguments: Sequence[str] = tuple(sys.argv)) -> dict[str, Any]:
    """The one argument of a measuring process: a JSON object."""
    return json.loads(arguments[-1])
