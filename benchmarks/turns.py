"""The sides of benchmarks/decode.py in turns, each measurement a process of its own, and the table
of what they gave."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.measuring import Plan
from benchmarks.processes import in_a_process
from model.families import PHI3

LLAMA = "llama_cpp_q4_0"
LLAMA_OF_FILE = "llama_cpp_q4_1"
FIGURES = {"prefill": "prefill_tokens_per_second", "decode": "decode_tokens_per_second"}


@dataclass(frozen=True)
class Shape:
    """A model that is measured."""

    name: str
    about: str
    config: dict[str, Any]
    """as config.json"""
    folder: Path | None
    """of its weights; None for random ones"""
    gguf: Path | None = None
    """the same weights in Q4_1, as llama.cpp reads them; None for random ones"""


@dataclass
class Measurement:
    """One side at one shape, number of threads and of prompts at once: medians of its turns."""

    shape: Shape
    side: str
    plan: Plan
    turns: list[dict[str, Any]] = field(default_factory=list)
    """as `measuring.measure` gives them, with what the side says of itself"""

    def median(self, figure: str, context: int) -> float | None:
        """Of `figure` ("prefill", "decode" or "decoded") at a context, where any turn has it."""
        given = [turn[figure].get(str(context)) for turn in self.turns]
        seen = [value for value in given if value is not None]
        return statistics.median(seen) if seen else None

    def bytes_of_a_step(self, context: int) -> float:
        """That decoding one token of every row reads at least, in the midst of the decoding."""
        about, plan = self.turns[0]["step_bytes"], self.plan
        behind = context + (self.median("decoded", context) or 0) / 2
        return about["weights"] + plan.rows * behind * about["a_token"]

    def share_of_limit(self, context: int, bandwidth: float) -> float | None:
        """Of the steps a second that reading these bytes at `bandwidth` (GB/s) would allow."""
        rate = self.median("decode", context)
        if rate is None:
            return None
        return rate / self.plan.rows * self.bytes_of_a_step(context) / (bandwidth * 1e9)

    def to_json(self, bandwidth: float) -> dict[str, Any]:
        """All that is known of it; `bandwidth` in GB/s."""
        decode_at = [context for context in self.plan.contexts if context in self.plan.decode_at]
        figures = {
            name: {str(context): rounded(self.median(figure, context)) for context in contexts}
            for (figure, name), contexts in zip(
                FIGURES.items(), (self.plan.contexts, decode_at), strict=True
            )
        }
        last = self.turns[-1]
        measured = {*FIGURES, "decoded", "resident_mb", "peak_mb", "processor_share", "step_bytes"}
        return {
            "shape": self.shape.name,
            "layers": self.shape.config["num_hidden_layers"],
            "side": self.side,
            "threads": self.plan.threads,
            "rows": self.plan.rows,
            **figures,
            "share_of_read_bandwidth": {
                str(context): rounded(self.share_of_limit(context, bandwidth))
                for context in decode_at
            },
            "bytes_of_a_step": {
                str(context): round(self.bytes_of_a_step(context)) for context in decode_at
            },
            "resident_mb": statistics.median(turn["resident_mb"] for turn in self.turns),
            "peak_mb": statistics.median(turn["peak_mb"] for turn in self.turns),
            "processor_share": min(turn["processor_share"] for turn in self.turns),
            "about": {name: value for name, value in last.items() if name not in measured},
        }


def rounded(figure: float | None) -> float | None:
    """Four digits that count."""
    return None if figure is None else float(f"{figure:.4g}")


def gguf_files(
    shape: Shape, sides: Sequence[str], python: str | None, work: Path
) -> dict[str, Path]:
    """The file of each of llama.cpp's sides; Q4_0 ones are written to `work`."""
    files: dict[str, Path] = {}
    if python is None:
        return files
    module, path = "benchmarks.llama_cpp_side", work / f"{shape.name}-q4_0.gguf"
    if shape.gguf:
        files[LLAMA_OF_FILE] = shape.gguf
    if LLAMA in sides:
        config = dataclasses.asdict(PHI3.decoder_config(shape.config))
        asked: dict[str, Any] = {"write": str(path), "config": config}
        if shape.gguf:
            asked = {"requantise": str(shape.gguf), "to": str(path)}
        in_a_process(module, asked, 1, python)
        files[LLAMA] = path
    return files


def one_turn(
    shape: Shape, side: str, plan: Plan, files: Mapping[str, Path], python: str | None
) -> dict[str, Any]:
    """One measurement of one side."""
    asked: dict[str, Any] = {"plan": plan.to_json()}
    if side in (LLAMA, LLAMA_OF_FILE):
        assert python is not None, "llama.cpp's sides are only asked for where it is installed"
        asked["measure"] = str(files[side])
        return in_a_process("benchmarks.llama_cpp_side", asked, plan.threads, python)
    asked |= {"side": side, "base": str(shape.folder) if shape.folder else shape.config}
    return in_a_process("benchmarks.torch_sides", asked, plan.threads)


def take_turns(
    shape: Shape,
    sides: Sequence[str],
    plan: Plan,
    repeats: int,
    files: Mapping[str, Path],
    python: str | None,
) -> tuple[list[Measurement], float]:
    """Each side `repeats` times, in turns, and the read bandwidth beside them: the median of the
    turns, GB/s."""
    found = {side: Measurement(shape, side, plan) for side in sides}
    bandwidth = []
    name = f"{shape.name}, {plan.rows} at once, {plan.threads} threads"
    with tqdm(total=repeats * len(sides), desc=name, disable=None) as bar:
        for _ in range(repeats):
            asked = {"threads": plan.threads}
            read = in_a_process("benchmarks.bandwidth", asked, plan.threads)
            bandwidth.append(read["gb_per_second"])
            for side, measurement in found.items():
                measurement.turns.append(one_turn(shape, side, plan, files, python))
                bar.update()
    return list(found.values()), statistics.median(bandwidth)


def table(found: Sequence[Measurement], bandwidth: float) -> str:
    """What a person reads: a line for each side. Tokens/s are those of all rows together."""
    shape, plan = found[0].shape, found[0].plan
    head = (
        f"\n{shape.about}, {shape.config['num_hidden_layers']} layers: {plan.rows} at once, "
        f"{plan.threads} threads, memory read at {bandwidth:.1f} GB/s\n"
        "tokens/s; after / the share of what reading memory allows; last, the share of its cores\n"
    )
    decode_at = [context for context in plan.contexts if context in plan.decode_at]
    columns = [f"read {context}" for context in plan.contexts]
    columns += [f"decode at {context}" for context in decode_at]
    lines = [
        f"{'':18}"
        + "".join(f"{column:>16}" for column in columns)
        + f"{'memory, MB':>12}{'of cores':>10}"
    ]
    for one in found:
        cells = [cell(one.median("prefill", context)) for context in plan.contexts]
        for context in decode_at:
            share = one.share_of_limit(context, bandwidth)
            text = cell(one.median("decode", context))
            cells.append(text if share is None else f"{text} / {share:.2f}")
        memory = statistics.median(turn["resident_mb"] for turn in one.turns)
        cores = min(turn["processor_share"] for turn in one.turns)
        figures = "".join(f"{c:>16}" for c in cells)
        lines.append(f"{one.side:18}{figures}{memory:>12.0f}{cores:>10.2f}")
    return head + "\n".join(lines)


def cell(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.3g}" if figure < 100 else f"{figure:.0f}"
