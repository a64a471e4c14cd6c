"""What a run's folder says of the run, read without its weights: config, log, and what was asked.

A run may be unfinished, damaged or without a log. What cannot be read is left out and told of in a
note, so that the other runs of a comparison can still be looked at.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import config_values
from checkpoint_state import CONFIG, TRAINER_STATE
from config import Config
from documents import COUNT, FINITE, OBJECT, TEXT, parse_json, problems
from errors import PhiSightError
from files import read_regular, write_whole
from reports.log import METRICS, TIMING, chain_problems, read_metrics, without_abandoned

EVALUATION = "evaluation.json"  # in a run's folder: what `evaluate.py --json` printed of it
FILE_LIMIT = 2**24  # bytes
DIGESTS = {"base": "base_fingerprint", "vision": "vision_fingerprint"}
"""field that names weights -> where a checkpoint has their digest"""
_CONFIG = {"config": OBJECT} | {f"{digest}?": TEXT for digest in DIGESTS.values()}
_STATE = {"step": COUNT, "finished?": TEXT, "total_steps?": COUNT}
_EVALUATION = {"checkpoint": TEXT, "held_out?": FINITE, "swapped?": FINITE, "alignment?": FINITE}


@dataclass(frozen=True)
class RunFigures:
    """One run. Figures that are not there are None."""

    path: Path
    config: Config | None = None
    step: int = 0
    """of the newest checkpoint"""
    total_steps: int = 0
    finished: str = ""
    """why it is over, or empty"""
    records: Sequence[Mapping[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    """what was asked of its newest checkpoint, in percent"""
    notes: tuple[str, ...] = ()
    """what is not as it should be, a line each"""
    weights: Mapping[str, str] = field(default_factory=dict)
    """field that names them, "base" or "vision" -> the digest of the weights it was trained on"""

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    @property
    def fields(self) -> dict[str, Any]:
        """Its config as plain values; nothing where none could be read."""
        return config_values.plain(self.config) if self.config else {}

    @property
    def settings(self) -> dict[str, Any]:
        """Its fields, and digests of the weights that two of them name."""
        digests = {of: self.weights.get(name, "")[:12] for name, of in DIGESTS.items()}
        return self.fields | digests if self.config else {}

    @property
    def state(self) -> str:
        """How far it is, for people."""
        if self.finished:
            return f"finished at {self.step:,}"
        of = f" of {self.total_steps:,}" if self.total_steps else ""
        return f"stopped at {self.step:,}{of}" if self.step else "no checkpoint"

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures of a table, by their names in JSON; see `FIGURES`."""
        return {name: _number(one.of(self)) for name, one in FIGURES.items()}


def last(run: RunFigures, kind: str, *keys: str) -> Any:
    """A value of the newest record of a kind that has it under these nested keys."""
    for record in reversed(run.records):
        value: Any = record if record.get("kind") == kind else None
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def lowest_validation_loss(run: RunFigures) -> float | None:
    losses = [_number(record.get("validation_loss")) for record in run.records]
    return min((loss for loss in losses if loss is not None), default=None)


def alignment(run: RunFigures) -> float | None:
    """Points between the right picture and a swapped one at the last evaluation of training."""
    right, swapped = (
        _number(last(run, "evaluation", "alignment", name)) for name in ("right", "swapped")
    )
    return None if right is None or swapped is None else right - swapped


def training_seconds(run: RunFigures) -> float | None:
    """Of all steps that are in the log; the start and the evaluations are not among them."""
    seconds = _timings(run, "seconds")
    return sum(seconds) if seconds else None


def tokens_per_second(run: RunFigures) -> float | None:
    """The median over the windows of the log: the first one warms up, others may be disturbed."""
    rates = _timings(run, "tokens_per_second")
    return statistics.median(rates) if rates else None


def _timings(run: RunFigures, name: str) -> list[float]:
    """That of every training record that has it."""
    windows = [record for record in run.records if record.get("kind") == "train"]
    found = [_number((record.get(TIMING) or {}).get(name)) for record in windows]
    return [one for one in found if one is not None]


def _number(value: Any) -> float | None:
    return float(value) if FINITE.holds(value) else None


@dataclass(frozen=True)
class FigureOfRun:
    """A column of a table of runs."""

    title: str
    pattern: str
    of: Callable[[RunFigures], Any]
    best: str = ""
    """"low" or "high" where that is better"""


