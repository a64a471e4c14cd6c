"""Where a run stands: the one thing that its loop remembers from step to step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from training.step import StepResult

NEWER = (
    "best_step",
    "repacked",
    "schedule",
    "recent_norms",
    "standing_alerts",
    "rollback_step",
    "rollback_best",
    "rollbacks",
)  # absent in checkpoints of former versions
RECENT_LOSSES = 5  # enough for `checkpoints.py show` to say where the loss is going


@dataclass
class Progress:
    """Where the run stands. All of it is in every checkpoint; nothing else is remembered."""

    step: int = 0
    """optimiser steps made"""
    epoch: int = 0
    row: int = 0
    """next row of this epoch's plan"""
    best_loss: float | None = None
    """lowest validation loss so far"""
    best_step: int | None = None
    """step of the kept checkpoint that has the lowest validation loss"""
    evaluations_without_better: int = 0
    finished: str = ""
    """why the run is over, or empty"""
    recent_losses: list[float] = field(default_factory=list)
    """mean loss of the latest logged windows"""
    window: dict[str, float] = field(default_factory=dict)
    """sums since the last logged step"""
    steps_digest: str = ""
    """sha256 over the digest before and the loss, gradient norm and place of every step"""
    repacked: list[list[int]] = field(default_factory=list)
    """[epoch, seed, row tokens, rows] for each packing that this epoch was begun with and that was
    changed after so many rows; 0 row tokens where each conversation had its own row"""
    schedule: dict[str, float] = field(default_factory=dict)
    """{"step", "position", "total"}: from this step and this position on, the learning rate goes
    its way to "total" in the steps that are left; empty where a position is the step itself"""
    recent_norms: list[float] = field(default_factory=list)
    """gradient norms of the latest steps, which `alerts.is_spike` compares the next one with"""
    standing_alerts: list[str] = field(default_factory=list)
    """what was told already and has not ceased since"""
    rollback_step: int | None = None
    """step of the checkpoint that `--on-spike rollback` goes back to, kept until the next one"""
    rollback_best: int | None = None
    """`best_step` of that checkpoint, whose folder is kept as long"""
    rollbacks: int = 0
    """how often the run went back"""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """What a checkpoint's trainer_state holds of it."""
        names = [spec.name for spec in fields(cls) if spec.name in state or spec.name not in NEWER]
        return cls(**{name: state[name] for name in names})

    def become(self, other: Progress) -> None:
        """Take over all that another one remembers: whoever holds this one sees it."""
        for spec in fields(self):
            setattr(self, spec.name, getattr(other, spec.name))

    def begins(self, alert: str, holds: bool) -> bool:
        """Whether what an alert tells of holds and was not told yet; remembered until it ceases."""
        told = alert in self.standing_alerts
        if told and not holds:
            self.standing_alerts = [name for name in self.standing_alerts if name != alert]
        elif holds and not told:
            self.standing_alerts = [*self.standing_alerts, alert]
        return holds and not told

    def schedule_place(self, total_steps: int) -> tuple[float, float]:
        """The position of the next step in the schedule of the learning rate, and its end."""
        if not self.schedule:
            return self.step, total_steps
        begun, position, end = (self.schedule[name] for name in ("step", "position", "total"))
        pace = (end - position) / (total_steps - begun)
        return position + (self.step - begun) * pace, end

    def go_on_with_other_steps(self, planned: int, total_steps: int) -> None:
        """Steps are larger or smaller from here on, so that the run ends after `total_steps` and
        not after the `planned` ones: the learning rate goes on from where it is, to the same end.
        """
        position, end = self.schedule_place(planned)
        self.schedule = {"step": self.step, "position": position, "total": end}

    def add_step(self, result: StepResult, seconds: float) -> None:
        """Count a step that was made at this place in so many seconds."""
        link = (
            self.steps_digest,
            self.step,
            self.epoch,
            self.row,
            result.loss_sum.hex(),
            result.gradient_norm.hex(),
        )
        self.steps_digest = hashlib.sha256("/".join(map(str, link)).encode()).hexdigest()
        self.step += 1
        self.add_to_window("loss_sum", result.loss_sum)
        self.add_to_window("supervised_tokens", result.supervised_tokens)
        self.add_to_window("tokens", result.tokens)
        self.add_to_window("places", result.places)
        self.add_to_window("skipped_steps", int(result.skipped))
        self.add_to_window("seconds", seconds)

    def add_to_window(self, name: str, value: float) -> None:
        self.window[name] = self.window.get(name, 0) + value

    @property
    def has_unlogged_steps(self) -> bool:
        return "tokens" in self.window

    def take_window(self) -> tuple[float, dict[str, float]]:
        """The mean loss of the steps since the last log record, and the sums over them, which start
        anew."""
        window, self.window = self.window, {}
        supervised = window["supervised_tokens"]
        loss = window["loss_sum"] / supervised if supervised else float("nan")
        self.recent_losses = [*self.recent_losses, loss][-RECENT_LOSSES:]
        return loss, window

    def add_validation_loss(self, loss: float, early_stopping: int, keep_best: bool) -> None:
        """Finish the run at the `early_stopping`-th evaluation in a row (0: never) without a new
        lowest loss. With `keep_best` the step of the lowest one is remembered, to be saved."""
        # A loss that is not finite is never the best: nothing would be better than a first NaN.
        if loss < (float("inf") if self.best_loss is None else self.best_loss):
            self.best_loss, self.evaluations_without_better = loss, 0
            self.best_step = self.step if keep_best else None
            return
        self.evaluations_without_better += 1
        if early_stopping and self.evaluations_without_better >= early_stopping:
            self.finished = self.finished or (
                f"early stopping: no better validation loss in {early_stopping} evaluations"
            )
