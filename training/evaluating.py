"""Evaluation in the midst of a training."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

from evaluation import meter
from evaluation.samples import sample_answers, sample_questions
from reports.show import console_line
from training.run import Run


def evaluation_is_due(run: Run) -> bool:
    every = run.config.evaluate_steps if run.data.validation else 0
    return every > 0 and (run.progress.step % every == 0 or bool(run.progress.finished))


def run_evaluation(run: Run, bar: tqdm) -> None:
    """Write validation loss and alignment meter into the log; early stopping is decided here. The
    processes share the work, and all of them learn the result."""
    clock = time.perf_counter()
    measured = evaluated(run)
    log_samples(run)
    record = {
        "kind": "evaluation",
        "step": run.progress.step,
        **measured,
        "timing": {"seconds": round(time.perf_counter() - clock, 3)},
    }
    if run.log:
        run.log.write(record)
        bar.write(console_line(record))
    run.progress.add_validation_loss(
        measured["validation_loss"], run.config.early_stopping, run.config.keeps_best
    )


def log_samples(run: Run) -> None:
    """Write the answers to a few questions, always the same, into the log; the first process alone
    gives them: a few tokens, of weights that all processes have."""
    parts, config = run.parts, run.config
    questions = sample_questions(
        run.data.first_exchanges, run.data.first_messages, config.evaluation_samples
    )
    if run.log is None or not questions:
        return
    clock = time.perf_counter()
    answers = sample_answers(
        parts.model, parts.base.tokenizer, questions, run.store, parts.chat_format.stop_ids
    )
    seconds = round(time.perf_counter() - clock, 3)
    record = {"kind": "samples", "step": run.progress.step, "samples": answers}
    run.log.write(record | {"timing": {"seconds": seconds}})


def evaluated(run: Run) -> dict[str, Any]:
    """What `meter.evaluate` measures of the weights as they are, on every process."""
    data = run.data
    longest = max(len(s.input_ids) for s in [*data.validation, *data.first_exchanges])
    return meter.evaluate(
        run.parts.model,
        data.validation,
        data.first_exchanges,
        run.store,
        max(run.rows.row_tokens, longest),
        run.parts.chat_format.padding_id,
        run.parts.device,
        run.ranks,
    )
