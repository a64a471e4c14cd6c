"""A picture of a run's log: loss, learning rate, gradient norms and alignment over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from errors import PhiSightError
from files import whole_file
from reports.log import DRAWABLE, read_metrics, without_abandoned

SIZE = (1200, 800)
_SCALE = 2  # drawn twice as large and reduced, which smooths the lines
_INK, _FAINT, _GRID = "#222222", "#6b6b6b", "#e6e6e6"
# Told apart by people who do not see all colours (Okabe and Ito's palette).
_BLUE, _ORANGE, _GREEN, _PINK, _SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"


@dataclass(frozen=True)
class _Series:
    label: str
    colour: str
    points: list[tuple[float, float]]  # (step, value)
    dots: bool = False


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    limits: tuple[float, float | None] | None
    """what the axis of values covers at least"""
    series: list[_Series]


def draw_curves(metrics: str | Path | Iterable[Mapping[str, Any]], out_png: str | Path) -> None:
    """Draw a log (a path or its records) as a PNG of 1200 x 800: loss, learning rate, gradient norm
    by owner, and alignment. A curve without points is left out; an empty panel says so."""
    records = read_metrics(metrics) if isinstance(metrics, (str, Path)) else list(metrics)
    panels = _panels(records)
    image = Image.new("RGB", (SIZE[0] * _SCALE, SIZE[1] * _SCALE), "white")
    canvas = ImageDraw.Draw(image)
    steps = [step for panel in panels for one in panel.series for step, _ in one.points]
    span = (min(steps), max(steps)) if steps else (0.0, 1.0)  # one axis of steps for all panels
    if span[0] == span[1]:
        span = (span[0] - 1, span[1] + 1)
    for index, panel in enumerate(panels):
        column, row = index % 2, index // 2
        corner = (SIZE[0] // 2 * column * _SCALE, SIZE[1] // 2 * row * _SCALE)
        _draw_panel(canvas, corner, panel, span)
    out_png = Path(out_png)
    try:
        out_png.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out_png) as temporary:  # a viewer never sees half a picture
            image.resize(SIZE, Image.Resampling.LANCZOS).save(temporary, format="PNG")
    except OSError as error:
        raise PhiSightError(f"{out_png}: {error}; name a file in a writable folder") from error


def _panels(records: Sequence[Mapping[str, Any]]) -> list[_Panel]:
    """The four panels, in the order of reading; series without points are left out."""
    records = without_abandoned(records)
    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    owners = dict.fromkeys(
        owner for record in train for owner in record.get("gradient_norms") or {}
    )
    colours = (_BLUE, _ORANGE, _GREEN, _PINK, _SKY)
    norms = [
        _Series(owner, colours[index % len(colours)], points(train, "gradient_norms", owner))
        for index, owner in enumerate(owners)
    ]
    loss = [
        _Series("training", _BLUE, points(train, "loss")),
        _Series("validation", _ORANGE, points(evaluations, "validation_loss"), dots=True),
    ]
    alignment = [
        _Series(f"{name} picture", colour, points(evaluations, "alignment", name), dots=True)
        for name, colour in (("right", _BLUE), ("swapped", _ORANGE), ("blank", _GREEN))
    ]
    rate = [_Series("learning rate", _BLUE, points(train, "lr"))]
    all_norms = [_Series("all", _BLUE, points(train, "gradient_norm"))]
    panels = [
        _Panel("Loss per answer token", "", None, loss),
        _Panel("Learning rate", "", (0.0, None), rate),
        _Panel("Gradient norm by owner", "", (0.0, None), norms or all_norms),
        _Panel("Alignment: right answers by picture shown", "%", (0.0, 100.0), alignment),
    ]
    for panel in panels:
        panel.series[:] = [one for one in panel.series if one.points]
    return panels


def points(records: Sequence[Mapping[str, Any]], *keys: str) -> list[tuple[float, float]]:
    """(step, value) of every record that has a finite number under the nested keys."""
    points = []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if all(
            isinstance(number, (int, float)) and abs(number) < DRAWABLE  # NaN is not below it
            for number in (record.get("step"), value)
        ):
            points.append((float(record["step"]), float(value)))
    return points


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` to at or above
    `high`, about `most` of them."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal, or too near for round numbers
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [index * gap for index in range(first, last + 1)]


def _tick_labels(ticks: list[float]) -> list[str]:
    """As many digits as the gap between ticks needs, and one power of ten for all of them."""
    gap_power = math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)
    power = math.floor(math.log10(max(map(abs, ticks))) + 1e-9)
    if power < 5 and gap_power >= -3:
        return [f"{tick:,.{max(0, -gap_power)}f}" if tick else "0" for tick in ticks]
    digits = max(0, power - gap_power)
    return [f"{tick / 10.0**power:.{digits}f}e{power}" if tick else "0" for tick in ticks]


def _draw_panel(
    canvas: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    panel: _Panel,
    span: tuple[float, float],
) -> None:
    """One panel of half the width and height of the picture, its top left at `corner`."""

    def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return ImageFont.load_default(size * _SCALE)

    left, top = corner[0] + 78 * _SCALE, corner[1] + 72 * _SCALE
    right, bottom = corner[0] + 576 * _SCALE, corner[1] + 342 * _SCALE
    canvas.text((left, corner[1] + 16 * _SCALE), panel.title, _INK, font(18))
    series, limits = panel.series, panel.limits
    if not series:
        canvas.rectangle((left, top, right, bottom), outline=_GRID, width=_SCALE)
        canvas.text(
            ((left + right) / 2, (top + bottom) / 2),
            "nothing recorded yet",
            _FAINT,
            font(15),
            anchor="mm",
        )
        return
    values = [value for one in series for _, value in one.points]
    low, high = min(values), max(values)
    if limits is not None:
        low, high = min(low, limits[0]), max(high, limits[1] if limits[1] is not None else high)
    rows = nice_ticks(low, high, 5)
    x_of, y_of = _scale(*span, left, right), _scale(rows[0], rows[-1], bottom, top)
    for tick, label in zip(rows, _tick_labels(rows)):
        canvas.line((left, y_of(tick), right, y_of(tick)), _GRID, _SCALE)
        canvas.text(
            (left - 8 * _SCALE, y_of(tick)), label + panel.unit, _FAINT, font(13), anchor="rm"
        )
    for tick in nice_ticks(*span, 6):
        if tick != int(tick) or not span[0] <= tick <= span[1]:  # steps are whole numbers
            continue
        canvas.line((x_of(tick), bottom, x_of(tick), bottom + 5 * _SCALE), _INK, _SCALE)
        canvas.text(
            (x_of(tick), bottom + 9 * _SCALE), f"{int(tick):,}", _FAINT, font(13), anchor="mt"
        )
    canvas.line((left, top, left, bottom, right, bottom), _INK, _SCALE)
    canvas.text(((left + right) / 2, bottom + 30 * _SCALE), "step", _FAINT, font(13), anchor="mt")
    _draw_legend(canvas, left, corner[1] + 53 * _SCALE, series, font(13))
    for one in series:
        _draw_series(canvas, one, x_of, y_of)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _draw_legend(
    canvas: ImageDraw.ImageDraw,
    x: float,
    y: float,
    series: list[_Series],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Names in a row above the panel, where they hide nothing, each with its last value."""
    for one in series:
        canvas.line((x, y, x + 18 * _SCALE, y), one.colour, 3 * _SCALE)
        text = f"{one.label}: {one.points[-1][1]:.4g}"
        canvas.text((x + 24 * _SCALE, y), text, _INK, font, anchor="lm")
        x += (24 + 18) * _SCALE + canvas.textlength(text, font)


def _draw_series(
    canvas: ImageDraw.ImageDraw,
    one: _Series,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
) -> None:
    places = [(x_of(step), y_of(value)) for step, value in one.points]
    if len(places) > 1:
        canvas.line(places, one.colour, 2 * _SCALE)
    if one.dots or len(set(places)) == 1:
        radius = 4 * _SCALE
        for x, y in places:
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), one.colour)
