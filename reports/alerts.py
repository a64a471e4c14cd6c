"""What a log tells of a run that goes wrong, as sentences; `training.alerts` decides when it does.

What the computation decides is a record of its own, in the log's chain: {"kind": "alert", "step",
"alert": name, ...} and {"kind": "rollback", ...}. What the clock decides lies in "alerts" under the
timing of a training record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errors import printable
from reports.log import TIMING, number_text

NOT_FINITE, SPIKE, UNMOVED = "loss_not_finite", "gradient_spike", "unmoved_owner"
STARVED, SLOWER = "data_starvation", "falling_rate"
LONGEST = 300  # characters of a sentence: a name in a log may be of any length


def alert_text(alert: Mapping[str, Any]) -> str:
    """The sentence of an alert or a rollback, of whatever a log holds."""
    name = alert.get("alert")
    if alert.get("kind") == "rollback":
        skipped = alert.get("skipped")
        rows = skipped.get("rows") if isinstance(skipped, Mapping) else None
        text = (
            f"went back from step {_number(alert.get('from_step'))} to"
            f" {_number(alert.get('to_step'))} and goes on behind the {_number(rows)} rows that"
            f" were trained on since ({alert.get('reason')})"
        )
    elif name == NOT_FINITE:
        text = (
            f"the loss is {_number(alert.get('loss'))}, the gradient norm"
            f" {_number(alert.get('gradient_norm'))}; the step was not made"
        )
    elif name == SPIKE:
        text = (
            f"the gradient norm is {_number(alert.get('gradient_norm'))}, its median before"
            f" {_number(alert.get('median'))}"
        )
        if alert.get("no_checkpoint"):
            text += "; the run has no checkpoint of --save-steps to go back to yet, and goes on"
    elif name == UNMOVED:
        text = (
            f"the weights of {alert.get('owner')!r} did not move in this step (gradient norm"
            f" {_number(alert.get('gradient_norm'))})"
        )
    elif name == STARVED:
        text = (
            f"{_number(alert.get('wait_share'), '.0%')} of the time went on waiting for data; the"
            " disk of --features is slow, or --threads leaves none to read with"
        )
    elif name == SLOWER:
        text = (
            f"{_number(alert.get('tokens_per_second'), ',.0f')} tokens/s, the median before was"
            f" {_number(alert.get('median'), ',.0f')}; something else may be using the machine"
        )
    else:
        text = f"{name}"
    return printable(text, LONGEST)


def alerts_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every alert and rollback of a log: {"step", "alert", "text"}, in its order."""
    return [
        {
            "step": record.get("step"),
            "alert": printable(alert.get("alert", record.get("kind")), LONGEST),
            "text": alert_text(alert),
        }
        for record in records
        for alert in _alerts_in(record)
    ]


def _alerts_in(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if record.get("kind") in ("alert", "rollback"):
        yield record
    timing = record.get(TIMING)
    of_clock = timing.get("alerts") if isinstance(timing, Mapping) else None
    for alert in of_clock if isinstance(of_clock, list) else ():
        if isinstance(alert, Mapping):
            yield alert


def _number(value: Any, pattern: str = ".3g") -> str:
    """A number for people; a whole one in full."""
    is_whole = isinstance(value, int) and pattern == ".3g"
    return number_text(value, "," if is_whole else pattern)
