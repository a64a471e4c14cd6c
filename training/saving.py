"""Saving beside the training: at most one save is in flight, and none fails in silence."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable

import checkpoints
from config import ROLLBACK
from errors import PhiSightError
from model.build import model_state
from training.rng import merged_states, rng_state
from training.run import Run
from training.weight_change import change_of


class BackgroundSaver:
    """Runs saves one after another on a thread of its own.

    `start` returns as soon as the former save is done; what it is given must hold copies. An error
    of a save is raised by the next `check`, `start` or `wait`, with its cause. However a `with`
    block ends, the save in flight is done before anything else is: before the lock of the run is
    given back, above all.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except PhiSightError as error:
            if kind is None:
                raise
            # Another error is on its way to the person, so this one is printed.
            print(f"warning: the last save failed: {error}", file=sys.stderr)

    def start(self, save: Callable[[], object]) -> None:
        self.wait()

        def work() -> None:
            try:
                save()
            except BaseException as error:  # handed to the training thread, whatever it is
                self._error = error

        # Not a daemon: a program that ends in an error still finishes the save it has begun.
        self._thread = threading.Thread(target=work, name="save")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a save that has failed since the last call."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when no save is in flight. Raises as `check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def save_checkpoint(run: Run, saver: BackgroundSaver) -> None:
    """Copy all that the next step depends on; the first process writes it beside the training."""
    clock = time.perf_counter()
    config, progress, log = run.config, run.progress, run.log
    note_rollback_step(run)
    generators = run.ranks.gather(rng_state(run.parts.device))
    if log is None:
        return
    saver.wait()
    state = model_state(run.parts.model) | {
        "optimizer": run.optimizer.state_tensors(),
        "rng": merged_states(generators),
    }
    trainer_state = dataclasses.asdict(progress) | {
        "loss_scaler": run.scaler.state_dict(),
        "metrics_offset": log.offset(),
        "chain": log.chain,
        "total_steps": run.total_steps,
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    snapshot = checkpoints.take_snapshot(
        progress.step, state, run.facts, trainer_state, run.parts.base.tokenizer
    )
    before, run.last_save = run.last_save, snapshot

    def write() -> None:
        log.sync()  # before the checkpoint that counts its bytes
        change = change_of(snapshot, before, run.start_weights)
        whole = dataclasses.replace(snapshot, change=change)
        checkpoints.commit(config.run, whole, config.keep_checkpoints)
        run.saved.append(change)

    saver.start(write)
    progress.add_to_window("save_stall_seconds", time.perf_counter() - clock)


def note_rollback_step(run: Run) -> None:
    """Remember the checkpoint that a rollback goes back to: the last one of `--save-steps`. When
    the others are saved, the clock and whoever stops the run decide, which no result depends on."""
    config, progress = run.config, run.progress
    if progress.finished:
        progress.rollback_step = progress.rollback_best = None
    elif config.on_spike == ROLLBACK and progress.step % config.save_steps == 0:
        progress.rollback_step, progress.rollback_best = progress.step, progress.best_step
