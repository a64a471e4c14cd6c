"""Where a run stands, by its files alone: what `train.py --status`, the app and /metrics show.

Nothing here loads a model or torch, and nothing is written: a run may be training meanwhile.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from documents import COUNT, TEXT, problems, read_json
from errors import PhiSightError, printable
from reports.alerts import alerts_of
from reports.log import DRAWABLE, METRICS, TIMING, read_metrics, without_abandoned
from reports.starts import Starts, read_starts, start_text

RUNNING, FINISHED, STOPPED, CRASHED = "running", "finished", "stopped", "crashed"
WINDOWS = 5  # of the log, that rate and ETA are the median of
SHOWN_ALERTS = 5  # the newest, on the screen; --json has all
SHARES = {"right": "right picture", "swapped": "swapped", "blank": "blank"}  # of the meter
_NAME = re.compile(r"checkpoint-([0-9]{6,18})")
_STATE = {"step": COUNT, "finished": TEXT, "total_steps?": COUNT, "metrics_offset?": COUNT}


@dataclass(frozen=True)
class Save:
    """The newest checkpoint of a run, by its files' names and times: it is not verified here."""

    step: int
    at: float
    """when it was written, in seconds since 1970"""
    bytes: int
    finished: str
    total_steps: int | None
    metrics_offset: int | None


@dataclass(frozen=True)
class Status:
    """Where a run stands. `as_json` gives what the clock makes of it as well."""

    run: str
    state: str
    """one of `RUNNING`, `FINISHED`, `STOPPED` (it was saved when it ended), `CRASHED`"""
    holder: str
    """who trains it, empty for nobody"""
    step: int
    """of the last record of the log, or of the newest checkpoint where that is later"""
    total_steps: int | None
    logged_at: float | None
    """when the log was last written to"""
    loss: float | None
    loss_before: float | None
    """median of the losses of the records before it, `WINDOWS` of them at most"""
    tokens_per_second: float | None
    seconds_left: float | None
    """from the last record on, with the evaluations to come"""
    evaluation: Mapping[str, Any] | None
    """the last one: step, validation_loss, and the shares that the alignment meter names; None for
    what is not finite"""
    samples: Mapping[str, Any] | None
    """the last ones: step, samples"""
    save: Save | None
    finished: str = ""
    alerts: list[dict[str, Any]] = field(default_factory=list)
    starts: Starts | None = None
    """None where the run has none written down, as before there were any"""

    def as_json(self, now: float | None = None) -> dict[str, Any]:
        """Every field, with ages and what is left in seconds from `now` (None: the clock's)."""
        now = time.time() if now is None else now
        values = dataclasses.asdict(self)
        values["seconds_since_log"] = None if self.logged_at is None else now - self.logged_at
        if values["save"]:
            values["save"]["age_seconds"] = now - values["save"]["at"]
        values["eta_seconds"] = self.eta(now)
        return values

    def eta(self, now: float) -> float | None:
        """Seconds until the run is at its end, where it is running and has made steps."""
        if self.state != RUNNING or self.seconds_left is None or self.logged_at is None:
            return None
        return max(0.0, self.seconds_left - max(0.0, now - self.logged_at))


def status_of(
    run: Path, holder: str, read: Callable[[Path], Sequence[dict[str, Any]]] = read_metrics
) -> Status:
    """Read the files of a run. `holder`: who trains it, as `reports.watching.holder_of` finds;
    `read` gives the records of its log, as `read_metrics` does.

    Raises:
        PhiSightError: there is no run, or a file of it cannot be read.
    """
    log = run / METRICS
    save = newest_save(run)
    size = stamp = None
    if log.exists() or log.is_symlink():
        try:
            found = log.stat()
            size, stamp = found.st_size, found.st_mtime
        except OSError as error:
            raise PhiSightError(f"{log}: {error.strerror}; name the folder of a run") from error
    elif save is None and not holder:
        what = "holds no run" if run.is_dir() else "no such folder"
        raise PhiSightError(f"{run}: {what}; name the folder of a run: --status RUN")
    records = [] if stamp is None else read(log)
    finished = save.finished if save else ""
    state = STOPPED
    if holder:
        state, finished = RUNNING, ""
    elif finished:
        state = FINISHED
    elif stamp is not None and (save is None or save.metrics_offset not in (None, size)):
        state = CRASHED
    return Status(
        run=str(run),
        state=state,
        holder=holder,
        logged_at=stamp,
        save=save,
        finished=printable(finished, 200),
        alerts=alerts_of(records),
        starts=read_starts(run),
        **_figures(without_abandoned(records), save),
    )


