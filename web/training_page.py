"""The training tab: how a run stands, its curves and alignment meter, as its log grows."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas

from checkpoints import METRICS
from errors import PhiSightError
from evaluation.meter import CONDITIONS
from reports.curves import points
from reports.log import read_metrics, without_abandoned
from reports.watching import StatusReader
from web import texts
from web.page import QUEUED, Translated, Updates
from web.session import Session
from web.training_status import samples_html, status_html

REFRESH_SECONDS = 3
RUNS_READ = 8  # whose status is remembered for all who look
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito's palette

Series = dict[str, list[tuple[float, float]]]
"""(step, value) points by the name of their curve."""
Drawn = tuple[str, str, int, int, tuple[str, ...]]
"""What plots were drawn from: run, language, the log's size and time, the names of all runs."""


def run_names(folder: Path) -> list[str]:
    """The names of the runs below a folder, the last one that wrote first."""
    try:
        logs = [(path.stat().st_mtime, path.parent.name) for path in folder.glob(f"*/{METRICS}")]
    except OSError:  # a run that was removed at this moment
        return []
    return [name for _, name in sorted(logs, reverse=True)]


@dataclass(frozen=True)
class Curves:
    """What one log shows, in the order of the plots."""

    loss: Series
    alignment: Series
    learning_rate: Series
    gradient_norm: Series

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]], language: str) -> Curves:
        train = [record for record in records if record.get("kind") == "train"]
        evaluations = [record for record in records if record.get("kind") == "evaluation"]
        norms = [record.get("gradient_norms") for record in train]
        owners = dict.fromkeys(owner for norm in norms if isinstance(norm, dict) for owner in norm)

        def label(key: str) -> str:
            return texts.text(key, language)

        return cls(
            {
                label("trained"): points(train, "loss"),
                label("validated"): points(evaluations, "validation_loss"),
            },
            {label(name): points(evaluations, "alignment", name) for name in CONDITIONS},
            {label("learning_rate"): points(train, "lr")},
            {str(owner): points(train, "gradient_norms", owner) for owner in owners}
            or {label("gradient_norm"): points(train, "gradient_norm")},
        )


class TrainingPage:
    """Builds the tab inside the open `gr.Blocks` and answers its events."""

    def __init__(self, folder: str | Path, translated: Translated, session: gr.State) -> None:
        self.folder, self.translated, self.session = Path(folder), translated, session
        self._readers: dict[str, StatusReader] = {}

    def build(self) -> None:
        t = self.translated
        t(gr.Markdown(), value="training_intro")
        names = run_names(self.folder)
        self.run = t(
            gr.Dropdown(names, value=names[0] if names else None, elem_id="run"), label="run"
        )
        self.status = gr.HTML(elem_id="status")
        self.meter = gr.HTML(elem_id="meter")
        self.plots = []
        for row in (("loss", "right_answers"), ("learning_rate", "gradient_norm")):
            with gr.Row():
                for key in row:
                    self.plots.append(
                        t(
                            gr.LinePlot(
                                x="step",
                                y="value",
                                color="series",
                                height=260,
                                min_width=300,
                                x_title=" ",
                                y_title=" ",
                                color_title=" ",
                                buttons=[],
                                show_label=False,
                                elem_id=f"plot-{key}",
                            ),
                            title=key,
                        )
                    )
        self.timer = gr.Timer(REFRESH_SECONDS)
        self.drawn = gr.State(None)  # what the plots were drawn from

    def connect(self, tab: gr.Tab, blocks: gr.Blocks) -> None:
        inputs = [self.session, self.run, self.drawn]
        outputs = [self.run, self.status, self.meter, self.drawn, *self.plots]
        for event in (self.timer.tick, self.run.input, tab.select):
            event(self.on_look, inputs, outputs, **QUEUED)

    def on_look(self, session: Session | None, name: str | None, drawn: Drawn | None) -> Updates:
        """Read the log again; draw only if it, the run or the language has changed."""
        names = run_names(self.folder)
        language = session.language if session else texts.DEFAULT
        name = name if name in names else (names[0] if names else None)
        if name is None:
            return {self.status: "", self.meter: message_html(texts.text("no_runs", language))}
        path = self.folder / name / METRICS
        try:
            stands = self._reader_of(name).read()
            shown = status_html(stands, time.time(), language)  # its ages grow without the log
            status = path.stat()
            now: Drawn = (name, language, status.st_size, status.st_mtime_ns, tuple(names))
            if now == drawn:
                return {self.status: shown, self.drawn: drawn}
            records = without_abandoned(read_metrics(path))
        except OSError as error:
            return {self.status: "", self.meter: message_html(f"{path}: {error.strerror}")}
        except PhiSightError as error:
            return {self.status: "", self.meter: message_html(str(error)), self.drawn: None}
        curves = Curves.from_records(records, language)
        return {
            self.run: gr.update(choices=names, value=name),
            self.drawn: now,
            self.status: shown,
            self.meter: meter_html(records, curves, language)
            + samples_html(stands.samples, language),
            **dict(
                zip(
                    self.plots,
                    (
                        _plot(curves.loss),
                        _plot(curves.alignment, (0, 100)),
                        _plot(curves.learning_rate, (0, None)),
                        _plot(curves.gradient_norm, (0, None)),
                    ),
                    strict=True,
                )
            ),
        }

    def _reader_of(self, name: str) -> StatusReader:
        if name not in self._readers:
            self._readers = dict([*self._readers.items()][-RUNS_READ:])  # of the latest runs
            self._readers[name] = StatusReader(self.folder / name)
        return self._readers[name]


