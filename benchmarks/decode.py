"""Tokens a second of answering: our decoder and its cache, beside transformers' generate.

    python -m benchmarks.decode                       # tiny and mid, alone and 16 at once
    python -m benchmarks.decode --threads 2 --new-tokens 128

Both sides have the same 4-bit weights and prompts of random tokens, without an adapter, and
each measurement is a process of its own: threads of one library that wait would take the cores from
the other. The first token, which reads the prompt, is not counted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from assistant.decoding import Decoding
from benchmarks.peft_trainer import hub_base
from benchmarks.shapes import ROOT, write_models
from config import Parser
from errors import PhiSightError, run_main
from model.base import BaseModel, load_base
from model.projector import ImageProjector
from model.vlm import VisionLanguageModel

SIDES = ("ours", "theirs")
NO_PICTURE = -1  # a placeholder that no token is


class Prompt:
    """A row for `Decoding`."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.image_features = ids, torch.zeros(0, 1, 8)


def measure(side: str, base: BaseModel, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens a second after the first token of each prompt."""
    return (ours if side == "ours" else theirs)(base, prompts, new_tokens)


@torch.no_grad()
def ours(base: BaseModel, prompts: list[list[int]], new_tokens: int) -> float:
    projector = ImageProjector(8, base.model.config.hidden_size)
    model = VisionLanguageModel(base.model, projector, NO_PICTURE).eval()
    decoding: Decoding[Prompt] = Decoding(model)
    decoding.add([Prompt(list(ids)) for ids in prompts])
    started = time.perf_counter()
    for _ in range(new_tokens):
        decoding.advance(decoding.logits.argmax(-1).tolist())
    return len(prompts) * new_tokens / (time.perf_counter() - started)


@torch.no_grad()
def theirs(base: BaseModel, prompts: list[list[int]], new_tokens: int) -> float:
    model, clocks = hub_base(base).eval(), []

    def stop(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        clocks.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    model.generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
        max_new_tokens=new_tokens + 1,
        min_new_tokens=new_tokens + 1,
        do_sample=False,
        stopping_criteria=[stop],
    )
    return len(prompts) * new_tokens / (clocks[-1] - clocks[0])


def in_a_process(*arguments: object) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decode", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise PhiSightError(f"{arguments}: ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(shape: str, folder: Path, rows: int, repeats: int, more: list[object]) -> None:
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in tqdm(range(repeats), desc=f"{shape}, {rows} at once", disable=None):
        for side in SIDES:
            rates[side].append(
                in_a_process("--side", side, "--base", folder, "--rows", rows, *more)
            )
    ratios = [mine / other for mine, other in zip(rates["ours"], rates["theirs"], strict=True)]
    medians = {side: statistics.median(rate) for side, rate in rates.items()}
    print(
        f"{shape:6}{rows:>8}{medians['ours']:>14.1f}{medians['theirs']:>14.1f}"
        f"{statistics.median(ratios):>8.2f}x   {min(ratios):.2f} to {max(ratios):.2f}",
        flush=True,
    )


def main() -> None:
    parser = Parser(prog="decode.py", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--side", choices=SIDES, help="one measurement; for this program itself")
    parser.add_argument("--base", help="folder of the base; goes with --side")
    parser.add_argument("--rows", type=int, default=1, help="prompts at once; goes with --side")
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(options.threads)
        base = load_base(options.base, None, torch.float32, "cpu", "nf4")
        size = (options.rows, options.prompt_tokens)
        prompts = torch.randint(10, 1000, size, generator=torch.Generator().manual_seed(0))
        print(json.dumps(measure(options.side, base, prompts.tolist(), options.new_tokens)))
        return
    more: list[object] = ["--threads", options.threads, "--new-tokens", options.new_tokens]
    more += ["--prompt-tokens", options.prompt_tokens]
    print(f"{'':6}{'at once':>8}{'ours':>14}{'transformers':>14}{'ratio':>9}   spread")
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name), 12)
        for shape, folder in (
            ("tiny", ROOT / "assets/tiny/phi3"),
            ("mid", Path(name) / "base"),
        ):
            for rows in (1, 16):
                compare(shape, folder, rows, options.repeats, more)


if __name__ == "__main__":
    run_main(main)
