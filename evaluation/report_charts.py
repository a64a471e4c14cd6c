"""Charts of a report as places on a canvas, for `report_page.html` to draw as SVG.

A chart that is drawn by the page has its text in the page's own size and its colours by the
reader's theme, where a picture would have neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.attention import AttentionShares
from evaluation.task import Figure
from reports.curves import Panel, nice_ticks, panels_of, scale_of, tick_labels

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 26  # margins, for the labels of the axes
POINTS = 500  # of a curve: more cannot be told apart
NUMBERED = 16  # layers whose columns have their numbers written above them


@dataclass(frozen=True)
class Curve:
    label: str
    last: str
    """its newest value"""
    line: str
    """the places of its points, as SVG's `points` has them"""
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    title: str
    curves: tuple[Curve, ...]
    """empty: nothing was recorded"""
    rows: tuple[tuple[float, str], ...] = ()
    """height and label of the lines across"""
    steps: tuple[tuple[float, str], ...] = ()
    """place and label along the lower edge"""


def curves(records: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A run's log as the charts of `reports.curves`, those of one axis of steps."""
    panels = panels_of(records)
    steps = [step for panel in panels for one in panel.series for step, _ in one.points]
    low, high = (min(steps), max(steps)) if steps else (0.0, 1.0)
    return [_chart(panel, (low, high) if low < high else (low - 1, high + 1)) for panel in panels]


def _chart(panel: Panel, span: tuple[float, float]) -> Chart:
    if not panel.series:
        return Chart(panel.title, ())
    values = [value for one in panel.series for _, value in one.points]
    low, high = min(values), max(values)
    if panel.limits is not None:
        least, most = panel.limits
        low, high = min(low, least), max(high, high if most is None else most)
    rows = nice_ticks(low, high, 5)
    x_of = scale_of(*span, LEFT, WIDTH - RIGHT)
    y_of = scale_of(rows[0], rows[-1], HEIGHT - BOTTOM, TOP)
    drawn = []
    for one in panel.series:
        stride = -(-len(one.points) // POINTS)
        kept = [*one.points[:-1:stride], one.points[-1]]
        places = tuple((round(x_of(x), 1), round(y_of(y), 1)) for x, y in kept)
        dots = places if one.dots or len(places) == 1 else ()
        line = " ".join(f"{x},{y}" for x, y in places)
        drawn.append(Curve(one.label, f"{one.points[-1][1]:.4g}{panel.unit}", line, dots))
    return Chart(
        panel.title,
        tuple(drawn),
        tuple(
            (round(y_of(row), 1), label + panel.unit)
            for row, label in zip(rows, tick_labels(rows), strict=True)
        ),
        tuple(
            (round(x_of(tick), 1), f"{int(tick):,}")
            for tick in nice_ticks(*span, 5)
            if tick == int(tick) and span[0] <= tick <= span[1]
        ),
    )


@dataclass(frozen=True)
class Columns:
    """The share of attention of every layer."""

    columns: tuple[tuple[float, float, float, float, str, str], ...]
    """left, top, width and height of a column, its layer and its value"""
    rows: tuple[tuple[float, str], ...]
    chance: float
    """height of the line of the share that chance gives"""
    chance_text: str
    are_numbered: bool
    """whether there is room for the values above the columns"""
    tokens: int


def attention_columns(shares: AttentionShares) -> Columns:
    """A column for each layer, in percent from 0."""
    percent = [100 * share for share in shares.by_layer]
    rows = nice_ticks(0.0, max(*percent, 100 * shares.chance, 1.0), 5)
    y_of = scale_of(rows[0], rows[-1], HEIGHT - BOTTOM, TOP)
    room = (WIDTH - LEFT - RIGHT) / len(percent)
    width = round(min(0.72 * room, 44.0), 1)
    columns = []
    for layer, value in enumerate(percent):
        middle = LEFT + (layer + 0.5) * room
        top = round(y_of(value), 1)
        columns.append(
            (
                round(middle - width / 2, 1), top, width, round(HEIGHT - BOTTOM - top, 1),
                str(layer), f"{value:.0f}",
            )
        )  # fmt: skip
    return Columns(
        tuple(columns),
        tuple(
            (round(y_of(row), 1), f"{label}%")
            for row, label in zip(rows, tick_labels(rows), strict=True)
        ),
        round(y_of(100 * shares.chance), 1),
        f"{100 * shares.chance:.1f} %",
        len(percent) <= NUMBERED,
        shares.tokens,
    )


@dataclass(frozen=True)
class Bar:
    """A figure as a bar with its interval; places are percent of the bar's room."""

    name: str
    text: str
    interval: str
    end: float
    low: float
    high: float


def bars(figures: Mapping[str, Figure]) -> list[Bar]:
    """One of each figure, all on one scale from 0: percent to 100, else to the highest interval."""
    most = max((abs(one.high) for one in figures.values()), default=1.0) or 1.0
    room = max(100.0, most) if all(one.unit == "%" for one in figures.values()) else most

    def place(value: float) -> float:
        return round(100 * min(max(value / room, 0.0), 1.0), 2)

    return [
        Bar(
            name, number(one), interval(one), place(one.value), place(one.low), place(one.high)
        )
        for name, one in figures.items()
    ]  # fmt: skip


def number(one: Figure) -> str:
    """A figure without its unit: percent and points with one digit, others with four."""
    return f"{one.value:.1f}" if one.unit in ("%", "points") else f"{one.value:.4f}"


def interval(one: Figure) -> str:
    """Both ends of its interval."""
    digits = 1 if one.unit in ("%", "points") else 4
    return f"{one.low:.{digits}f} to {one.high:.{digits}f}"
