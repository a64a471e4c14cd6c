"""Where a run stands: the one thing that its loop remembers from step to step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from training.step import StepResult

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
    evaluations_without_better: int = 0
    finished: str = ""
    """why the run is over, or empty"""
    recent_losses: list[float] = field(default_factory=list)
    """mean loss of the latest logged windows"""
    window: dict[str, float] = field(default_factory=dict)
    """sums since the last logged step"""
    steps_digest: str = ""
    """sha256 over the digest before and the loss, gradient norm and place of every step"""

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
        loss = window["loss_sum"] / window["supervised_tokens"]
        self.recent_losses = [*self.recent_losses, loss][-RECENT_LOSSES:]
        return loss, window

    def add_validation_loss(self, loss: float, early_stopping: int) -> None:
        """Finish the run at the `early_stopping`-th evaluation in a row (0: never) without a new
        lowest loss."""
        # A loss that is not finite is never the best: nothing would be better than a first NaN.
        if loss < (float("inf") if self.best_loss is None else self.best_loss):
            self.best_loss, self.evaluations_without_better = loss, 0
            return
        self.evaluations_without_better += 1
        if early_stopping and self.evaluations_without_better >= early_stopping:
            self.finished = self.finished or (
                f"early stopping: no better validation loss in {early_stopping} evaluations"
            )
