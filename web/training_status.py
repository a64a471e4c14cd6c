"""How a run stands, as HTML of the training tab: state, alerts and sample answers.

Every text of a log is escaped. Pictures are named and not shown: a name in a log may lead anywhere.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from reports.status import CRASHED, FINISHED, RUNNING, STOPPED, Status, span
from web import texts

STATES = {
    RUNNING: "state_running",
    FINISHED: "state_finished",
    STOPPED: "state_stopped",
    CRASHED: "state_crashed",
}
ALERTS = 10  # shown at most, the newest
COLUMNS = ("picture", "question", "answer", "right_answer")


def status_html(status: Status, now: float, language: str) -> str:
    """State, time left, rate and last save as figures, and the alerts below them."""

    def label(key: str, **values: object) -> str:
        return html.escape(texts.text(key, language, **values))

    figures = [(label("state"), label(STATES[status.state]))]
    if (eta := status.eta(now)) is not None:
        figures.append((label("time_left"), span(eta)))
    if status.total_steps is not None:
        figures.append((label("steps_done"), f"{status.step:,} / {status.total_steps:,}"))
    if status.tokens_per_second is not None:
        figures.append((label("tokens_per_second"), f"{status.tokens_per_second:,.0f}"))
    if status.save is not None:
        age = span(now - status.save.at)
        figures.append((label("last_save", step=f"{status.save.step:,}"), age))
    cards = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return f'<dl class="figures">{cards}</dl>{_alerts_html(status, language)}'


def _alerts_html(status: Status, language: str) -> str:
    if not status.alerts:
        return ""
    title = html.escape(texts.text("alerts", language, count=len(status.alerts)))
    step = html.escape(texts.text("step", language))
    rows = "".join(
        f"<li>{step} {html.escape(str(alert['step']))}: {html.escape(alert['text'])}</li>"
        for alert in status.alerts[-ALERTS:]
    )
    return f'<h3>{title}</h3><ul class="alerts">{rows}</ul>'


def samples_html(samples: Mapping[str, Any] | None, language: str) -> str:
    """The last sample answers as a table, those that are right marked."""
    if not samples:
        return ""
    title = html.escape(texts.text("samples", language, step=samples["step"]))
    labels = {key: html.escape(texts.text(key, language)) for key in COLUMNS}
    head = "".join(f"<th>{label}</th>" for label in labels.values())
    rows = ""
    for sample in samples["samples"]:
        is_right = sample.get("answer") == sample.get("right_answer")
        cells = "".join(  # on a phone, where a row is a block, each cell bears its label
            f'<td data-label="{label}">{html.escape(sample.get(key, ""))}</td>'
            for key, label in labels.items()
        )
        rows += f'<tr class="{"right" if is_right else "wrong"}">{cells}</tr>'
    return (
        f'<h3 class="samples-title">{title}</h3><table class="samples">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )
