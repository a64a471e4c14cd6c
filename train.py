"""Train the adapter and the projector: the loop and nothing else.

    python train.py                          # the tiny preset, from the start
    python train.py --resume                 # go on from the newest valid checkpoint, bit for bit
    python train.py --preset phi35 --data llava_instruct_150k.json --images train2017

config -> data -> features -> rows -> model + LoRA -> step -> checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import checkpoints
import config as configs
import meter
from config import Config
from data.collate import Batch, collate
from data.dataset import write_quarantine
from data.features import FeatureStore
from data.prepare import TrainingData, prepare
from data.sampler import plan
from errors import PhiSightError, run_main
from metrics import MetricsLog, console_line, draw_curves, peak_memory_mb
from model.build import Assembled, assemble, load_model_state, model_state
from model.vision import VisionTower
from model.vlm import owner_of
from optim import AdamW, LossScaler, clip_gradients, lr_at, owner_gradient_norms

# Fields that may differ between a checkpoint and the run that resumes it: they say where things lie
# and how often something is written, never what the next step computes.
FREE_FIELDS = ("run", "features", "save_steps", "keep_checkpoints", "strict")


@dataclass
class Progress:
    """Where the run stands. All of it is in every checkpoint; nothing else is remembered."""

    step: int = 0
    """optimiser steps made"""
    epoch: int = 0
    row: int = 0
    """next row of this epoch's plan"""
    best_loss: float | None = None
    evaluations_without_better: int = 0
    finished: str = ""
    """why the run is over, or empty"""
    recent_losses: list[float] = field(default_factory=list)
    """mean loss of the latest logged windows"""
    window: dict[str, float] = field(default_factory=dict)
    """sums since the last logged step"""


# -- the loop -------------------------------------------------------------------------------------


