"""What a kill must never leave behind, and what must be equal at the end of two runs."""

from __future__ import annotations

from pathlib import Path

import checkpoints
from errors import PhiSightError
from reports.log import METRICS, deterministic_part, read_metrics
from tools.torture.deal import Recipe

FEATURES = "config.features"  # each run has a feature store, or a link to one, in its own folder


def look_at(
    run: Path, before: int | None, problems: list[str], save_steps: int = Recipe().save_steps
) -> int | None:
    """The step of the newest checkpoint of a run, None before the first save is complete. What a
    kill must never leave behind is added to `problems`; `before` is the newest step before it."""
    nothing_saved = before is None and not checkpoints.checkpoints_in(run)
    # The second save waits for the first: what is logged behind it comes after a checkpoint.
    if nothing_saved and last_logged(run) <= 2 * save_steps:
        return None
    for folder in checkpoints.checkpoints_in(run):  # a name is given to what was verified only
        problems += [
            f"{folder}: left damaged, {problem}" for problem in checkpoints.verify(folder)[:1]
        ]
    try:
        newest = checkpoints.find_newest(run)[0]
        if newest.trainer_state.get("best_step") is not None:
            checkpoints.load_best(run)
    except PhiSightError as error:
        problems.append(str(error))
        return None
    step = newest.step
    if before is not None and step < before:
        problems.append(f"{run}: step {before} was saved, the newest checkpoint is of step {step}")
    return step


def last_logged(run: Path) -> int:
    """The last step in the log of a run, 0 for none."""
    log = run / METRICS
    records = read_metrics(log, to_first_fault=True) if log.is_file() else []
    return max((record.get("step", 0) for record in records), default=0)


def differences(reference: Path, run: Path) -> list[str]:
    """What is not equal at the end of two runs: the newest checkpoint, the best, a record of the
    metrics, which checkpoints there are."""
    try:
        found = [checkpoints.diff(reference, run)]
        if checkpoints.resolve(reference).trainer_state.get("best_step") is not None:
            best = checkpoints.BEST
            found.append(checkpoints.diff(reference / best, run / best))
        logs = [read_metrics(folder / "metrics.jsonl") for folder in (reference, run)]
    except PhiSightError as error:
        return [str(error)]
    problems = [
        str(diff) for diff in found if any(row["name"] != FEATURES for row in diff.differences)
    ]
    names = [[p.name for p in checkpoints.checkpoints_in(folder)] for folder in (reference, run)]
    if not problems and names[0] != names[1]:
        problems.append(f"checkpoints: {', '.join(names[1])}, not {', '.join(names[0])}")
    if len(logs[0]) != len(logs[1]):
        problems.append(f"metrics: {len(logs[1])} records, not {len(logs[0])}")
    expected, ended = ([deterministic_part(record) for record in log] for log in logs)
    for number in range(min(len(expected), len(ended))):
        if expected[number] != ended[number]:
            problems.append(
                f"metrics: record {number + 1} is {ended[number]}, not {expected[number]}"
            )
            break
    return problems