def _plot(
    series: Series, limits: tuple[float | None, float | None] = (None, None)
) -> dict[str, Any]:
    """The update of a plot; `limits` are those of its vertical axis."""
    rows = [(step, value, name) for name, line in series.items() for step, value in line]
    return gr.update(
        value=pandas.DataFrame(rows, columns=["step", "value", "series"]),
        color_map={name: COLOURS[i % len(COLOURS)] for i, name in enumerate(series)},
        y_lim=list(limits),
    )


# -- the meter -------------------------------------------------------------------------------------


def message_html(line: str) -> str:
    return f'<p class="message">{html.escape(" ".join(line.split()))}</p>'


def meter_html(records: Sequence[Mapping[str, Any]], curves: Curves, language: str) -> str:
    """The newest figures as HTML: step, losses, and the three bars of the alignment meter."""
    if not records:
        return message_html(texts.text("no_records", language))
    last = records[-1].get("step")
    figures = [(texts.text("step", language), f"{last:,}" if isinstance(last, int) else "?")]
    loss = texts.text("loss", language)
    figures += [
        (f"{loss}, {name}", f"{line[-1][1]:.4f}") for name, line in curves.loss.items() if line
    ]
    cards = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{value}</dd></div>" for name, value in figures
    )
    return f'<dl class="figures">{cards}</dl>{_bars_html(curves, language)}'


def _bars_html(curves: Curves, language: str) -> str:
    values = {name: line[-1][1] for name, line in curves.alignment.items() if line}
    if not values:
        return ""
    rows = "".join(
        f'<div class="bar"><span>{html.escape(name)}</span><i><b style="width:{share:.1f}%;'
        f'background:{colour}"></b></i><em>{value:.1f} %</em></div>'
        for (name, value), colour in zip(values.items(), COLOURS)
        for share in [min(100.0, max(0.0, value))]
    )
    apart = ""
    if len(values) == len(CONDITIONS):
        right, swapped, _ = values.values()
        apart = html.escape(texts.text("points_apart", language, points=f"{right - swapped:.1f}"))
    title = html.escape(texts.text("alignment", language))
    info = html.escape(texts.text("alignment_info", language))
    return f'<h3>{title} <small>{apart}</small></h3>{rows}<p class="info">{info}</p>'
