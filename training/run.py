"""A run, prepared and restored: config -> data -> features -> rows -> model + LoRA -> its place."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import checkpoints
import config as configs
import config_values
from checkpoint_state import need_resumable
from config import Config
from data.dataset import write_quarantine
from data.examples import give_examples
from data.features import FeatureStore
from data.pictures import PictureFolders
from data.prepare import TrainingData, prepare
from errors import PhiSightError
from model.build import Assembled, assemble, load_model_state, model_state
from model.cache import default_kv_bytes
from model.recompute import LAYERS, PRODUCTS
from model.vision import VisionTower
from reports.log import MetricsLog
from training.alerts import ClockAlerts
from training.exactness import check_place, check_same_run, choose_algorithms, describe_run
from training.loss_scaler import LossScaler
from training.optimizer import AdamW
from training.options import RunOptions
from training.progress import Progress
from training.ranks import Ranks
from training.rates import rate_of
from training.rng import seed_generators, set_rng_state, state_of_rank
from training.rows import Rows, note_packing
from training.schedule import lr_at
from training.start import load_start_weights
from training.step import StepResult, trained_digests
from training.weight_change import copy_of_weights


@dataclass
class Run:
    """All that the loop works on."""

    config: Config
    ranks: Ranks
    parts: Assembled
    store: FeatureStore
    data: TrainingData
    rows: Rows
    total_steps: int
    optimizer: AdamW
    scaler: LossScaler
    facts: dict[str, Any]
    """what a checkpoint's config.json says"""
    log: MetricsLog | None
    """None on every process but the first"""
    progress: Progress
    recomputing_reason: str
    """why the backward computes again what it does"""
    last_save: checkpoints.Checkpoint | checkpoints.Snapshot | None
    unmoved: dict[str, str] = field(default_factory=dict)
    """owner of trained weights -> their digest when this process began; without those that the
    person was told of as not moving"""
    clock: ClockAlerts = field(default_factory=ClockAlerts)
    start_weights: dict[str, dict[str, torch.Tensor]] | None = None
    """what the run began with, by checkpoint file; None where that is not known, and on every
    process but the first"""
    saved: deque[dict[str, Any]] = field(default_factory=deque)
    """statistics of the saves that are done and not told of yet: the saving thread adds them"""
    unlogged_saves: list[dict[str, Any]] = field(default_factory=list)
    """statistics of the saves since the last record of the log, which the next one has"""

    def next_rows(self) -> range:
        """Numbers of the rows of the next step, within this epoch's plan; an epoch's last step may
        have fewer than the others."""
        return self.rows.of_step(self.progress.epoch, self.progress.row)

    def learning_rate(self) -> float:
        """Of the next step."""
        config = self.config
        return lr_at(
            *self.progress.schedule_place(self.total_steps),
            config.warmup_fraction,
            config.learning_rate,
            config.schedule,
        )

    def advance(self, result: StepResult, rows: range, seconds: float) -> None:
        """Move on past the step over `rows` that gave `result`; the run may be finished then."""
        progress = self.progress
        progress.add_step(result, seconds)
        epoch = progress.epoch
        progress.epoch, progress.row = self.rows.place(epoch, rows.stop)
        if progress.epoch > epoch:
            progress.repacked = []
        if progress.step == self.total_steps:
            progress.finished = "all steps done"

    def checkpoint_is_due(self) -> bool:
        """Whether this step's checkpoint is one of the regular ones, or the best."""
        progress = self.progress
        return progress.step % self.config.save_steps == 0 or progress.step == progress.best_step


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
    parts.base.tokenizer.hold()  # every checkpoint gets the tokenizer that is trained with
    # A run that goes on has its weights in its checkpoint: the first stage may be gone by then.
    started_from = (
        checkpoint.config.get("started_from") if checkpoint else load_start_weights(config, parts)
    )
    vision = parts.vision
    store = FeatureStore(config.features, vision.key, vision.shape, config.feature_storage)
    data = prepare(
        config,
        parts.chat_format,
        store,
        lambda: VisionTower(vision, parts.device),
        positions=parts.base.model.config.max_position_embeddings,
        team=ranks,
    )

    progress = place_of(checkpoint, config, data)
    rows = Rows(config, data.train.lengths, progress.repacked)
    progress.epoch, progress.row = rows.place(progress.epoch, progress.row)
    total_steps = rows.total_steps(progress.step, progress.epoch, progress.row)
    optimizer, scaler = make_optimizer(config, parts)
    seed_generators(config.seed)  # here: an encoder, loaded for features, draws numbers
    run = Run(
        config=config,
        ranks=ranks,
        parts=parts,
        store=store,
        data=data,
        rows=rows,
        total_steps=total_steps,
        optimizer=optimizer,
        scaler=scaler,
        facts=describe_run(config, parts, data, total_steps, ranks, started_from),
        log=MetricsLog(Path(config.run) / checkpoints.METRICS) if ranks.is_first else None,
        progress=progress,
        recomputing_reason=choose_recomputing(config, parts, rows.row_tokens, ranks),
        last_save=checkpoint,
    )
    note_start_weights(run)
    if checkpoint is None:
        clear_folder(run, options.overwrite)
    else:
        go_on(run, checkpoint, options.allow_changes)
    if ranks.is_first:
        tell_of_data(config, data, anew=checkpoint is None)
    if not run.progress.finished:
        run.unmoved = trained_digests(parts.model)
    return run


