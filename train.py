"""Train the adapter and the projector: the loop and nothing else.

    python train.py                          # the tiny preset, from the start
    python train.py --resume                 # go on from the newest valid checkpoint, bit for bit
    python train.py --preset phi35 --data llava_instruct_150k.json --images train2017
    python train.py --print-config > run.toml; python train.py --config run.toml
    python train.py --status                 # where a run stands, while it trains or after
    torchrun --nproc-per-node 2 -- train.py  # the same run on two processes

config -> data -> features -> rows -> model + LoRA -> step -> checkpoint.

The rest lies in `training/`: run.py prepares and restores a run, batches.py and step.py make one
step, progress.py is what is remembered of it, saving.py writes it, reporting.py tells of it.
"""

from __future__ import annotations

import contextlib
import sys
import time

import threads  # noqa: F401 (before torch is loaded)

from training.status import answer_if_asked, show_status

if __name__ == "__main__":
    answer_if_asked()  # before torch is loaded, which takes seconds

import checkpoints
from config import Config
from errors import SurvivingOutput, run_main
from training.batches import BatchesAhead
from training.config_file import to_toml
from training.environment import record_start
from training.evaluating import evaluation_is_due, run_evaluation
from training.lock import RunLock
from training.options import RunOptions, parse
from training.progress import Progress
from training.ranks import Ranks, joined
from training.reporting import (
    announce,
    log_window,
    progress_bar,
    report_end,
    report_finished,
    report_standing,
    tell_of_saves,
)
from training.rollback import go_back_or_stop, went_back_from_spike
from training.run import prepare_run
from training.saving import BackgroundSaver, save_checkpoint
from training.signals import StopSignals
from training.start import check_demands, is_at_stop, is_finished, starting_point
from training.step import Diverged, train_step
from training.trackers import Trackers, show_log


def main(arguments: list[str] | None = None) -> int:
    """The command: print the config, or train the run, go on with it, or say that it is done."""
    config, options = parse(arguments)
    if options.status is not None:
        return show_status(options.status or config.run, options.json)
    if options.print_config:
        if options.resume or options.resume_if_any:
            config, _ = starting_point(config, options, Ranks())
        print(to_toml(config), end="")
        return 0
    with (
        joined(config.device) as ranks,
        RunLock(config.run) if ranks.is_first else contextlib.nullcontext(),
    ):
        if ranks.is_first:
            checkpoints.tidy(config.run)
        config, checkpoint = starting_point(config, options, ranks)
        if checkpoint is not None and is_finished(config, checkpoint):
            tell = report_finished
        elif checkpoint is not None and is_at_stop(checkpoint, options):
            tell = report_standing
        else:
            check_demands(config, checkpoint, options)
            train(config, checkpoint, options, ranks)
            return 0
        if ranks.is_first:
            tell(config, checkpoint)
            show_log(config.run, options.trackers)
    return 0


def train(
    config: Config,
    checkpoint: checkpoints.Checkpoint | None,
    options: RunOptions,
    ranks: Ranks = Ranks(),
) -> Progress:
    """One run, from `checkpoint` or from nothing, until it is finished or asked to stop."""
    started = saved = time.monotonic()
    run = prepare_run(config, checkpoint, options, ranks)
    record_start(run, options)
    announce(run)
    progress, out_of_time = run.progress, False
    with (
        StopSignals() as stop,
        progress_bar(run) as bar,
        Trackers(config.run, run.log, options.trackers),
        BackgroundSaver() as saver,
        BatchesAhead(run) as ahead,
    ):
        while not progress.finished:
            step_started = time.perf_counter()
            rows, rate = run.next_rows(), run.learning_rate()
            batches = ahead.take(rows)  # and have those of the next step made beside this one
            will_log = (progress.step + 1) % config.log_steps == 0
            try:
                result = train_step(
                    run.parts.model, run.optimizer, run.scaler, batches, rate,
                    config.max_gradient_norm, measure_updates=will_log, ranks=ranks,
                )  # fmt: skip
            except Diverged as error:  # nothing was updated
                go_back_or_stop(run, rows, error, saver, bar)
                continue
            run.advance(result, rows, seconds=time.perf_counter() - step_started)
            if went_back_from_spike(run, result, saver, bar):  # `--on-spike rollback`
                continue

            if will_log or progress.finished:
                log_window(run, rate, result, bar)
            if evaluation_is_due(run):
                run_evaluation(run, bar)
                if progress.finished and progress.has_unlogged_steps:  # stopped early
                    log_window(run, rate, result, bar)
            bar.update()

            saver.check()  # a save that failed in the background stops the run here
            tell_of_saves(run, bar.write)
            now = time.monotonic()  # the first process's clock decides for all
            asked, out_of_time, save_is_due = ranks.any_of(
                stop.requested,
                ranks.is_first and 0 < options.max_minutes <= (now - started) / 60,
                ranks.is_first and 0 < config.save_every_minutes <= (now - saved) / 60,
            )
            stopping = asked or out_of_time or progress.step == options.stop_at_step
            if progress.finished or stopping or save_is_due or run.checkpoint_is_due():
                save_checkpoint(run, saver)
                saved = now
            if stopping:
                break
    report_end(run, out_of_time)
    return progress


if __name__ == "__main__":
    sys.stdout = SurvivingOutput(sys.stdout)
    run_main(main)
