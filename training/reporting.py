"""What a run says: what it is about to do, its log and console lines, and how it ended."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import checkpoints
from config import Config, default_config
from data.prepare import TrainingData
from errors import printable
from model.build import model_state
from model.loaded import loaded_line
from ops import choose as choose_operations
from ops.nf4 import weight_count
from paths import command, typed
from reports.alerts import UNMOVED, alert_text
from reports.curves import draw_curves
from reports.show import console_line, rates_text
from training.memory import peak_memory_mb
from training.ranks import Ranks
from training.rates import rates
from training.run import Run
from training.step import StepResult, trained_digests
from training.trackers import SAVES
from training.weight_change import change_line


def announce(run: Run) -> None:
    """Print what is about to be trained, on what, and every decision with its reason."""
    if not run.ranks.is_first:
        return
    config, parts, data = run.config, run.parts, run.data
    dtype = str(parts.base.compute_dtype).removeprefix("torch.")
    processes = "" if run.ranks.size == 1 else f" in each of {run.ranks.size} processes"
    print(
        f"compute: {dtype} on {parts.device.type}, {torch.get_num_threads()} threads{processes}"
        f" ({parts.compute_reason})"
    )
    _, reason = choose_operations(parts.device, parts.base.compute_dtype, training=True)
    print(f"operations: {reason}")
    recomputing = parts.model.language_model.model.recomputing
    print(f"computed again in the backward: {recomputing} ({run.recomputing_reason})")
    if not config.deterministic:
        print("warning: without deterministic algorithms a resumed run can differ in the last bits")
    print(
        f"data: {len(data.train)} conversations to train on, {len(data.validation)} to validate;"
        f" {len(data.quarantined)} records quarantined, {data.shortened} shortened"
    )
    warn_of_a_large_share(data, config.validation_fraction)
    rows, row_tokens = len(run.rows.of_epoch(run.progress.epoch)), run.rows.row_tokens
    padding = 1 - sum(data.train.lengths) / (rows * row_tokens)
    print(
        f"rows: {rows} of {row_tokens} tokens an epoch, padding {100 * padding:.1f} %;"
        f" {run.total_steps} steps of {config.batch_size} x {config.accumulation} rows"
    )
    passes = run.total_steps * run.rows.rows_per_step / rows
    if config.max_steps and passes > config.epochs:
        print(f"--max-steps {config.max_steps}: the data are gone through about {passes:.1f} times")
    if 0 < run.total_steps < config.evaluate_steps and config.early_stopping:
        print(
            f"warning: --early-stopping cannot stop a run of {run.total_steps} steps that evaluates"
            f" every {config.evaluate_steps}; give a smaller --evaluate-steps"
        )
    announce_owners(run)
    saved = run.last_save
    if isinstance(saved, checkpoints.Checkpoint):
        print(loaded_line(parts, saved.name, saved.manifest["tensors"], trains=True))
    else:
        print(loaded_line(parts, trains=True))
    if data.quarantined:
        kinds = Counter(entry.kind for entry in data.quarantined).most_common()
        print(
            f"warning: {len(data.quarantined)} records quarantined"
            f" ({', '.join(f'{number} {kind}' for kind, number in kinds)}), reasons in"
            f" {Path(config.run) / 'quarantine.jsonl'}"
        )
    if data.put_first:
        print(f"pictures of {data.put_first} conversations come first: no <image> says where")
    if started := run.facts["started_from"]:
        print(
            f"weights of {started.get('run', config.start_from)} at step {started['step']}"
            f" ({started['finished'] or 'not finished'}) to begin with"
        )
    if run.progress.step:
        print(f"resumed at step {run.progress.step} of {run.total_steps}")


def announce_owners(run: Run) -> None:
    """Print whose weights are trained and whose are not, and warn where that is unexpected."""
    wanted = {"lora": run.config.train_lora, "projector": run.config.train_projector}
    for owner, parameters in run.parts.model.owners().items():
        trained = any(p.requires_grad for _, p in parameters)
        count = sum(weight_count(p) for _, p in parameters)
        print(
            f"  {'TRAINED' if trained else 'FROZEN ':8} {owner:10} {len(parameters):4} tensors"
            f" {count:>14,} weights"
        )
        if wanted.get(owner) and not trained:
            print(f"warning: the weights of {owner!r} are frozen and will not be trained")
    if peaks := rates(run.config, run.config.learning_rate, run.optimizer.parameters):
        print(f"  learning rates at the peak: {rates_text(peaks)}")


def progress_bar(run: Run) -> tqdm:
    """On the terminal of the first process, and nowhere else."""
    return tqdm(
        total=run.total_steps,
        initial=run.progress.step,
        desc="training",
        unit="step",
        disable=None if run.ranks.is_first else True,
    )


def log_window(run: Run, rate: float, result: StepResult, bar: tqdm) -> None:
    """Write down the steps since the last record, and tell the person. `rate` and `result` are of
    the last of them."""
    tell_of_saves(run, bar.write)  # before the record, which has them too
    record = window_record(run, rate, result)
    if run.log:
        run.log.write(record)
        bar.write(console_line(record))
    for alert in record["timing"].get("alerts", ()):
        warn(run, alert, bar)
    if rate > 0:  # the first rate of a warm-up is 0
        tell_of_unmoved_weights(run, result, bar)


def window_record(run: Run, rate: float, result: StepResult) -> dict[str, Any]:
    """The metrics record of the steps since the last one; their sums start anew."""
    progress = run.progress
    loss, window = progress.take_window()
    alerts = run.clock.of_window(window)
    saves, run.unlogged_saves = run.unlogged_saves, []
    return {
        "kind": "train",
        "step": progress.step,
        "total_steps": run.total_steps,
        "epoch": progress.epoch,
        "row": progress.row,
        "loss": loss,
        "lr": rate,
        **({"rates": own} if (own := rates(run.config, rate, run.optimizer.parameters)) else {}),
        "gradient_norm": result.gradient_norm,
        "gradient_norms": result.gradient_norms,
        "update_norms": result.update_norms,
        "padding_share": 1 - window["tokens"] / window["places"],
        "supervised_tokens": window["supervised_tokens"],
        "tokens": window["tokens"],
        "skipped_steps": window["skipped_steps"],
        "steps_digest": progress.steps_digest,
        "weights_digest": checkpoints.weights_digest(model_state(run.parts.model)),
        "timing": {
            "seconds": round(window["seconds"], 3),
            "save_stall_seconds": round(window.get("save_stall_seconds", 0.0), 4),
            "wait_seconds": round(window.get("wait_seconds", 0.0), 4),
            "tokens_per_second": round(window["tokens"] / window["seconds"], 1),
            **peak_memory_mb(),
            **({"alerts": alerts} if alerts else {}),
            **({SAVES: saves} if saves else {}),
        },
    }


def tell_of_unmoved_weights(run: Run, result: StepResult, bar: tqdm) -> None:
    """A projector without a gradient trains without an error and answers without the picture."""
    for owner, moved in (result.update_norms or {}).items():
        unmoved = moved == 0 and not result.skipped
        if unmoved:
            run.unmoved.pop(owner, None)
        if run.progress.begins(f"{UNMOVED}:{owner}", unmoved):
            norm = result.gradient_norms[owner]
            tell(run, {"alert": UNMOVED, "owner": owner, "gradient_norm": norm}, bar)


def tell(run: Run, alert: Mapping[str, Any], bar: tqdm) -> None:
    """Write down an alert that the computation decides, and warn of it. An alert without a kind is
    one of the step that the run stands at."""
    record = {"kind": "alert", "step": run.progress.step, **alert}
    if run.log:
        run.log.write(record)
    warn(run, record, bar)


def warn(run: Run, alert: Mapping[str, Any], bar: tqdm) -> None:
    """Print an alert."""
    if run.log:
        bar.write(f"warning: step {alert.get('step', run.progress.step)}: {alert_text(alert)}")


def tell_of_saves(run: Run, write: Callable[[str], None] = print) -> None:
    """Say of each save that was done since the last call how far the weights have moved."""
    owners = run.parts.model.owners().items()
    trained = {name for name, weights in owners if any(p.requires_grad for _, p in weights)}
    while run.saved:
        change = run.saved.popleft()
        run.unlogged_saves.append(change)
        write(change_line(change, trained))


def report_end(run: Run, out_of_time: bool) -> None:
    """Print how this process ended, and what to type next; a finished run gets its curves."""
    if not run.ranks.is_first:
        return
    tell_of_saves(run)
    step, finished = run.progress.step, run.progress.finished
    if finished:
        warn_of_training_nothing(run)
        curves = draw_curves_of(run.config.run)
        print(f"finished at step {step}: {finished}; curves in {curves}")
        tell_best(run.config.run, run.progress.best_step, run.progress.best_loss)
        return
    reason = ": the time is up" if out_of_time else ""
    print(
        f"stopped at step {step} of {run.total_steps}{reason}, saved; go on"
        f" with: {resume_command(run.config, run.ranks)}"
    )


def warn_of_a_large_share(data: TrainingData, asked: float) -> None:
    """Pictures that conversations share tie them together: one group can be most of the data."""
    share = len(data.validation) / max(1, len(data.train) + len(data.validation))
    if share > max(2 * asked, 0.25):
        print(
            f"warning: {share:.0%} of the conversations are to validate, not {asked:.0%}: those"
            " that share pictures stay together; give --validation-fraction 0 to train on all"
        )


def warn_of_training_nothing(run: Run) -> None:
    """A run may end well and have moved nothing: the rate too small, every step skipped."""
    now = trained_digests(run.parts.model)
    for owner, before in run.unmoved.items():
        if now[owner] != before:
            continue
        remedy = (
            "look at the learning rate, the skipped steps and the gradient norms in"
            f" {Path(run.config.run) / checkpoints.METRICS}"
        )
        if owner == "projector" and not run.data.counts()["pictures"]:
            remedy = (
                "no conversation that is trained on has a picture; --no-train-projector leaves it"
                " out"
            )
        print(
            f"warning: the weights of {owner!r} did not move in any step since this process"
            f" began; {remedy}"
        )


def tell_best(run: str, step: int | None, loss: float | None) -> None:
    """Name the checkpoint that is kept as the best, and how to ask it."""
    if step is not None:
        print(
            f"the best is of step {step}, validation loss {loss:.4f}; ask it with:"
            f" {ask_command(str(Path(run) / checkpoints.BEST))}"
        )


def report_standing(config: Config, checkpoint: checkpoints.Checkpoint) -> None:
    """A run already stands at the step that it is to stop after: nothing is trained."""
    print(
        f"{config.run}: stands at step {checkpoint.step}, where --stop-at-step stops it; nothing"
        f" to do; go on with: {resume_command(config)}"
    )


def report_finished(config: Config, checkpoint: checkpoints.Checkpoint) -> None:
    """A run in this folder was finished before: do what a kill right after its last save left
    undone, draw its curves, say what to do."""
    run, log = config.run, Path(config.run) / checkpoints.METRICS
    if log.exists():  # a run that was imported has none
        if problems := checkpoints.log_problems(checkpoint, log):
            print(f"warning: {log}: {checkpoint.path.name}: {problems[0]}", file=sys.stderr)
        else:
            checkpoints.tidy(run, checkpoint, config.keep_checkpoints)
        draw_curves_of(run)
    print(
        f"{run}: finished at step {checkpoint.step}"
        f" ({printable(checkpoint.trainer_state['finished'])}); ask it with: {ask_command(run)}"
    )
    state = checkpoint.trainer_state
    tell_best(run, state.get("best_step"), state.get("best_loss"))


def draw_curves_of(run: str) -> Path:
    """Draw the curves of a run into its folder; the path of the picture."""
    picture = Path(run) / "curves.png"
    draw_curves(Path(run) / checkpoints.METRICS, picture)
    return picture


def resume_command(config: Config, ranks: Ranks = Ranks()) -> str:
    """What to type to go on with a run."""
    # Without the "--", torchrun would take --run for the start of a flag of its own.
    program = command("train.py")
    if ranks.size > 1:
        program = f"torchrun --nproc-per-node {ranks.size} -- {program.removeprefix('python ')}"
    return f"{program} --resume{run_flag(config.run)}"


def ask_command(run: str) -> str:
    """What to type to ask a run."""
    return f"{command('infer.py')}{run_flag(run)}"


def run_flag(run: str) -> str:
    """The flag of the commands that names a run; none for the one that they take without it."""
    return "" if run == default_config().run else f" --run {typed(run)}"