FIGURES = {
    "validation_loss": FigureOfRun(
        "validation loss", ".4f", lambda run: last(run, "evaluation", "validation_loss"), "low"
    ),
    "lowest_validation_loss": FigureOfRun("lowest", ".4f", lowest_validation_loss, "low"),
    "alignment": FigureOfRun("right - swapped", ".1f", alignment, "high"),
    "held_out": FigureOfRun(
        "held out, exact %", ".1f", lambda run: run.evaluation.get("held_out"), "high"
    ),
    "held_out_alignment": FigureOfRun(
        "held out, right - swapped", ".1f", lambda run: run.evaluation.get("alignment"), "high"
    ),
    "loss": FigureOfRun("training loss", ".4f", lambda run: last(run, "train", "loss"), "low"),
    "seconds": FigureOfRun("training, s", ",.0f", training_seconds),
    "tokens_per_second": FigureOfRun("tokens/s", ",.0f", tokens_per_second),
}


# -- reading --------------------------------------------------------------------------------------


def read_run(path: str | Path) -> RunFigures:
    """All of one run that can be read. Raises `PhiSightError` where no run is."""
    path = Path(path)
    log = path / METRICS
    try:
        saved, has_log = checkpoints.checkpoints_in(path), log.is_file()
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; name a run's folder") from None
    if not saved and not has_log:
        raise PhiSightError(f"{path}: holds no run; name a folder that train.py wrote to")
    notes: list[str] = []
    config, weights, state = _newest(saved, notes)
    records = _records(log, notes)
    step = state.get("step", 0)
    total = state.get("total_steps", 0)
    finished = state.get("finished", "")
    if not finished and state:
        notes.append(f"is not finished: it stands at step {step:,} of {total:,}")
    evaluation = _evaluation(path / EVALUATION, step, notes)
    return RunFigures(
        path, config, step, total, finished, records, evaluation, tuple(notes), weights
    )


def _newest(
    saved: list[Path], notes: list[str]
) -> tuple[Config | None, dict[str, str], dict[str, Any]]:
    """Config, digests of weights and trainer_state of the newest checkpoint that can be read."""
    for folder in reversed(saved):
        try:
            read = [
                parse_json(read_regular(folder / name, FILE_LIMIT))
                for name in (CONFIG, TRAINER_STATE)
            ]
            if wrong := [*problems(read[0], _CONFIG), *problems(read[1], _STATE)]:
                raise PhiSightError(wrong[0])
            weights = {name: read[0].get(of, "") for name, of in DIGESTS.items()}
            return config_values.from_dict(read[0]["config"], folder.name), weights, read[1]
        except (OSError, PhiSightError) as error:
            notes.append(f"{folder.name} cannot be read: {_reason(error)}")
    if not saved:
        notes.append("has no checkpoint, so that its config is not known")
    return None, {}, {}


def _records(log: Path, notes: list[str]) -> list[Mapping[str, Any]]:
    """Those of the log up to where it is damaged, without the steps that a rollback undid."""
    if not log.is_file():
        notes.append(f"has no {METRICS}")
        return []
    try:
        records = read_metrics(log)
    except PhiSightError as damage:
        try:
            records = read_metrics(log, to_first_fault=True)
        except PhiSightError as error:
            notes.append(f"{METRICS} cannot be read: {_reason(error)}")
            return []
        notes.append(f"{METRICS} is damaged, what comes before is shown: {_reason(damage)}")
    if problems_of_chain := chain_problems(records):
        notes.append(f"{METRICS}: {problems_of_chain[0]}")
    if not records:
        notes.append(f"{METRICS} has no record yet")
    return without_abandoned(records)


def _evaluation(file: Path, step: int, notes: list[str]) -> dict[str, Any]:
    """What was asked of the checkpoint of this step; of an older one it would mislead."""
    if not file.exists():
        return {}
    try:
        found = parse_json(read_regular(file, FILE_LIMIT))
        if wrong := [*problems(found, _EVALUATION)]:
            raise PhiSightError(wrong[0])
    except (OSError, PhiSightError) as error:
        notes.append(f"{EVALUATION} cannot be read: {_reason(error)}")
        return {}
    if Path(found["checkpoint"]).name != f"checkpoint-{step:06d}":
        notes.append(f"{EVALUATION} is of {Path(found['checkpoint']).name}, and left out")
        return {}
    return found


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def keep_evaluation(run: Path, printed: bytes) -> None:
    """Put what `evaluate.py --json` printed of a run beside it. Raises `PhiSightError` where it is
    not that, or cannot be written."""
    if wrong := [*problems(parse_json(printed), _EVALUATION)]:
        raise PhiSightError(f"evaluate.py: {wrong[0]}")
    try:
        write_whole(run / EVALUATION, printed)
    except OSError as error:
        raise PhiSightError(f"{run / EVALUATION}: {error.strerror}; make room") from error