def newest_save(run: Path) -> Save | None:
    """The newest checkpoint; None where there is none. Raises PhiSightError."""
    try:
        found = [
            (int(match[1]), path)
            for path in (run.iterdir() if run.is_dir() else ())
            if (match := _NAME.fullmatch(path.name)) and path.is_dir()
        ]
        for step, folder in sorted(found, reverse=True):
            try:
                return _save_in(folder, step)
            except FileNotFoundError:
                continue  # a training has just removed it
    except OSError as error:
        raise PhiSightError(f"{error.filename or run}: {error.strerror}; look there") from error
    return None


def _save_in(folder: Path, step: int) -> Save:
    path = folder / "trainer_state.json"
    try:
        state = read_json(path)
        for problem in problems(state, _STATE):
            raise PhiSightError(problem)
    except PhiSightError as error:
        raise PhiSightError(f"{path}: {error}; see checkpoints.py verify {folder}") from error
    sizes = [entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()]
    return Save(
        step,
        path.stat().st_mtime,
        sum(sizes),
        state["finished"],
        state.get("total_steps"),
        state.get("metrics_offset"),
    )


def _figures(records: Sequence[Mapping[str, Any]], save: Save | None) -> dict[str, Any]:
    """What the log says of the steps that were kept."""
    train = [r for r in records if r.get("kind") == "train" and "step" in r]
    evaluations = [r for r in records if r.get("kind") == "evaluation" and "step" in r]
    samples = [
        r for r in records if r.get("kind") == "samples" and "step" in r and r.get("samples")
    ]
    losses = [loss for r in train if (loss := _finite(r.get("loss"))) is not None]
    last = train[-1] if train else {}
    total = last.get("total_steps")
    if save and save.total_steps is not None and (total is None or save.step >= last["step"]):
        total = save.total_steps  # a run that went back from its last step has fewer by then
    logged = max(last.get("step", 0), evaluations[-1]["step"] if evaluations else 0)
    rates = [_of_timing(r, "tokens_per_second") for r in train[-WINDOWS:]]
    return {
        "step": max(logged, save.step if save else 0),
        "total_steps": total,
        "loss": _finite(last.get("loss")),
        "loss_before": statistics.median(losses[-WINDOWS - 1 : -1]) if losses[1:] else None,
        "tokens_per_second": statistics.median(some) if (some := _known(rates)) else None,
        "seconds_left": _seconds_left(train, evaluations, logged, total),
        "evaluation": _evaluation_of(evaluations[-1]) if evaluations else None,
        "samples": {n: samples[-1][n] for n in ("step", "samples")} if samples else None,
    }


