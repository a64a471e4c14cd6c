"""What 4 bits cost a run that was trained as always, and one that was trained on rounded weights.

    python -m benchmarks.merge_aware [--seeds 3] [--shapes tiny,smollm2] [--smollm2 FOLDER]

Each seed trains the same recipe twice, with `--merge-rounding none` and `nf4`: the tiny preset, and
SmolLM2-135M in Phi-3's layout over the same pictures. Validation loss and exact answers to
held-out questions are then measured of

    plain                  the run as it answers: NF4 base and adapter
    plain, naive           merged and rounded to NF4
    plain, GPTQ            merged and rounded with compensation: `export.py --requantize`
    merge-aware            the run as it answers
    merge-aware, written   the same by `export.py --requantize`, which rounds it as it was trained

With `--finish STEPS` the plain run goes on for so many steps at a small rate, both ways again:
"finished plain", "finished merge-aware".

The 4-bit models are written to a folder and read back. Every run is trained and measured once and
kept under `--out`: a program that was stopped goes on where it was. Prints a table, mean and
standard deviation over the seeds, and writes all figures to `--out`/merge_aware.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import threads  # noqa: F401 (before torch is loaded)

import torch

import config as configs
from assistant.assistant import Assistant
from benchmarks.machine import describe_machine
from config import Parser
from data.dataset import load_questions
from data.prepare import evenly_spaced
from errors import PhiSightError, run_main
from evaluation.questions import scores_by_kind
from exports import measure, requantize
from exports.calibrate import calibration_batches, language_model_in, merged_assistant
from exports.measure import Probe
from ops.nf4 import block_of
from ops.nf4_grid import FourBit, round_to_nearest
from paths import PROJECT

SHARED = {
    "lora_dropout": 0.0, "evaluate_steps": 0, "save_steps": 10, "threads": 1, "device": "cpu",
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {"max_steps": 480, "evaluation_conversations": 400},  # of the demo's 955 steps
    "smollm2": {
        "max_steps": 48, "batch_size": 4, "row_tokens": 192, "learning_rate": 1e-3,
        "evaluation_conversations": 150,
    },
}  # fmt: skip
CALIBRATION = {"tiny": 200, "smollm2": 64}  # conversations that GPTQ sees
ROUNDINGS = {"plain": "none", "merge-aware": "nf4"}
FINISHED = "finished "  # before the kind of a run that goes on from the plain one
FINISHING = {"learning_rate": 5e-4, "warmup_fraction": 0.0}


def train(run: Path, flags: Mapping[str, Any]) -> None:
    """Train the run to its end, from where it stands."""
    words = [f"{configs.flag_of(name)}={value}" for name, value in flags.items()]
    command = [sys.executable, "train.py", "--resume-if-any", f"--run={run}", *words]
    if subprocess.run(command, cwd=PROJECT, check=False, stdout=subprocess.DEVNULL).returncode:
        raise PhiSightError(
            f"{run}: its training ended as said above; mend that and run this again"
        )


def four_bit(assistant: Assistant, quantised: dict[str, FourBit]) -> Assistant:
    """The assistant over its merged model with these layers, written and read back."""
    base = assistant.parts.base
    empty = requantize.empty_four_bit(base.model.config, torch.float32)
    weights = language_model_in(merged_assistant(assistant)).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        requantize.write_four_bit(Path(folder), base, empty, quantised, weights, torch.float32)
        return requantize.read_back(assistant, Path(folder))


def rounded_models(assistant: Assistant, kind: str, probe: Probe, calibration: int) -> dict:
    """Name of a model -> its 4-bit layers."""
    changed = merged_assistant(assistant)
    model = language_model_in(changed)
    empty = requantize.empty_four_bit(model.config, torch.float32)
    blocks = {name: block_of(layer) for name, layer in requantize.four_bit_layers(empty)}
    if is_aware(kind):
        return {f"{kind}, written": requantize.as_trained(changed, blocks)[0]}
    naive = {
        name: round_to_nearest(requantize.weight_of(model, name), block)
        for name, block in blocks.items()
    }
    batches = calibration_batches(assistant, probe, calibration)
    compensated = requantize.compensate(changed, blocks, batches)
    return {f"{kind}, naive": naive, f"{kind}, GPTQ": compensated}


def is_aware(kind: str) -> bool:
    return ROUNDINGS[kind.removeprefix(FINISHED)] == "nf4"


def measured(
    run: Path, shape: str, kind: str, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Name of a model that comes from the run -> its loss and its share of exact answers."""
    assistant = Assistant.load(run)
    probe = measure.make_probe(assistant, options.questions)
    config = assistant.config
    questions = evenly_spaced(load_questions(Path(config.held_out_questions)), options.questions)
    results = {}

    def note(name: str, model: Assistant) -> None:
        found = measure.measure(model, probe, name)
        exact = scores_by_kind(questions, found.answers)["exact"]
        results[name] = {"loss": found.loss, "exact": exact}

    note(kind, assistant)
    calibration = options.calibration or CALIBRATION[shape]
    for name, quantised in rounded_models(assistant, kind, probe, calibration).items():
        note(name, four_bit(assistant, quantised))
    return results


