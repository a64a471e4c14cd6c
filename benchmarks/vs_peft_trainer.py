"""Training, beside transformers' Trainer with PEFT: the same samples, weights, optimiser, threads.

    python -m benchmarks.vs_peft_trainer [--shapes tiny,mid] [--repeats 5] [--steps 8]
    python -m benchmarks.vs_peft_trainer --parity            # losses of 50 steps, dropout 0

Both sides start from the same NF4 base (ours, from `load_base`), the same A, B and projector, and
see the same samples in every step; AdamW, schedule, clipping and the loss averaged over the
answer tokens are the same. Ours runs `train.py`'s own functions. Theirs is what a user of these
libraries writes: `get_peft_model` on the fused projections, a module that splices the projected
pictures in, `Trainer` with its default optimiser, and a collator that pads to the longest row.
Nothing is logged, saved or evaluated. Each measurement is a process of its own; the sides take
turns. The first steps are not counted; memory is the peak of the resident set after them.

What is trained stands in benchmarks/shapes.py, their side in benchmarks/peft_trainer.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import threads  # noqa: F401 (before torch is loaded)

import torch
from tqdm import tqdm

import config as configs
import config_values
import train
from benchmarks.peft_trainer import grouped, train_theirs
from benchmarks.shapes import ROOT, mid_config, tiny_config
from config import Config, Parser
from data.collate import Batch, collate
from errors import PhiSightError, run_main
from lora.dropout import key_of
from training.batches import chunks, make_batches
from training.options import RunOptions
from training.ranks import Ranks
from training.run import Run, prepare_run
from training.schedule import lr_at
from training.step import train_step

SIDES = {
    "ours": "ours, packed rows",
    "ours-unpacked": "ours, a row a sample",
    "theirs": "Trainer + PEFT",
    "theirs-grouped": "Trainer + PEFT, group_by_length",
}
WARM_UP = 2  # steps that are not counted


def prepared(config: Config) -> Run:
    """All that `train.py` has before its first step."""
    return prepare_run(config, None, RunOptions(overwrite=True), Ranks())


def samples_of_steps(run: Run, steps: int) -> list[list[list[int]]]:
    """step -> micro-batch -> samples, for the first steps of training."""
    found: list[list[list[int]]] = []
    for epoch in range(run.config.epochs):
        rows = run.rows.of_epoch(epoch)
        micro = [[i for row in chunk for i in row] for chunk in chunks(rows, run.config.batch_size)]
        found += chunks(micro, run.config.accumulation)
    return found[:steps]


def train_ours(run: Run, steps: int, packed: bool = True) -> Iterator[float]:
    """Each step's loss, by the functions of `train.py` that its loop calls."""
    config, progress = run.config, run.progress
    chosen = samples_of_steps(run, steps)
    for step in range(steps):
        rows = len(run.rows.of_epoch(progress.epoch))
        end = min(progress.row + config.batch_size * config.accumulation, rows)
        batches = (
            list(make_batches(run, progress.epoch, range(progress.row, end)))
            if packed
            else [a_row_a_sample(run, micro) for micro in chosen[step]]
        )
        rate = lr_at(
            step, run.total_steps, config.warmup_fraction, config.learning_rate, config.schedule
        )
        result = train_step(
            run.parts.model, run.optimizer, run.scaler, batches, rate, config.max_gradient_norm
        )
        progress.row = end % rows
        progress.epoch += end == rows
        yield result.loss_sum / result.supervised_tokens


def a_row_a_sample(run: Run, samples: Sequence[int]) -> Batch:
    """Rows of one sample each, padded to the longest."""
    return collate(
        [[run.data.train[i]] for i in samples],
        run.store.features_of,
        run.parts.chat_format.padding_id,
        run.parts.chat_format.image_id,
        run.store.shape,
        row_keys=[key_of(run.config.seed, 0, i) for i in samples],
    )


# -- one measurement, in a process of its own ------------------------------------------------------


def measure(side: str, config: Config, steps: int) -> dict[str, Any]:
    """Train `WARM_UP` + `steps` steps as `side` does; the figures of the last `steps`."""
    run = prepared(config)
    chosen = samples_of_steps(run, WARM_UP + steps)
    losses: list[float] = []
    clocks: list[tuple[float, float]] = []

    def after_step() -> None:
        if len(clocks) == WARM_UP - 1:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts anew
        clocks.append((time.perf_counter(), time.process_time()))

    if side.startswith("ours"):
        for loss in train_ours(run, WARM_UP + steps, packed=side != "ours-unpacked"):
            losses.append(loss)
            after_step()
    else:
        torch.use_deterministic_algorithms(False)  # as the Trainer runs unless told otherwise
        if side == "theirs-grouped":
            chosen = chosen[:WARM_UP] + grouped(run, chosen[WARM_UP:])
        losses = train_theirs(run, chosen, after_step)
    timed = [run.data.train[i] for step in chosen[WARM_UP:] for micro in step for i in micro]
    return {
        "side": side,
        "samples": len(timed),
        "seconds": clocks[-1][0] - clocks[WARM_UP - 1][0],
        "processor_seconds": clocks[-1][1] - clocks[WARM_UP - 1][1],
        "tokens": sum(len(sample.input_ids) for sample in timed),
        "memory_mb": resident("VmHWM") / 1e6,
        "losses": losses,
    }


