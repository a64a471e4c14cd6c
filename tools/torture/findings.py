"""What a kill must never leave behind, and what must be equal at the end of two runs."""

from __future__ import annotations

from pathlib import Path

import checkpoints
from errors import PhiSightError
from reports.metrics import deterministic_part, read_metrics


def look_at(run: Path, before: int | None, problems: list[str]) -> int | None:
    """The step of the newest checkpoint of a run, None before the first save is complete. What a
    kill must never leave behind is added to `problems`; `before` is the newest step before it."""
    if (
        before is None
        and not checkpoints.checkpoints_in(run)
        and not (run / checkpoints.LATEST).exists()
    ):
        return None
    for folder in checkpoints.checkpoints_in(run):  # a name is given to what was verified only
        problems += [
            f"{folder}: left damaged, {problem}" for problem in checkpoints.verify(folder)[:1]
        ]
    try:
        step = checkpoints.load(checkpoints.find_newest_valid(run)[0]).step
    except PhiSightError as error:
        problems.append(str(error))
        return None
    if before is not None and step < before:
        problems.append(f"{run}: step {before} was saved, the newest checkpoint is of step {step}")
    return step


def differences(reference: Path, run: Path) -> list[str]:
    """What is not equal at the end of two runs: the checkpoint, a record of the metrics."""
    try:
        found = checkpoints.diff(reference, run)
        logs = [read_metrics(folder / "metrics.jsonl") for folder in (reference, run)]
    except PhiSightError as error:
        return [str(error)]
    problems = [] if found.identical else [str(found)]
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
