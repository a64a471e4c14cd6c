"""A gradient that jumps: told of, and with `--on-spike rollback` undone.

A rollback puts weights, optimizer, random states and loss scale back to the last checkpoint of
`--save-steps`, and goes on behind the step that jumped: the rows from the place of the checkpoint
up to and including that step are trained on by nothing that is kept (as PaLM's training did,
arXiv:2204.02311, section 5.1). Steps are counted on from the checkpoint; without `--max-steps` the
run is shorter by those that were undone.

All of it follows from the rows and the config. A run that is killed at any moment of it, or stopped
and resumed, finds the same jump at the same step and goes back to the same checkpoint.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tqdm import tqdm

import checkpoints
from checkpoint_state import need_resumable
from config import ROLLBACK, WARN
from errors import PhiSightError
from reports.alerts import NOT_FINITE, SPIKE
from training.alerts import MOST_ROLLBACKS, SPIKE_MEMORY, is_spike
from training.evaluating import evaluation_is_due, run_evaluation
from training.progress import Progress
from training.reporting import tell, tell_of_saves
from training.run import Run, restore_tensors
from training.saving import BackgroundSaver, save_checkpoint
from training.step import Diverged, StepResult

Place = tuple[int, int]
"""epoch, row"""


def went_back_from_spike(run: Run, result: StepResult, saver: BackgroundSaver, bar: tqdm) -> bool:
    """Look at the gradient norm of the step that was made; whether the run went back because of it.

    Raises:
        PhiSightError: it would have to go back too often, or its checkpoint cannot be read.
    """
    progress, goes_back = run.progress, run.config.on_spike == ROLLBACK
    # float16 that overflowed says nothing of the data: the step was skipped, the scale is lowered.
    if result.skipped or not (goes_back or run.config.on_spike == WARN):
        return False
    recent, norm = progress.recent_norms, result.gradient_norm
    spike = is_spike(norm, recent)
    progress.recent_norms = [*recent, norm][-SPIKE_MEMORY:]
    begins = progress.begins(SPIKE, spike)
    can_go_back = goes_back and progress.rollback_step is not None
    if begins or (spike and can_go_back):
        alert = {"alert": SPIKE, "gradient_norm": norm, "median": statistics.median(recent)}
        lacking = {"no_checkpoint": True} if goes_back and not can_go_back else {}
        tell(run, alert | lacking, bar)
    if not (spike and can_go_back):
        return False
    go_back(run, progress.step, (progress.epoch, progress.row), SPIKE, saver, bar)
    return True


def go_back_or_stop(
    run: Run, rows: range, error: Diverged, saver: BackgroundSaver, bar: tqdm
) -> None:
    """After a step over `rows` that could not be made: go back, or stop the run with `error`."""
    progress = run.progress
    step = progress.step + 1
    facts = {"loss": error.loss, "gradient_norm": error.gradient_norm}
    tell(run, {"step": step, "alert": NOT_FINITE, **facts}, bar)
    if run.config.on_spike != ROLLBACK or progress.rollback_step is None:
        raise error
    go_back(run, step, run.rows.place(progress.epoch, rows.stop), NOT_FINITE, saver, bar)


def go_back(
    run: Run, step: int, behind: Place, reason: str, saver: BackgroundSaver, bar: tqdm
) -> None:
    """Undo all steps up to `step` since the checkpoint, and go on at the place `behind` it."""
    progress = run.progress
    if progress.rollbacks >= MOST_ROLLBACKS:
        raise PhiSightError(
            f"step {step}: {reason}, after the run went back {MOST_ROLLBACKS} times already; look"
            " at the data, or go on with: --resume --allow-changes --on-spike warn and a lower"
            " --learning-rate"
        )
    checkpoint = saved_before(run, saver)
    earlier = Progress.from_state(checkpoint.trainer_state)
    start = earlier.epoch, earlier.row
    earlier.rollbacks = progress.rollbacks + 1
    earlier.repacked = progress.repacked if behind[0] == progress.epoch else []
    earlier.epoch, earlier.row = behind
    skipped = {
        "from": {"epoch": start[0], "row": start[1]},
        "to": {"epoch": behind[0], "row": behind[1]},
        "rows": rows_between(run, start, behind),
    }
    record: dict[str, Any] = {"kind": "rollback", "step": step, "from_step": step}
    tell(run, record | {"to_step": checkpoint.step, "skipped": skipped, "reason": reason}, bar)

    restore_tensors(run, checkpoint)
    run.optimizer.zero_grad()  # of a step that was not made
    progress.become(earlier)
    go_on_with_fewer_steps(run, checkpoint.trainer_state["total_steps"])
    run.last_save = checkpoint
    tell_of_saves(run, bar.write)
    run.unlogged_saves = [s for s in run.unlogged_saves if s["step"] <= checkpoint.step]
    if run.ranks.is_first:  # saved by the clock or as the best, and undone
        checkpoints.remove_all(run.config.run, after=checkpoint.step)
    bar.total, bar.n = run.total_steps, progress.step
    bar.refresh()
    if progress.finished:
        # The weights that the run ends with, unless the step that made them was evaluated.
        if evaluation_is_due(run) and progress.step % run.config.evaluate_steps:
            run_evaluation(run, bar)
        save_checkpoint(run, saver)


def saved_before(run: Run, saver: BackgroundSaver) -> checkpoints.Checkpoint:
    """The checkpoint to go back to, verified, once every save that was begun is done. The first
    process reads it before the others do. Raises PhiSightError."""
    path = Path(run.config.run) / f"checkpoint-{run.progress.rollback_step:06d}"
    loaded: list[checkpoints.Checkpoint] = []

    def read() -> None:
        saver.wait()
        checkpoint = checkpoints.load(path)
        need_resumable(checkpoint)
        assert run.log is not None
        if problems := checkpoints.log_problems(checkpoint, run.log.path):
            raise PhiSightError(f"{path}: {problems[0]}; put back the run's own checkpoint")
        loaded.append(checkpoint)

    run.ranks.from_first(read)
    return loaded[0] if loaded else checkpoints.load(path)


def rows_between(run: Run, start: Place, end: Place) -> int:
    """How many rows there are from one place up to another."""
    (first, row), (last, rest) = start, end
    return sum(len(run.rows.of_epoch(epoch)) for epoch in range(first, last)) - row + rest


def go_on_with_fewer_steps(run: Run, planned: int) -> None:
    """The rows that were skipped make no steps: the learning rate goes its way to the same end in
    those that are left. `planned`: total steps when the checkpoint was saved."""
    progress = run.progress
    total = run.rows.total_steps(progress.step, progress.epoch, progress.row)
    if progress.step >= total:
        progress.finished = "all steps done"
    elif total != planned:
        progress.go_on_with_other_steps(planned, total)
    run.total_steps = total
    run.facts = run.facts | {"total_steps": total}