def _seconds_left(
    train: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    step: int,
    total: int | None,
) -> float | None:
    """By the time of the latest steps, and of the evaluations at the distance of those before."""
    paces = []
    for before, record in zip([{"step": 0}, *train], train):
        steps, seconds = record["step"] - before["step"], _of_timing(record, "seconds")
        if steps > 0 and seconds is not None:
            paces.append(seconds / steps)
    if total is None or not paces:
        return None
    left = max(0, total - step)
    seconds = left * statistics.median(paces[-WINDOWS:])
    if evaluations and (every := evaluations[0]["step"]) > 0:
        took = _known([_of_timing(record, "seconds") for record in evaluations[-WINDOWS:]])
        seconds += statistics.median(took) * (left // every) if took else 0.0
    return seconds


def _of_timing(record: Mapping[str, Any], name: str) -> float | None:
    timing = record.get(TIMING)
    return _finite(timing.get(name)) if isinstance(timing, Mapping) else None


def _finite(value: Any) -> float | None:
    """A number that can be shown, of whatever a log holds."""
    drawable = type(value) in (int, float) and abs(value) < DRAWABLE  # NaN is not below it
    return float(value) if drawable else None


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _evaluation_of(record: Mapping[str, Any]) -> dict[str, Any]:
    meter = record.get("alignment") or {}
    return {
        "step": record["step"],
        "validation_loss": _finite(record.get("validation_loss")),
        "alignment": {name: _finite(meter[name]) for name in SHARES if name in meter},
    }


# -- on the screen ---------------------------------------------------------------------------------


def status_lines(status: Status, now: float | None = None) -> list[str]:
    """One screen for a person."""
    now = time.time() if now is None else now
    lines = [headline(status, now)]

    def add(name: str, text: str) -> None:
        lines.append(f"{name:<12}{text}")

    if status.loss is not None:
        before = status.loss_before
        trend = "" if before is None else f"  (median of those before: {before:.4f})"
        add("loss", f"{status.loss:.4f}{trend}")
    if status.tokens_per_second is not None:
        add("rate", f"{status.tokens_per_second:,.0f} tokens/s")
    add("last save", "none" if status.save is None else _save_text(status.save, now))
    if status.evaluation:
        add("evaluation", _evaluation_text(status.evaluation))
    if status.samples:
        add("samples", f"of step {status.samples['step']}")
        lines += [f"  {sample_text(sample)}" for sample in status.samples["samples"]]
    add("alerts", f"{len(status.alerts)}" if status.alerts else "none")
    lines += [f"  step {a['step']}: {a['text']}" for a in status.alerts[-SHOWN_ALERTS:]]
    if status.starts:
        add("started", start_text(status.starts))
    return lines


def headline(status: Status, now: float) -> str:
    """What the run does, and how far it is."""
    of = "" if status.total_steps is None else f" of {status.total_steps:,}"
    place = f"step {status.step:,}{of}"
    if status.state == RUNNING:
        logged, eta = status.logged_at, status.eta(now)
        age = "" if logged is None or not status.step else f", logged {span(now - logged)} ago"
        left = "" if eta is None else f"; {span(eta)} left"
        return f"{status.run}: running ({status.holder}), {place}{age}{left}"
    if status.state == FINISHED:
        return f"{status.run}: finished, {place}: {status.finished}"
    if status.state == CRASHED:
        saved = "nothing was saved" if status.save is None else f"--resume at {status.save.step:,}"
        return f"{status.run}: ended without a save, {place}; {saved}"
    return f"{status.run}: stopped, {place}; go on with --resume"


def sample_text(sample: Mapping[str, str]) -> str:
    """A question, its answer and the right one, on a line."""
    texts = {name: printable(sample.get(name, ""), 80) for name in sample}
    return (
        f"{texts.get('picture', '')}  {texts.get('question', '')}  -> {texts.get('answer', '')}"
        f"  (right answer: {texts.get('right_answer', '')})"
    )


def span(seconds: float) -> str:
    """A time for people, in its two largest units."""
    rest = max(0, round(seconds))
    for large, name, small, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if rest >= large:
            return f"{rest // large} {name} {rest % large // small} {part}"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"


def _save_text(save: Save, now: float) -> str:
    return f"step {save.step:,}, {span(now - save.at)} ago, {save.bytes / 1e6:.1f} MB"


def _evaluation_text(evaluation: Mapping[str, Any]) -> str:
    loss = evaluation["validation_loss"]
    parts = [f"validation loss {'not finite' if loss is None else format(loss, '.4f')}"]
    for name, value in evaluation["alignment"].items():
        if value is not None:
            parts.append(f"{SHARES[name]} {value:.1f} %")
    return f"step {evaluation['step']:,}: {', '.join(parts)}"