def resident(field: str) -> int:
    """Bytes of VmHWM (peak) or VmRSS (now) of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise PhiSightError(f"/proc/self/status: has no {field}; run this on Linux")


def in_a_process(*arguments: object) -> dict[str, Any]:
    """This program with these arguments in a process of its own; the JSON that it prints last."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vs_peft_trainer", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise PhiSightError(
            f"{' '.join(map(str, arguments))}: ended with status"
            f" {done.returncode}: {done.stderr.strip()[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


# -- the table -------------------------------------------------------------------------------------


def compare(shape: str, config_file: Path, options: argparse.Namespace) -> None:
    """Every side in turn, `--repeats` times; medians, and ratios to the Trainer."""
    sides = options.sides.split(",")
    found: dict[str, list[dict]] = {side: [] for side in sides}
    bar = tqdm(total=options.repeats * len(found), desc=shape, disable=None)
    for _ in range(options.repeats):
        for side, results in found.items():
            results.append(
                in_a_process("--side", side, "--config", config_file, "--steps", options.steps)
            )
            bar.write(f"{side}: {results[-1]['seconds']:.2f} s")
            bar.update()
    first = found["theirs"][0]
    print(
        f"\n{shape}: {options.repeats} x {options.steps} steps, {options.threads} threads,"
        f" {first['samples']} samples of {first['tokens']:,} tokens"
    )
    print(
        f"{'':38}{'samples/s':>10}{'tokens/s':>10}{'wall s':>8}{'spread':>16}{'CPU s':>8}"
        f"{'peak MB':>9}{'speed':>8}{'by CPU s':>10}{'memory':>8}"
    )
    for side, results in found.items():
        print(line_of(side, results, found["theirs"]), flush=True)


def line_of(side: str, mine: list[dict], theirs: list[dict]) -> str:
    """Medians of a side, and its ratios to the Trainer.

    A ratio is taken in each turn, and then the median: what slows the machine slows both sides.
    """

    def median(name: str) -> float:
        return statistics.median(result[name] for result in mine)

    def ratio(name: str) -> float:
        return statistics.median(
            (one["samples"] / one[name]) / (other["samples"] / other[name])
            for one, other in zip(mine, theirs, strict=True)
        )

    seconds, samples, tokens = median("seconds"), mine[0]["samples"], mine[0]["tokens"]
    spread = sorted(result["seconds"] for result in mine)
    memory = statistics.median(result["memory_mb"] for result in theirs)
    return (
        f"{SIDES[side]:38}{samples / seconds:>10.2f}{tokens / seconds:>10,.0f}"
        f"{seconds:>8.2f}{f'{spread[0]:.2f} to {spread[-1]:.2f}':>16}"
        f"{median('processor_seconds'):>8.2f}{median('memory_mb'):>9,.0f}"
        f"{ratio('seconds'):>7.2f}x{ratio('processor_seconds'):>9.2f}x"
        f"{median('memory_mb') / memory:>7.2f}x"
    )


def parity(config: Config, steps: int, folder: Path) -> list[float]:
    """Differences of the losses of `steps` steps, dropout 0: `train.py` itself, and the Trainer."""
    config = configs.replace(
        config,
        lora_dropout=0.0,
        max_steps=steps,
        log_steps=1,
        evaluate_steps=0,
        save_steps=steps,
        run=str(folder / "ours"),
    )
    train.train(config, None, RunOptions(overwrite=True))
    log = [
        json.loads(line)
        for line in (folder / "ours/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ours = [record["loss"] for record in log if record["kind"] == "train"]
    run = prepared(configs.replace(config, run=str(folder / "theirs")))
    theirs = train_theirs(run, samples_of_steps(run, steps))
    return [mine - other for mine, other in zip(ours, theirs, strict=True)]


def main() -> None:
    parser = Parser(prog="vs_peft_trainer.py", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="tiny,mid")
    parser.add_argument(
        "--sides", default=",".join(SIDES), help="which of the four; theirs among them"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps that count, after the warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture-tokens", type=int, default=144, help="of mid; a square number")
    parser.add_argument("--parity", action="store_true", help="compare losses instead of speed")
    parser.add_argument("--side", choices=SIDES, help="one measurement; for this program itself")
    parser.add_argument("--config", type=Path, help="the run to measure; goes with --side")
    options = parser.parse_args()
    if options.side:
        config = config_values.from_dict(
            json.loads(options.config.read_text(encoding="utf-8")), str(options.config)
        )
        with tempfile.TemporaryDirectory() as name:
            config = configs.replace(config, run=str(Path(name) / "run"))
            print(json.dumps(measure(options.side, config, options.steps)))
        return
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder, steps = Path(name), 50 if options.parity else WARM_UP + options.steps
            config = (
                tiny_config(folder, steps)
                if shape == "tiny"
                else mid_config(folder, steps, options.picture_tokens)
            )
            config = configs.replace(
                config, threads=options.threads, device="cpu", evaluate_steps=0
            )
            if options.parity:
                differences = parity(config, steps, folder)
                print(
                    f"{shape}: losses of {steps} steps differ by at most"
                    f" {max(map(abs, differences)):.2g}"
                )
                continue
            prepared(config)  # the features, once
            (folder / "config.json").write_text(
                json.dumps(config_values.to_dict(config)), encoding="utf-8"
            )
            compare(shape, folder / "config.json", options)


if __name__ == "__main__":
    run_main(main)
