"""The training tab: the curves and the alignment meter of a run, read from its log as it grows."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import pandas

from errors import PhiSightError
from evaluation.meter import CONDITIONS
from reports.curves import points
from reports.log import read_metrics
from web import texts
from web.chat_page import Session
from web.page import Translated

LOG = "metrics.jsonl"
REFRESH_SECONDS = 3
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito's palette


def runs_in(folder: str | Path) -> list[str]:
    """The names of the runs below a folder, the last one that wrote first."""
    try:
        logs = [(path.stat().st_mtime, path.parent.name) for path in Path(folder).glob(f"*/{LOG}")]
    except OSError:  # a run that was removed at this moment
        return []
    return [name for _, name in sorted(logs, reverse=True)]


@dataclass(frozen=True)
class Curves:
    """What one log shows: (step, value) points by series, in the order of the plots."""

    loss: dict[str, list[tuple[float, float]]]
    alignment: dict[str, list[tuple[float, float]]]
    learning_rate: dict[str, list[tuple[float, float]]]
    gradient_norm: dict[str, list[tuple[float, float]]]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], language: str) -> Curves:
        train = [record for record in records if record.get("kind") == "train"]
        evaluations = [record for record in records if record.get("kind") == "evaluation"]
        norms = [record.get("gradient_norms") for record in train]
        owners = dict.fromkeys(owner for norm in norms if isinstance(norm, dict) for owner in norm)

        def say(key: str) -> str:
            return texts.text(key, language)

        return cls(
            {
                say("trained"): points(train, "loss"),
                say("validated"): points(evaluations, "validation_loss"),
            },
            {say(name): points(evaluations, "alignment", name) for name in CONDITIONS},
            {say("learning_rate"): points(train, "lr")},
            {str(owner): points(train, "gradient_norms", owner) for owner in owners}
            or {say("gradient_norm"): points(train, "gradient_norm")},
        )


class TrainingPage:
    """Builds the tab inside the open `gr.Blocks` and answers its events."""

    def __init__(self, folder: str | Path, translated: Translated, session: gr.State) -> None:
        self.folder, self.translated, self.session = Path(folder), translated, session

    def build(self) -> None:
        t = self.translated
        t(gr.Markdown(), value="training_intro")
        names = runs_in(self.folder)
        self.run = t(
            gr.Dropdown(names, value=names[0] if names else None, elem_id="run"), label="run"
        )
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
        self.shown = gr.State(None)  # what the plots were drawn from

    def connect(self, tab: gr.Tab, blocks: gr.Blocks) -> None:
        inputs = [self.session, self.run, self.shown]
        outputs = [self.run, self.meter, self.shown, *self.plots]
        for event in (self.timer.tick, self.run.input, tab.select):
            event(
                self.on_look,
                inputs,
                outputs,
                concurrency_limit=None,
                show_progress="hidden",
                api_visibility="private",
            )

    def on_look(self, session: Session | None, name: str | None, shown: object) -> dict[Any, Any]:
        """Read the log again; draw only if it, the run or the language has changed."""
        names = runs_in(self.folder)
        language = session.language if session else texts.DEFAULT
        name = name if name in names else (names[0] if names else None)
        if name is None:
            return {self.meter: message(texts.text("no_runs", language))}
        path = self.folder / name / LOG
        try:
            status = path.stat()
            now = (name, language, status.st_size, status.st_mtime_ns, tuple(names))
            if now == shown:
                return {self.shown: shown}
            records = read_metrics(path)
        except OSError as error:
            return {self.meter: message(f"{path}: {error.strerror}")}
        except PhiSightError as error:
            return {self.meter: message(str(error)), self.shown: None}
        curves = Curves.of(records, language)
        return {
            self.run: gr.update(choices=names, value=name),
            self.shown: now,
            self.meter: meter(records, curves, language),
            **dict(
                zip(
                    self.plots,
                    (
                        _plot(curves.loss),
                        _plot(curves.alignment, [0, 100]),
                        _plot(curves.learning_rate, [0, None]),
                        _plot(curves.gradient_norm, [0, None]),
                    ),
                    strict=True,
                )
            ),
        }


def _plot(series: Mapping[str, Sequence[tuple[float, float]]], limits: list | None = None) -> Any:
    rows = [(step, value, name) for name, line in series.items() for step, value in line]
    return gr.update(
        value=pandas.DataFrame(rows, columns=["step", "value", "series"]),
        color_map={name: COLOURS[i % len(COLOURS)] for i, name in enumerate(series)},
        y_lim=limits or [None, None],
    )


# -- the meter -------------------------------------------------------------------------------------


def message(line: str) -> str:
    return f'<p class="message">{html.escape(" ".join(line.split()))}</p>'


def meter(records: Sequence[Mapping[str, Any]], curves: Curves, language: str) -> str:
    """The newest figures as HTML: step, losses, and the three bars of the alignment meter."""
    if not records:
        return message(texts.text("no_records", language))
    last = records[-1].get("step")
    figures = [(texts.text("step", language), f"{last:,}" if isinstance(last, int) else "?")]
    loss = texts.text("loss", language)
    figures += [
        (f"{loss}, {name}", f"{line[-1][1]:.4f}") for name, line in curves.loss.items() if line
    ]
    cards = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{value}</dd></div>" for name, value in figures
    )
    return f'<dl class="figures">{cards}</dl>{_bars(curves, language)}'


def _bars(curves: Curves, language: str) -> str:
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
