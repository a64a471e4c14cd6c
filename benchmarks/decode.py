"""Tokens a second of answering and of reading prompts, beside what people would use instead.

    python -m benchmarks.decode --quick --json                   # within a minute, one object
    python -m benchmarks.decode --llama-python ../llama/bin/python --smollm2 DIR
    python -m benchmarks.decode --shapes full --layers 8 --threads 1 --repeats 1

Sides: ours; transformers' generate over the same 4-bit weights of bitsandbytes in float32; the same
in bfloat16 by the path that bitsandbytes has for CPUs with AVX512-BF16; llama.cpp over Q4_0 (and
Q4_1 of the SmolLM2). Shapes: Phi-3.5-mini with random weights, SmolLM2-135M in the Phi-3 layout,
the tiny preset's base. Prompts are random tokens, without an adapter. Every measurement is a
process of its own (threads of one library that wait would take the cores from another), the sides
take turns, and figures are medians of the turns. The first token, which comes of reading the
prompt, counts there. Files that stay on the disk's cache are read from memory: a cold start is a
new process, not a new machine.

llama.cpp is measured where `llama_cpp` and `gguf` can be imported by --llama-python:

    python -m venv ../llama
    ../llama/bin/pip install llama-cpp-python gguf           # compiles: 20 to 40 minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import starts, turns
from benchmarks.full_shape import ROOT, phi_config
from benchmarks.machine import describe_machine
from benchmarks.measuring import Plan
from benchmarks.turns import LLAMA, LLAMA_OF_FILE, Shape
from config import Parser
from documents import read_json
from errors import PhiSightError, run_main
from exports.llama_cpp.asked import find_llama

NAMES = ("full", "smollm2", "tiny")
SIDES = ("ours", "transformers", "bitsandbytes_bf16", LLAMA, LLAMA_OF_FILE)
LAYERS, QUICK_LAYERS = 32, 4
# With 8 rows at Phi-3.5's shape, keys and values of 2,048 tokens would take 13 GB.
CONTEXTS_OF_ROWS = (16, 64, 512)
QUICK = Plan(contexts=(16, 128), decode_at=(16,), tokens=32, seconds=3.0, limit=20.0)


def full_shape(layers: int) -> Shape:
    return Shape("full", "Phi-3.5-mini, random weights", phi_config(layers), None)


def find_shapes(options: argparse.Namespace) -> list[Shape]:
    """What is measured, by --shapes, --layers and --smollm2. Raises `PhiSightError` when SmolLM2's
    files are wanted and missing."""
    tiny = ROOT / "assets/tiny/phi3"
    shapes = {
        "full": full_shape(options.layers),
        "tiny": Shape(
            "tiny", "the tiny preset's base", read_json(tiny / "config.json", own=False), tiny
        ),
    }
    if options.smollm2:
        folder, gguf = options.smollm2 / "smollm2-phi3", options.smollm2 / "smollm2.gguf"
        for path in (folder / "config.json", gguf):
            if not path.is_file():
                raise PhiSightError(f"--smollm2: {path} is missing; give the folder that holds it")
        config, about = (
            read_json(folder / "config.json", own=False),
            "SmolLM2-135M in the Phi-3 layout",
        )
        shapes["smollm2"] = Shape("smollm2", about, config, folder, gguf)
    elif options.shapes and "smollm2" in options.shapes:
        raise PhiSightError(
            "--shapes smollm2: its weights are needed; give their folder: --smollm2"
        )
    return [shapes[name] for name in options.shapes or NAMES if name in shapes]


def find_sides(shape: Shape, llama: str | None, wanted: list[str] | None) -> list[str]:
    """The sides of `wanted` (None: all) that can be measured here. Raises `PhiSightError` when
    one of them cannot."""
    reasons: dict[str, str] = {}
    if "avx512_bf16" not in describe_machine()["instructions"]:
        reasons["bitsandbytes_bf16"] = "this CPU has no AVX512-BF16"
    if llama is None:
        reasons |= dict.fromkeys((LLAMA, LLAMA_OF_FILE), "llama-cpp-python is not installed")
    for side in wanted or ():
        if side in reasons:
            raise PhiSightError(f"--sides {side}: {reasons[side]}; leave it out")
    here = [side for side in SIDES if side not in reasons and side in (wanted or SIDES)]
    return here if shape.gguf else [side for side in here if side != LLAMA_OF_FILE]


def plan_for(options: argparse.Namespace, shape: Shape, threads: int, rows: int) -> Plan:
    """What each side of a shape is asked for; no more tokens than it has positions."""
    asked = CONTEXTS_OF_ROWS if rows > 1 and shape.name == "full" else Plan.contexts
    most = shape.config["max_position_embeddings"] - options.tokens
    return Plan(
        threads=threads,
        rows=rows,
        contexts=tuple(context for context in asked if context <= most),
        tokens=options.tokens,
        seconds=options.seconds,
        limit=options.limit,
        vocabulary=min(shape.config["vocab_size"], 1000),
    )


def measure_all(options: argparse.Namespace, llama: str | None, work: Path) -> dict[str, Any]:
    """The whole benchmark; prints its tables unless one JSON object is wanted."""
    begun, machine = time.perf_counter(), describe_machine()
    say = (lambda text: None) if options.json else (lambda text: print(text, flush=True))
    say(json.dumps(machine, indent=1))
    measurements, cold = list[dict[str, Any]](), list[dict[str, Any]]()
    for shape in find_shapes(options):
        sides = find_sides(shape, llama, options.sides)
        files = turns.gguf_files(shape, sides, llama, work)
        for threads in options.threads:
            for rows in options.rows:
                plan = plan_for(options, shape, threads, rows)
                found, bandwidth = turns.take_turns(
                    shape, sides, plan, options.repeats, files, llama
                )
                say(turns.table(found, bandwidth))
                measurements += [one.to_json(bandwidth) for one in found]
            if shape.folder and "ours" in sides:
                cold += starts.cold_starts(
                    shape, sides, threads, options.repeats, files, llama, work
                )
    say(starts.table(cold))
    return {
        "machine": machine,
        "repeats": options.repeats,
        "measurements": measurements,
        "cold_starts": cold,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def measure_quickly(shape: Shape, plan: Plan, llama: str | None, work: Path) -> dict[str, Any]:
    """One object: one turn of ours, of bitsandbytes in float32 and, where it is installed, of
    llama.cpp. Rates are tokens/s of all rows together; ratios are ours over theirs."""
    begun, machine = time.perf_counter(), describe_machine()
    wanted = ["ours", "transformers"] + [LLAMA] * (llama is not None)
    sides = find_sides(shape, llama, wanted)
    files = turns.gguf_files(shape, sides, llama, work)
    found, bandwidth = turns.take_turns(shape, sides, plan, 1, files, llama)
    by_side = {one.side: one for one in found}
    decoded, read = max(plan.decode_at), max(plan.contexts)

    def ratio(figure: str, context: int, other: str) -> float | None:
        rates = [
            by_side[side].median(figure, context) if side in by_side else None
            for side in ("ours", other)
        ]
        return turns.rounded(rates[0] / rates[1]) if rates[0] and rates[1] else None

    return {
        "machine": machine,
        "shape": f"{shape.about}: {shape.config['num_hidden_layers']} layers and the head",
        "layers": shape.config["num_hidden_layers"],
        "threads": plan.threads,
        "rows": plan.rows,
        "decode_context_tokens": decoded,
        "prefill_tokens": read,
        "read_bandwidth_gb_per_second": turns.rounded(bandwidth),
        "ratio_to_bitsandbytes": ratio("decode", decoded, "transformers"),
        "ratio_to_llama_cpp": ratio("decode", decoded, LLAMA),
        "prefill_ratio_to_bitsandbytes": ratio("prefill", read, "transformers"),
        "prefill_ratio_to_llama_cpp": ratio("prefill", read, LLAMA),
        "llama_cpp": "measured" if llama else "not installed",
        "measurements": [one.to_json(bandwidth) for one in found],
        "seconds": round(time.perf_counter() - begun, 1),
    }


def quick_text(facts: dict[str, Any]) -> str:
    """What a person reads of `measure_quickly`."""
    lines = [
        f"{facts['shape']}; {facts['threads']} threads, memory read at "
        f"{facts['read_bandwidth_gb_per_second']} GB/s"
    ]
    for one in facts["measurements"]:
        rates = (one[name] for name in turns.FIGURES.values())
        read, decode = (next(reversed(list(rate.values()))) for rate in rates)
        lines.append(f"{one['side']:18} reads {read} and decodes {decode} tokens/s")
    for other in ("bitsandbytes", "llama_cpp"):
        figures = [facts[f"{kind}ratio_to_{other}"] for kind in ("", "prefill_")]
        told = " and ".join("-" if figure is None else f"{figure}" for figure in figures)
        lines.append(f"times {other}, decoding and reading: {told}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = Parser(prog="decode.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few layers, one turn, a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--shapes", nargs="+", choices=NAMES, help="default: all that are here")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default: all that are here")
    parser.add_argument("--layers", type=int, help=f"of the full shape (32; {QUICK_LAYERS}, quick)")
    parser.add_argument("--smollm2", type=Path, metavar="DIR", help="smollm2-phi3, smollm2.gguf")
    parser.add_argument("--llama-python", metavar="FILE", help="interpreter with llama_cpp, gguf")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2; all cores, quick")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="prompts at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="decoded, at most")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="decoding, at most")
    parser.add_argument("--limit", type=float, default=Plan.limit, help="seconds of one prompt")
    return parser.parse_args()


def main() -> None:
    options = parse()
    llama = find_llama(options.llama_python, "llama_cpp, gguf")
    with tempfile.TemporaryDirectory() as name:
        if options.quick:
            threads = (options.threads or [len(os.sched_getaffinity(0))])[0]
            plan = dataclasses.replace(QUICK, threads=threads)
            shape = full_shape(options.layers or QUICK_LAYERS)
            facts = measure_quickly(shape, plan, llama, Path(name))
            print(json.dumps(facts) if options.json else quick_text(facts))
            return
        options.layers, options.threads = options.layers or LAYERS, options.threads or [1, 2]
        facts = measure_all(options, llama, Path(name))
    if options.json:
        print(json.dumps(facts))


if __name__ == "__main__":
    run_main(main)