def tell_of_data(config: Config, data: TrainingData, anew: bool) -> None:
    """Write what the run's folder says of its data: what was set aside, and examples to ask about,
    which a run that goes on keeps as they are."""
    folder = Path(config.run)
    write_quarantine(folder / "quarantine.jsonl", data.quarantined)
    give_examples(folder, data.first_messages, PictureFolders.of(config), anew)


def place_of(
    checkpoint: checkpoints.Checkpoint | None, config: Config, data: TrainingData
) -> Progress:
    """Where a run begins or goes on: its place counts the rows of the epoch that were trained on,
    whatever their number a step was."""
    if checkpoint is None:
        return Progress()
    need_resumable(checkpoint)
    progress = Progress.from_state(checkpoint.trainer_state)
    if checkpoint.config["data_fingerprint"] == data.fingerprint:
        saved = config_values.from_dict(checkpoint.config["config"], str(checkpoint.path))
        note_packing(progress, saved, config, data.train.lengths)
    else:
        progress.repacked = []  # the numbers of the conversations mean others now
    if not config.keeps_best:
        progress.best_step = None  # the next save removes it
    if config.on_spike != configs.ROLLBACK:
        progress.rollback_step = progress.rollback_best = None
    return progress


def choose_recomputing(config: Config, parts: Assembled, row_tokens: int, ranks: Ranks) -> str:
    """Tell the decoder what its backward computes again (see `model.recompute`); the reason."""
    model, decoder = parts.base.model.model, parts.base.model.config
    if config.gradient_checkpointing != "auto":
        model.recomputing = config.gradient_checkpointing
        return "as the config says"
    values = config.batch_size * row_tokens * decoder.num_hidden_layers * decoder.product_values
    needed = values * parts.base.compute_dtype.itemsize
    # As much as answering would take for its keys and values.
    room = default_kv_bytes(parts.device)
    if parts.device.type == "cpu":
        room //= ranks.size
    model.recomputing = PRODUCTS if needed <= room else LAYERS
    return f"the products of a micro-batch take {needed / 1e9:.2f} GB of {room / 1e9:.2f}"


def make_optimizer(config: Config, parts: Assembled) -> tuple[AdamW, LossScaler]:
    """The model in training mode, with what updates it."""
    model = parts.model.train()
    optimizer = AdamW(
        model.trainable(),
        (config.adam_beta1, config.adam_beta2),
        config.adam_epsilon,
        config.weight_decay,
        partial(rate_of, config),
    )
    return optimizer, LossScaler(enabled=parts.base.compute_dtype == torch.float16)