def figures_of(shape: str, seed: int, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Of one run, which is trained and measured if it is not yet."""
    out = Path(options.out).absolute()
    run = out / f"{shape}-{seed}-{kind.replace(' ', '-')}"
    kept = run / "measured.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    rounding = "nf4" if is_aware(kind) else "none"
    flags = SHARED | RECIPES[shape] | {"seed": seed, "merge_rounding": rounding}
    if shape == "smollm2":
        flags |= {"base": Path(options.smollm2).absolute(), "base_cache": run.parent / "bases"}
    if options.steps:
        flags["max_steps"] = options.steps
    if kind.startswith(FINISHED):
        started = {"start_from": out / f"{shape}-{seed}-plain", "max_steps": options.finish}
        flags |= FINISHING | started
    train(run, flags)
    log = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    clocks = [record["timing"]["seconds"] for record in log if record.get("kind") == "train"]
    figures = {
        "shape": shape,
        "seed": seed,
        "kind": kind,
        "steps": flags["max_steps"],
        "seconds": round(sum(clocks), 1),
        "models": measured(run, shape, kind, options),
    }
    kept.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def table_of(all_figures: list[dict[str, Any]]) -> str:
    """Models down, loss and exact answers across; mean and standard deviation over the seeds."""
    lines = []
    for shape in dict.fromkeys(figures["shape"] for figures in all_figures):
        here = [figures for figures in all_figures if figures["shape"] == shape]
        seeds = len({figures["seed"] for figures in here})
        lines.append(f"{shape + f', {seeds} seeds':30}{'loss, nats a token':>22}{'exact, %':>18}")
        for name in dict.fromkeys(name for figures in here for name in figures["models"]):
            found = [f["models"][name] for f in here if name in f["models"]]
            if found:
                loss = spread([one["loss"] for one in found], 4)
                exact = spread([one["exact"] for one in found], 1)
                lines.append(f"{name:30}{loss:>22}{exact:>18}")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} +- {deviation:.{digits}f}"


def main() -> None:
    parser = Parser(prog="merge_aware.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shapes", default="tiny,smollm2")
    parser.add_argument("--smollm2", default="", help="folder of SmolLM2 in Phi-3's layout")
    parser.add_argument("--out", default="runs/merge-aware", help="folder of the runs")
    parser.add_argument("--steps", type=int, default=0, help="of each run, in place of its own")
    parser.add_argument("--finish", type=int, default=0, help="steps that plain runs go on for")
    parser.add_argument("--questions", type=int, default=300, help="held-out ones that are asked")
    parser.add_argument("--calibration", type=int, default=0, help="conversations, for GPTQ")
    options = parser.parse_args()
    shapes = options.shapes.split(",")
    if unknown := set(shapes) - set(RECIPES):
        raise PhiSightError(f"--shapes {unknown.pop()}: unknown; choose from {', '.join(RECIPES)}")
    if "smollm2" in shapes and not Path(options.smollm2, "config.json").is_file():
        raise PhiSightError(
            f"--smollm2 {options.smollm2!r}: no model lies there; give its folder, or --shapes tiny"
        )
    all_figures: list[dict[str, Any]] = []
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for shape in shapes:
            for kind in [*ROUNDINGS, *(FINISHED + kind for kind in ROUNDINGS if options.finish)]:
                all_figures.append(figures_of(shape, seed, kind, options))
                print(json.dumps(all_figures[-1]), flush=True)
    result = {"machine": describe_machine(), "runs": all_figures}
    (out / "merge_aware.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table_of(all_figures))


if __name__ == "__main__":
    run_main(main)
