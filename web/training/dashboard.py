"""All that the page shows of one run, but its curves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from errors import PhiSightError, printable
from reports.alerts import alerts_of
from reports.log import TIMING
from reports.status import RUNNING, SHARES, Status
from web.training import pictures
from web.training.recipe import data_of, read_config, recipe_of
from web.training.runs import PREPARING, Run, state_of, state_unread
from web.training.saved import Verified, checkpoints_of, rows_of
from web.trainings import launch

MOST_ALERTS = 100  # the newest
MOST_EVALUATIONS = 300  # whose samples are told, the newest
MOST_SAMPLES = 16  # of one
SHOWN = 500  # characters of a text of a log


def dashboard(run: Run, name: str, verified: Verified) -> dict[str, Any]:
    """Its state, figures, recipe, data, checkpoints and alerts."""
    status, error = run.read()
    records = run.log.kept()
    found = checkpoints_of(run.folder)
    facts, recipe_error = _facts(found)
    if error:
        state, error = state_unread(run.folder, error)
        running = launch.is_busy(run.folder)
    else:
        assert status is not None  # what was read whole
        last = records[-1] if records else {}
        state, error = state_of(run.folder, status, last, _distance(records, facts))
        running = status.state == RUNNING or state == PREPARING
    return {
        "name": name,
        "state": state,
        "running": running,
        "error": error,
        "now": time.time(),
        "status": _figures(status),
        "memory": _memory(records),
        "alignment": _alignment(records),
        "recipe": None if facts is None else _recipe(facts, found[0][1].name),
        "recipe_error": recipe_error,
        "data": data_of(run.folder, facts),
        "checkpoints": rows_of(found, run.series(), verified),
        "alerts": alerts_of(run.log.records)[-MOST_ALERTS:],
        "evaluations": sum(record.get("kind") == "samples" for record in records),
        "version": run.version,
    }


def _facts(found: Sequence[tuple[int, Any]]) -> tuple[dict[str, Any] | None, str]:
    """The config.json of the newest checkpoint, or why there is none."""
    if not found:
        return None, ""
    try:
        return read_config(found[0][1]), ""
    except PhiSightError as error:
        return None, printable(error, SHOWN)


def _distance(records: Sequence[Mapping[str, Any]], facts: Mapping[str, Any] | None) -> int:
    """Steps from one evaluation to the next; 0 where that is not known yet."""
    steps = [r.get("step", 0) for r in records if r.get("kind") == "evaluation"]
    asked = facts["config"].get("evaluate_steps") if facts else None
    return steps[0] if steps else asked if type(asked) is int else 0


def _figures(status: Status | None) -> dict[str, Any] | None:
    """The status as `Status.as_json` has it, without what the dashboard tells in its own place."""
    if status is None:
        return None
    values = status.as_json()
    return {k: v for k, v in values.items() if k not in ("run", "alerts", "samples", "evaluation")}


def _memory(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The most memory that was held so far, in MiB, as the last training record has it."""
    for record in reversed(records):
        timing = record.get(TIMING)
        if record.get("kind") == "train" and isinstance(timing, Mapping):
            return {
                name: float(timing[name])
                for name in ("memory_mb", "cuda_memory_mb")
                if type(timing.get(name)) in (int, float)
            }
    return {}


def _alignment(records: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """The alignment meter of the last evaluation that has one, in percent."""
    from reports.curves import points

    for record in reversed(records):
        if record.get("kind") == "evaluation":
            found = {share: points([record], "alignment", share) for share in SHARES}
            if all(found.values()):
                shares = {share: point[0][1] for share, point in found.items()}
                return {"step": record["step"], **shares}
    return None


def _recipe(facts: Mapping[str, Any], checkpoint: str) -> dict[str, Any]:
    versions = facts.get("versions")
    return recipe_of(facts["config"]) | {
        "checkpoint": checkpoint,
        "versions": {
            printable(name, SHOWN): printable(text, SHOWN)
            for name, text in (versions if isinstance(versions, dict) else {}).items()
        },
    }


def samples(run: Run) -> list[dict[str, Any]]:
    """The sample answers of every evaluation, each marked right or wrong, and whether its picture
    can be had."""
    run.read()
    facts, _ = _facts(checkpoints_of(run.folder))
    found: dict[str, bool] = {}

    def is_there(name: str) -> bool:
        if facts is None or not name:
            return False
        if name not in found:
            found[name] = pictures.is_there(facts, name)
        return found[name]

    records = [record for record in run.log.kept() if record.get("kind") == "samples"]
    return [
        {
            "step": record.get("step", 0),
            "samples": [
                _sample(one, is_there) for one in (record.get("samples") or ())[:MOST_SAMPLES]
            ],
        }
        for record in records[-MOST_EVALUATIONS:]
    ]


def _sample(found: Mapping[str, str], is_there: Callable[[str], bool]) -> dict[str, Any]:
    texts = {
        name: printable(found.get(name, ""), SHOWN)
        for name in ("question", "answer", "right_answer")
    }
    right = texts["answer"].strip().casefold() == texts["right_answer"].strip().casefold()
    picture = found.get("picture", "")[:SHOWN]
    return texts | {"picture": picture, "shown": is_there(picture), "right": right}