def note_start_weights(run: Run) -> None:
    """Keep what the run began with, to say how far the weights have moved: before a checkpoint is
    put into the model, which was drawn as it was then. Another run's weights, that it began with,
    may be gone by the time it goes on."""
    if run.ranks.is_first and not (run.last_save and run.facts["started_from"]):
        run.start_weights = copy_of_weights(model_state(run.parts.model))


def clear_folder(run: Run, overwrite: bool) -> None:
    """Remove what an earlier run left, only now that nothing can keep this one from starting."""
    if run.log:
        if overwrite:
            checkpoints.remove_all(run.config.run)
        run.log.truncate_to(0)


def go_on(run: Run, checkpoint: checkpoints.Checkpoint, allow_changes: bool) -> None:
    """Put the run where the checkpoint was saved. Raises as `check_resume` does."""
    changes = check_resume(run, checkpoint, allow_changes)
    restore(run, checkpoint)
    if (change := checkpoint.manifest.get("change")) and "step" in change:
        run.unlogged_saves.append(change)  # the record that has it was cut off, if it was written
    if changes:
        run.start_weights = None  # of another seed, or drawn by another torch
        go_on_changed(run, checkpoint)


def check_resume(run: Run, checkpoint: checkpoints.Checkpoint, allow_changes: bool) -> list[str]:
    """Raise PhiSightError unless the run may go on from the checkpoint and its log; returns what
    was changed and allowed."""
    say: Callable[[str], None] = print if run.ranks.is_first else lambda _: None
    changes = check_same_run(checkpoint.config, run.facts, allow_changes, say)
    if changes or not run.progress.finished:
        check_place(run.progress, run.total_steps)
    if run.log is None:
        return changes
    if problems := checkpoints.log_problems(checkpoint, run.log.path):
        raise PhiSightError(
            f"{run.log.path}: {checkpoint.path.name}: {problems[0]}; put back the log"
            " that belongs to this run, or the checkpoint that does"
        )
    return changes


def restore(run: Run, checkpoint: checkpoints.Checkpoint) -> None:
    """Put every tensor, generator and the log back to where the checkpoint was saved."""
    restore_tensors(run, checkpoint)
    state = checkpoint.trainer_state
    if run.log:
        if cut := run.log.truncate_to(state["metrics_offset"], state["chain"]):
            print(
                f"{run.log.path}: {cut:,} bytes that were logged after step {checkpoint.step} was"
                " saved are cut off; those steps are made again"
            )
        # Only now: a checkpoint of another run must not cost this one its own.
        checkpoints.tidy(run.config.run, checkpoint, run.config.keep_checkpoints)


def restore_tensors(run: Run, checkpoint: checkpoints.Checkpoint) -> None:
    """Put weights, optimizer, generators and loss scale back to what they were."""
    load_model_state(run.parts.model, checkpoint.state)
    run.optimizer.load_state_tensors(checkpoint.state["optimizer"])
    set_rng_state(
        state_of_rank(checkpoint.state["rng"], checkpoint.config["world_size"], run.ranks),
        run.parts.device,
    )
    run.scaler.load_state_dict(checkpoint.trainer_state["loss_scaler"])


def go_on_changed(run: Run, checkpoint: checkpoints.Checkpoint) -> None:
    """What changes that a person allowed mean for the end of the run and for its learning rate."""
    progress, planned = run.progress, checkpoint.trainer_state["total_steps"]
    progress.finished = ""  # if it was: it has been given more to do
    saved = checkpoint.config["config"]
    longer = any(saved[name] != getattr(run.config, name) for name in ("epochs", "max_steps"))
    if longer or progress.step >= planned:
        progress.schedule = {}  # of the length that was asked for
    elif run.total_steps != planned:
        progress.go_on_with_other_steps(planned, run.total_steps)
        if run.ranks.is_first:
            print(
                f"what is left takes {run.total_steps - progress.step} steps of the new size, in"
                f" place of {planned - progress.step}; the learning rate goes on from"
                f" {run.learning_rate():.3g} to the end of its schedule"
            )
