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
SCALE = 2  # drawn twice as large and reduced, which smooths the lines
INK, FAINT, GRID = "#222222", "#6b6b6b", "#e6e6e6"
# Told apart by people who do not see all colours (Okabe and Ito's palette).
_BLUE, _ORANGE, _GREEN, _PINK, _SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"


@dataclass(frozen=True)
class Series:
    label: str
    colour: str
    points: list[tuple[float, float]]  # (step, value)
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    limits: tuple[float, float | None] | None
    """what the axis of values covers at least"""
    series: list[Series]


def draw_curves(metrics: str | Path | Iterable[Mapping[str, Any]], out_png: str | Path) -> None:
    """Draw a log (a path or its records) as a PNG of 1200 x 800: loss, learning rate, gradient norm
    by owner, and alignment. A curve without points is left out; an empty panel says so."""
    records = read_metrics(metrics) if isinstance(metrics, (str, Path)) else list(metrics)
    panels = panels_of(records)
    image, canvas = blank_picture(SIZE)
    draw_panels(canvas, panels)
    save_picture(image, SIZE, out_png)


def blank_picture(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """White, `SCALE` times as large as it will be, and what draws on it."""
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    return image, ImageDraw.Draw(image)


def save_picture(image: Image.Image, size: tuple[int, int], out_png: str | Path) -> None:
    """Reduce what was drawn to its size and write it as a PNG, whole or not at all. Raises
    `PhiSightError` where it cannot be written."""
    out_png = Path(out_png)
    try:
        out_png.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out_png) as temporary:  # a viewer never sees half a picture
            image.resize(size, Image.Resampling.LANCZOS).save(temporary, format="PNG")
    except OSError as error:
        raise PhiSightError(f"{out_png}: {error}; name a file in a writable folder") from error


def draw_panels(canvas: ImageDraw.ImageDraw, panels: Sequence[Panel], legends: bool = True) -> None:
    """Panels two in a row, over one axis of steps."""
    steps = [step for panel in panels for one in panel.series for step, _ in one.points]
    span = (min(steps), max(steps)) if steps else (0.0, 1.0)
    if span[0] == span[1]:
        span = (span[0] - 1, span[1] + 1)
    for index, panel in enumerate(panels):
        column, row = index % 2, index // 2
        corner = (SIZE[0] // 2 * column * SCALE, SIZE[1] // 2 * row * SCALE)
        _draw_panel(canvas, corner, panel, span, legends)


def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


def panels_of(records: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The four panels, in the order of reading; series without points are left out."""
    records = without_abandoned(records)
    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    owners = dict.fromkeys(
        owner for record in train for owner in record.get("gradient_norms") or {}
    )
    colours = (_BLUE, _ORANGE, _GREEN, _PINK, _SKY)
    norms = [
        Series(owner, colours[index % len(colours)], points(train, "gradient_norms", owner))
        for index, owner in enumerate(owners)
    ]
    loss = [
        Series("training", _BLUE, points(train, "loss")),
        Series("validation", _ORANGE, points(evaluations, "validation_loss"), dots=True),
    ]
    alignment = [
        Series(f"{name} picture", colour, points(evaluations, "alignment", name), dots=True)
        for name, colour in (("right", _BLUE), ("swapped", _ORANGE), ("blank", _GREEN))
    ]
    rate = [Series("learning rate", _BLUE, points(train, "lr"))]
    all_norms = [Series("all", _BLUE, points(train, "gradient_norm"))]
    panels = [
        Panel("Loss per learnt token", "", None, loss),
        Panel("Learning rate", "", (0.0, None), rate),
        Panel("Gradient norm by owner", "", (0.0, None), norms or all_norms),
        Panel("Alignment: right answers by picture shown", "%", (0.0, 100.0), alignment),
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


def tick_labels(ticks: list[float]) -> list[str]:
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
    panel: Panel,
    span: tuple[float, float],
    legend: bool,
) -> None:
    """One panel of half the width and height of the picture, its top left at `corner`."""
    left, top = corner[0] + 78 * SCALE, corner[1] + 72 * SCALE
    right, bottom = corner[0] + 576 * SCALE, corner[1] + 342 * SCALE
    canvas.text((left, corner[1] + 16 * SCALE), panel.title, INK, font_of(18))
    series, limits = panel.series, panel.limits
    if not series:
        canvas.rectangle((left, top, right, bottom), outline=GRID, width=SCALE)
        canvas.text(
            ((left + right) / 2, (top + bottom) / 2),
            "nothing recorded yet",
            FAINT,
            font_of(15),
            anchor="mm",
        )
        return
    values = [value for one in series for _, value in one.points]
    low, high = min(values), max(values)
    if limits is not None:
        low, high = min(low, limits[0]), max(high, limits[1] if limits[1] is not None else high)
    rows = nice_ticks(low, high, 5)
    x_of, y_of = scale_of(*span, left, right), scale_of(rows[0], rows[-1], bottom, top)
    for tick, label in zip(rows, tick_labels(rows)):
        canvas.line((left, y_of(tick), right, y_of(tick)), GRID, SCALE)
        canvas.text(
            (left - 8 * SCALE, y_of(tick)), label + panel.unit, FAINT, font_of(13), anchor="rm"
        )
    for tick in nice_ticks(*span, 6):
        if tick != int(tick) or not span[0] <= tick <= span[1]:  # steps are whole numbers
            continue
        canvas.line((x_of(tick), bottom, x_of(tick), bottom + 5 * SCALE), INK, SCALE)
        canvas.text(
            (x_of(tick), bottom + 9 * SCALE), f"{int(tick):,}", FAINT, font_of(13), anchor="mt"
        )
    canvas.line((left, top, left, bottom, right, bottom), INK, SCALE)
    canvas.text(((left + right) / 2, bottom + 30 * SCALE), "step", FAINT, font_of(13), anchor="mt")
    if legend:
        _draw_legend(canvas, left, corner[1] + 53 * SCALE, series, font_of(13))
    for one in series:
        _draw_series(canvas, one, x_of, y_of)


def scale_of(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _draw_legend(
    canvas: ImageDraw.ImageDraw,
    x: float,
    y: float,
    series: list[Series],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Names in a row above the panel, where they hide nothing, each with its last value."""
    for one in series:
        canvas.line((x, y, x + 18 * SCALE, y), one.colour, 3 * SCALE)
        text = f"{one.label}: {one.points[-1][1]:.4g}"
        canvas.text((x + 24 * SCALE, y), text, INK, font, anchor="lm")
        x += (24 + 18) * SCALE + canvas.textlength(text, font)


def _draw_series(
    canvas: ImageDraw.ImageDraw,
    one: Series,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
) -> None:
    places = [(x_of(step), y_of(value)) for step, value in one.points]
    if len(places) > 1:
        canvas.line(places, one.colour, 2 * SCALE)
    if one.dots or len(set(places)) == 1:
        radius = 4 * SCALE
        for x, y in places:
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), one.colour)