def train(config: Config, resume: checkpoints.Checkpoint | None, options: RunOptions) -> Progress:
    """One run, from `resume` or from nothing, until it is finished or asked to stop."""
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    # On a GPU torch refuses matrix products in deterministic mode unless cuBLAS was told, before
    # its first use, to work in buffers of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)

    parts = assemble(config)
    store = FeatureStore(config.features, parts.vision.key, parts.vision.shape)
    data = prepare(config, parts.chat_format, store,
                   lambda: VisionTower(parts.vision, parts.device))
    run = Path(config.run)

    lengths = [len(sample.input_ids) for sample in data.train]
    row_tokens = config.row_tokens or max(lengths)
    plans = [plan(config.seed, epoch, lengths, row_tokens) for epoch in range(config.epochs)]
    rows_per_step = config.batch_size * config.accumulation
    total_steps = sum(-(-len(rows) // rows_per_step) for rows in plans)
    total_steps = min(total_steps, config.max_steps or total_steps)

    model = parts.model.train()
    if config.gradient_checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = AdamW(model.trainable(), (config.adam_beta1, config.adam_beta2),
                      config.adam_epsilon, config.weight_decay)
    scaler = LossScaler(enabled=parts.base.compute_dtype == torch.float16)
    seed_generators(config.seed)  # here: a CLIP that had to be loaded for features draws numbers
    progress = Progress()
    log = MetricsLog(run / "metrics.jsonl")
    facts = describe_run(config, parts, data, total_steps)
    if resume is None:
        if options.overwrite:  # only now that nothing is left that could keep the run from starting
            checkpoints.remove_all(run)
        log.truncate_to(0)
    else:
        check_same_run(resume.config, facts, options.allow_changes)
        check_place(resume.trainer_state, plans, total_steps)
        progress = restore(resume, parts, optimizer, scaler, log)
    write_quarantine(run / "quarantine.jsonl", data.quarantined)  # a refused resume changes nothing
    announce(config, parts, data, plans, row_tokens, total_steps, progress)

    def save() -> None:
        log.sync()
        state = model_state(model) | {
            "optimizer": optimizer.state_tensors(), "rng": checkpoints.rng_state()
        }
        trainer_state = dataclasses.asdict(progress) | {
            "loss_scaler": scaler.state_dict(), "metrics_offset": log.offset(),
            "total_steps": total_steps, "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        checkpoints.save(run, progress.step, state, facts, trainer_state, parts.base.tokenizer,
                         config.keep_checkpoints)

    features_of, padding = store.features_of, parts.chat_format.end_of_text_id
    bar = tqdm(total=total_steps, initial=progress.step, desc="training", unit="step",
               disable=None)
    with StopSignals() as stop:
        while not progress.finished:
            clock = time.perf_counter()
            rows = plans[progress.epoch][progress.row : progress.row + rows_per_step]
            batches = [
                collate([[data.train[i] for i in row] for row in chunk], features_of, padding,
                        store.shape).to(parts.device)
                for chunk in chunks(rows, config.batch_size)
            ]
            rate = lr_at(progress.step, total_steps, config.warmup_fraction, config.learning_rate,
                         config.schedule)
            logging = (progress.step + 1) % config.log_steps == 0
            result = train_step(model, optimizer, scaler, batches, rate, config.max_gradient_norm,
                                measure_updates=logging)

            progress.step += 1
            progress.row += len(rows)
            if progress.row >= len(plans[progress.epoch]):
                progress.epoch, progress.row = progress.epoch + 1, 0
            # After --allow-changes the rows can be used up before the steps are.
            if progress.step == total_steps or progress.epoch == len(plans):
                progress.finished = "all steps done"
            add_to_window(progress, result, batches, time.perf_counter() - clock)
            if logging or progress.finished:
                record = close_window(progress, rate, result)
                log.write(record)
                bar.write(console_line(record))
                if rate > 0:  # the first rate of a warm-up is 0
                    warn_of_still_owners(result)
            if config.evaluate_steps and (
                progress.step % config.evaluate_steps == 0 or progress.finished
            ):
                evaluate(progress, config, parts, data, store, row_tokens, log, bar)
            bar.update()
            stopping = stop.requested or progress.step == options.stop_at_step
            if progress.finished or stopping or progress.step % config.save_steps == 0:
                save()
            if stopping and not progress.finished:
                bar.close()
                print(f"stopped at step {progress.step} of {total_steps}, saved; go on with: "
                      f"{resume_command(config)}")
                return progress
    bar.close()
    draw_curves(run / "metrics.jsonl", run / "curves.png")
    print(f"finished at step {progress.step}: {progress.finished}; curves in {run / 'curves.png'}")
    return progress


@dataclass
class StepResult:
    """What one optimiser step tells of itself."""

    loss_sum: float
    supervised_tokens: int
    gradient_norm: float
    gradient_norms: dict[str, float]
    skipped: bool
    update_norms: dict[str, float] | None


def train_step(
    model: torch.nn.Module, optimizer: AdamW, scaler: LossScaler, batches: list[Batch],
    learning_rate: float, max_norm: float, measure_updates: bool = False,
) -> StepResult:
    """One optimiser step over an accumulation window.

    Every micro-batch's summed loss is divided by the supervised tokens of the whole window, so that
    the gradient does not depend on how the window was cut.
    """
    supervised = sum(batch.supervised_tokens for batch in batches)
    loss_sum = 0.0
    for batch in batches:
        loss, _ = model(**vars(batch))
        scaler.scale_loss(loss / supervised).backward()
        loss_sum += loss.item()
    named = list(optimizer.parameters.items())
    scaler.unscale_gradients(optimizer.parameters.values())
    by_owner = {owner: norm.item() for owner, norm in owner_gradient_norms(named, owner_of).items()}
    norm = clip_gradients(optimizer.parameters.values(), max_norm).item()
    finite = norm < float("inf")  # False for NaN too
    if not finite and not scaler.enabled:
        raise PhiSightError(
            f"step: the gradient norm is {norm}, the loss {loss_sum / supervised}; training has"
            " diverged: resume an earlier checkpoint with a lower --learning-rate"
        )
    before = [(name, p.detach().clone()) for name, p in named] if measure_updates else []
    if finite:
        optimizer.step(learning_rate)
    scaler.update(finite)
    optimizer.zero_grad()
    moved = moved_by_owner(before, optimizer.parameters) if measure_updates else None
    return StepResult(loss_sum, supervised, norm, by_owner, not finite, moved)


def moved_by_owner(
    before: list[tuple[str, Tensor]], now: dict[str, torch.nn.Parameter]
) -> dict[str, float]:
    """How far each owner's weights moved in one step: the L2 norm of the change."""
    squares: dict[str, float] = {}
    for name, old in before:
        change = (now[name].detach() - old).square().sum().item()
        squares[owner_of(name)] = squares.get(owner_of(name), 0.0) + change
    return {owner: total**0.5 for owner, total in squares.items()}


def seed_generators(seed: int) -> None:
    """Every generator that a checkpoint holds, so that two runs of one seed start alike."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def chunks(rows: list, size: int) -> Iterator[list]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


class StopSignals:
    """SIGINT and SIGTERM ask for a stop after the step in hand; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignals:
        self._former = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


# -- saving the place and finding it again --------------------------------------------------------


def describe_run(
    config: Config, parts: Assembled, data: TrainingData, total_steps: int
) -> dict[str, object]:
    """What a checkpoint's config.json says: the config and the facts exactness rests on."""
    return {
        "config": configs.to_dict(config),
        "base_fingerprint": parts.base.fingerprint,
        "vision_fingerprint": parts.vision.key,
        "data_fingerprint": data.fingerprint,
        "compute_dtype": str(parts.base.compute_dtype).removeprefix("torch."),
        "device": parts.device.type,
        "threads": torch.get_num_threads(),
        "total_steps": total_steps,
        "world_size": 1,
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def check_same_run(saved: dict, current: dict, allow_changes: bool) -> None:
    """Stop, naming the fields, where going on would not be exact; with `allow_changes`, say so."""
    free = tuple(f"config.{name}" for name in FREE_FIELDS)
    changes = checkpoints.compare_configs(saved, current, free)
    if not changes:
        return
    listed = "; ".join(changes)
    if not allow_changes:
        raise PhiSightError(
            f"--resume: would not be exact, these differ: {listed}; restore them, or go on"
            " all the same with --allow-changes"
        )
    print(f"warning: the resumed run is not exact, these differ: {listed}")


def check_place(state: dict, plans: list[list[list[int]]], total_steps: int) -> None:
    """Stop where changes that a person allowed leave nothing to do after the saved place."""
    step, epoch, row = state["step"], state["epoch"], state["row"]
    if step >= total_steps or epoch >= len(plans) or row >= len(plans[epoch]):
        raise PhiSightError(
            f"--resume: the checkpoint stands at step {step} (epoch {epoch}, row {row}), the"
            f" changed run ends at step {total_steps} of {len(plans)} epochs; ask for more --epochs"
            " or --max-steps"
        )


def restore(
    checkpoint: checkpoints.Checkpoint, parts: Assembled, optimizer: AdamW, scaler: LossScaler,
    log: MetricsLog,
) -> Progress:
    """Put every tensor, generator, counter and the log back to where the checkpoint was saved."""
    load_model_state(parts.model, checkpoint.state)
    optimizer.load_state_tensors(checkpoint.state["optimizer"])
    checkpoints.set_rng_state(checkpoint.state["rng"])
    state = dict(checkpoint.trainer_state)
    scaler.load_state_dict(state["loss_scaler"])
    log.truncate_to(state["metrics_offset"])
    return Progress(**{spec.name: state[spec.name] for spec in dataclasses.fields(Progress)})


def resume_command(config: Config) -> str:
    default = configs.default_config(configs.DEFAULT_PRESET).run
    return "python train.py --resume" + (
        "" if config.run == default else f" --run {shlex.quote(config.run)}"
    )


# -- telling --------------------------------------------------------------------------------------


def announce(
    config: Config, parts: Assembled, data: TrainingData, plans: list[list[list[int]]],
    row_tokens: int, total_steps: int, progress: Progress,
) -> None:
    """What is about to be trained, on what, and every decision with its reason."""
    dtype = str(parts.base.compute_dtype).removeprefix("torch.")
    print(f"compute: {dtype} on {parts.device.type}, {torch.get_num_threads()} threads"
          f" ({parts.compute_reason})")
    print(f"data: {len(data.train)} conversations to train on, {len(data.validation)} to validate;"
          f" {len(data.quarantined)} records quarantined, {data.shortened} shortened")
    filled = sum(len(s.input_ids) for s in data.train)
    rows = len(plans[0])
    print(f"rows: {rows} of {row_tokens} tokens an epoch, padding"
          f" {100 * (1 - filled / (rows * row_tokens)):.1f} %; {total_steps} steps of"
          f" {config.batch_size} x {config.accumulation} rows")
    for owner, parameters in parts.model.owners().items():
        trained = any(p.requires_grad for _, p in parameters)
        count = sum(logical_size(p) for _, p in parameters)
        print(f"  {'TRAINED' if trained else 'FROZEN ':8} {owner:10} {len(parameters):4} tensors"
              f" {count:>14,} weights")
        if owner != "base" and not trained:
            print(f"warning: the weights of {owner!r} are frozen and will not be trained")
    if data.quarantined:
        print(f"warning: {len(data.quarantined)} records quarantined, reasons in"
              f" {Path(config.run) / 'quarantine.jsonl'}")
    if progress.step:
        print(f"resumed at step {progress.step} of {total_steps}")


def logical_size(parameter: Tensor) -> int:
    """Weights a parameter stands for: a packed 4-bit one holds two a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def add_to_window(
    progress: Progress, result: StepResult, batches: list[Batch], seconds: float
) -> None:
    for name, value in (
        ("loss_sum", result.loss_sum),
        ("supervised_tokens", result.supervised_tokens),
        ("tokens", sum(batch.tokens for batch in batches)),
        ("places", sum(batch.input_ids.numel() for batch in batches)),
        ("skipped_steps", int(result.skipped)),
        ("seconds", seconds),
    ):
        progress.window[name] = progress.window.get(name, 0) + value


def close_window(progress: Progress, rate: float, result: StepResult) -> dict[str, object]:
    """The metrics record of the steps since the last one; the sums start anew."""
    window, progress.window = progress.window, {}
    loss = window["loss_sum"] / window["supervised_tokens"]
    progress.recent_losses = [*progress.recent_losses, loss][-5:]
    return {
        "kind": "train", "step": progress.step, "epoch": progress.epoch, "loss": loss, "lr": rate,
        "gradient_norm": result.gradient_norm, "gradient_norms": result.gradient_norms,
        "update_norms": result.update_norms,
        "padding_share": 1 - window["tokens"] / window["places"],
        "supervised_tokens": window["supervised_tokens"], "tokens": window["tokens"],
        "skipped_steps": window["skipped_steps"],
        "timing": {
            "seconds": round(window["seconds"], 3),
            "tokens_per_second": round(window["tokens"] / window["seconds"], 1),
            **peak_memory_mb(),
        },
    }


def warn_of_still_owners(result: StepResult) -> None:
    """A frozen projector trains without an error and answers without the picture: say it aloud."""
    for owner, moved in (result.update_norms or {}).items():
        if moved == 0 and not result.skipped:
            print(f"warning: the weights of {owner!r} did not move in this step (gradient norm"
                  f" {result.gradient_norms[owner]:.3g})")


def evaluate(
    progress: Progress, config: Config, parts: Assembled, data: TrainingData, store: FeatureStore,
    row_tokens: int, log: MetricsLog, bar: tqdm,
) -> None:
    """Validation loss and alignment meter into the log; early stopping decides here."""
    clock = time.perf_counter()
    found = meter.evaluate(parts.model, data.validation, data.first_exchanges, store,
                           max(row_tokens, *(len(s.input_ids) for s in
                                             [*data.validation, *data.first_exchanges])),
                           parts.chat_format.end_of_text_id, parts.device)
    record = {"kind": "evaluation", "step": progress.step, **found,
              "timing": {"seconds": round(time.perf_counter() - clock, 3)}}
    log.write(record)
    bar.write(console_line(record))
    if progress.best_loss is None or found["validation_loss"] < progress.best_loss:
        progress.best_loss, progress.evaluations_without_better = found["validation_loss"], 0
        return
    progress.evaluations_without_better += 1
    if config.early_stopping and progress.evaluations_without_better >= config.early_stopping:
        progress.finished = progress.finished or (
            f"early stopping: no better validation loss in {config.early_stopping} evaluations"
        )


# -- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOptions:
    """What is asked of this process and is no part of what the run is."""

    allow_changes: bool = False
    stop_at_step: int = 0
    overwrite: bool = False


def parse(arguments: list[str] | None) -> tuple[Config, checkpoints.Checkpoint | None, RunOptions]:
    parser = configs.Parser(prog="train.py", description=__doc__.splitlines()[0])
    configs.add_config_flags(parser)
    parser.add_argument("--resume", action="store_true",
                        help="go on from the run's newest valid checkpoint")
    parser.add_argument("--resume-if-any", action="store_true",
                        help="--resume where the run has a checkpoint, else start")
    parser.add_argument("--overwrite", action="store_true",
                        help="start anew in a run folder that has checkpoints, and remove them")
    parser.add_argument("--allow-changes", action="store_true",
                        help="resume although the result will not be exact")
    parser.add_argument("--stop-at-step", type=int, default=0,
                        help="save and stop after this step; --resume goes on")
    options = parser.parse_args(arguments)
    config = configs.config_from_options(options)
    if options.stop_at_step < 0:
        raise PhiSightError(f"--stop-at-step {options.stop_at_step}: must be 0 (never) or more")
    run_options = RunOptions(options.allow_changes, options.stop_at_step, options.overwrite)
    existing = checkpoints.checkpoints_in(config.run)
    if options.resume or (options.resume_if_any and existing):
        path, problems = checkpoints.find_newest_valid(config.run)
        for bad, problem in problems:
            print(f"warning: {bad} is not used: {problem}")
        checkpoint = checkpoints.load(path)
        saved = configs.from_dict(checkpoint.config["config"], str(path))
        # What was typed wins over what was saved; `check_same_run` says what that would cost.
        typed = configs.given_fields(options)
        return dataclasses.replace(saved, **(typed | {"run": config.run})), checkpoint, run_options
    if existing and not options.overwrite:
        raise PhiSightError(
            f"{config.run}: holds {existing[-1].name} already; go on with --resume, start anew with"
            " --overwrite, or choose another --run"
        )
    return config, None, run_options


def main(arguments: list[str] | None = None) -> int:
    config, checkpoint, options = parse(arguments)
    if checkpoint is not None and checkpoint.trainer_state["finished"]:
        print(f"{config.run}: finished at step {checkpoint.step}"
              f" ({checkpoint.trainer_state['finished']}); ask it with: python infer.py")
        return 0
    train(config, checkpoint, options)
    return 0


if __name__ == "__main__":
    run_main(main)
