"""A run, prepared and restored: config -> data -> features -> rows -> model + LoRA -> its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import checkpoints
from checkpoint_state import need_resumable
from config import Config
from data.dataset import write_quarantine
from data.features import FeatureStore
from data.prepare import TrainingData, prepare
from data.sampler import plan
from errors import PhiSightError
from model.build import Assembled, assemble, load_model_state
from model.vision import VisionTower
from reports.log import MetricsLog
from training.exactness import check_place, check_same_run, choose_algorithms, describe_run
from training.loss_scaler import LossScaler
from training.optimizer import AdamW
from training.options import RunOptions
from training.progress import Progress
from training.ranks import Ranks
from training.rng import seed_generators, set_rng_state, state_of_rank
from training.schedule import lr_at
from training.start import load_start_weights
from training.step import StepResult


@dataclass
class Run:
    """All that the loop works on."""

    config: Config
    ranks: Ranks
    parts: Assembled
    store: FeatureStore
    data: TrainingData
    plans: list[list[list[int]]]
    """epoch -> rows -> indices of conversations, in the order of training"""
    row_tokens: int
    total_steps: int
    optimizer: AdamW
    scaler: LossScaler
    facts: dict[str, Any]
    """what a checkpoint's config.json says"""
    log: MetricsLog | None
    """None on every process but the first"""
    progress: Progress
    last_save: checkpoints.Checkpoint | checkpoints.Snapshot | None

    def next_rows(self) -> range:
        """Numbers of the rows of the next step, within this epoch's plan; an epoch's last step may
        have fewer than the others."""
        start, rows_per_step = self.progress.row, self.config.batch_size * self.config.accumulation
        return range(start, min(start + rows_per_step, len(self.plans[self.progress.epoch])))

    def learning_rate(self) -> float:
        """Of the next step."""
        config = self.config
        return lr_at(
            self.progress.step,
            self.total_steps,
            config.warmup_fraction,
            config.learning_rate,
            config.schedule,
        )

    def advance(self, result: StepResult, rows: range, seconds: float) -> None:
        """Move on past the step over `rows` that gave `result`; the run may be finished then."""
        progress = self.progress
        progress.add_step(result, seconds)
        progress.row = rows.stop
        if progress.row >= len(self.plans[progress.epoch]):
            progress.epoch, progress.row = progress.epoch + 1, 0
        # After --allow-changes the rows can be used up before the steps are.
        if progress.step == self.total_steps or progress.epoch == len(self.plans):
            progress.finished = "all steps done"


def prepare_run(
    config: Config, checkpoint: checkpoints.Checkpoint | None, options: RunOptions, ranks: Ranks
) -> Run:
    """Everything up to the first step, from nothing or as `checkpoint` has it.

    Raises:
        PhiSightError: something that the config names cannot be used, or going on from the
            checkpoint would not be exact.
    """
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // ranks.size))
    choose_algorithms(config.deterministic)

    parts = assemble(config)
    # A run that goes on has its weights in its checkpoint: the first stage may be gone by then.
    started_from = (
        checkpoint.config.get("started_from") if checkpoint else load_start_weights(config, parts)
    )
    with ranks.first_then_others():  # the first fills the feature store, the others find it full
        store = FeatureStore(
            config.features, parts.vision.key, parts.vision.shape, config.feature_storage
        )
        data = prepare(
            config,
            parts.chat_format,
            store,
            lambda: VisionTower(parts.vision, parts.device),
            positions=parts.base.model.config.max_position_embeddings,
        )

    lengths = data.train.lengths
    row_tokens = config.row_tokens or max(lengths)
    plans = [plan(config.seed, epoch, lengths, row_tokens) for epoch in range(config.epochs)]
    total_steps = count_steps(config, plans)
    optimizer, scaler = make_optimizer(config, parts)
    seed_generators(config.seed)  # here: a CLIP that had to be loaded for features draws numbers
    run = Run(
        config=config,
        ranks=ranks,
        parts=parts,
        store=store,
        data=data,
        plans=plans,
        row_tokens=row_tokens,
        total_steps=total_steps,
        optimizer=optimizer,
        scaler=scaler,
        facts=describe_run(config, parts, data, total_steps, ranks, started_from),
        log=MetricsLog(Path(config.run) / checkpoints.METRICS) if ranks.is_first else None,
        progress=Progress(),
        last_save=checkpoint,
    )
    if checkpoint is None:
        clear_folder(run, options.overwrite)
    else:
        check_resume(run, checkpoint, options.allow_changes)
        restore(run, checkpoint)
    if ranks.is_first:
        write_quarantine(Path(config.run) / "quarantine.jsonl", data.quarantined)
    return run


def count_steps(config: Config, plans: list[list[list[int]]]) -> int:
    """Optimiser steps of the whole run. An epoch ends with a step, however few rows are left."""
    rows_per_step = config.batch_size * config.accumulation
    steps = sum(-(-len(rows) // rows_per_step) for rows in plans)
    return min(steps, config.max_steps or steps)


def make_optimizer(config: Config, parts: Assembled) -> tuple[AdamW, LossScaler]:
    """The model in training mode, with what updates it."""
    model = parts.model.train()
    if config.gradient_checkpointing:
        model.language_model.model.recompute_activations = True
    optimizer = AdamW(
        model.trainable(),
        (config.adam_beta1, config.adam_beta2),
        config.adam_epsilon,
        config.weight_decay,
    )
    return optimizer, LossScaler(enabled=parts.base.compute_dtype == torch.float16)


def clear_folder(run: Run, overwrite: bool) -> None:
    """Remove what an earlier run left, only now that nothing can keep this one from starting."""
    if run.log:
        if overwrite:
            checkpoints.remove_all(run.config.run)
        run.log.truncate_to(0)


def check_resume(run: Run, checkpoint: checkpoints.Checkpoint, allow_changes: bool) -> None:
    """Raise PhiSightError unless the run may go on from the checkpoint and its log."""
    say: Callable[[str], None] = print if run.ranks.is_first else lambda _: None
    need_resumable(checkpoint)
    check_same_run(checkpoint.config, run.facts, allow_changes, say)
    check_place(checkpoint.trainer_state, run.plans, run.total_steps)
    if run.log is None:
        return
    if problems := checkpoints.log_problems(checkpoint, run.log.path):
        raise PhiSightError(
            f"{run.log.path}: {checkpoint.path.name}: {problems[0]}; put back the log"
            " that belongs to this run, or the checkpoint that does"
        )


def restore(run: Run, checkpoint: checkpoints.Checkpoint) -> None:
    """Put every tensor, generator, counter and the log back to where the checkpoint was saved."""
    load_model_state(run.parts.model, checkpoint.state)
    run.optimizer.load_state_tensors(checkpoint.state["optimizer"])
    set_rng_state(
        state_of_rank(checkpoint.state["rng"], checkpoint.config["world_size"], run.ranks)
    )
    state = checkpoint.trainer_state | {"finished": ""}  # if it was: it has been given more to do
    run.scaler.load_state_dict(state["loss_scaler"])
    if run.log:
        if cut := run.log.truncate_to(state["metrics_offset"], state["chain"]):
            print(
                f"{run.log.path}: {cut:,} bytes that were logged after step {checkpoint.step} was"
                " saved are cut off; those steps are made again"
            )
        # Only now: a checkpoint of another run must not cost this one its own.
        checkpoints.tidy(run.config.run, checkpoint, run.config.keep_checkpoints)
    run.progress = Progress(**{spec.name: state[spec.name] for spec in fields(Progress)})
