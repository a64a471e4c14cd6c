"""A picture of paired differences: a row a variant, a dot a seed, a bar for the mean."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageDraw

from reports.curves import (
    FAINT,
    GRID,
    INK,
    SCALE,
    blank_picture,
    font_of,
    nice_ticks,
    save_picture,
    scale_of,
    tick_labels,
)

NAMES, PANEL, MARGIN = 330, 330, 20  # pixels across: the names, a panel, between panels
TOP, ROW, BOTTOM = 64, 34, 44  # pixels down
BETTER, WORSE, NEITHER = "#0072b2", "#d55e00", "#6b6b6b"


@dataclass(frozen=True)
class DotPanel:
    """One figure of all variants."""

    title: str
    lower_is_better: bool
    rows: Sequence[Sequence[float]]
    """for each variant the difference of every seed; none where it was not measured"""


def draw_dots(names: Sequence[str], panels: Sequence[DotPanel], out_png: str | Path) -> None:
    """Draw all panels side by side over the same rows. Blue is better in every seed, orange worse
    in every seed, grey neither. Raises `PhiSightError` where the file cannot be written."""
    size = (NAMES + len(panels) * PANEL, TOP + len(names) * ROW + BOTTOM)
    image, canvas = blank_picture(size)
    for row, name in enumerate(names):
        canvas.text((MARGIN * SCALE, middle_of(row)), name, INK, font_of(14), anchor="lm")
    for number, panel in enumerate(panels):
        _draw_panel(canvas, NAMES + number * PANEL, len(names), panel)
    save_picture(image, size, out_png)


def colour_of(differences: Sequence[float], lower_is_better: bool) -> str:
    """By whether all seeds agree."""
    signs = {(one > 0) - (one < 0) for one in differences}
    if len(signs) != 1 or signs == {0}:
        return NEITHER
    return BETTER if (signs == {-1}) == lower_is_better else WORSE


def middle_of(row: int) -> float:
    return (TOP + (row + 0.5) * ROW) * SCALE


def _draw_panel(canvas: ImageDraw.ImageDraw, start: int, count: int, panel: DotPanel) -> None:
    left, right = (start + MARGIN) * SCALE, (start + PANEL - MARGIN) * SCALE
    top, bottom = TOP * SCALE, (TOP + count * ROW) * SCALE
    values = [0.0, *(value for row in panel.rows for value in row)]
    ticks = nice_ticks(min(values), max(values), 4)
    x_of = scale_of(ticks[0], ticks[-1], left, right)
    canvas.text((left, 12 * SCALE), panel.title, INK, font_of(15))
    better = "to the left is better" if panel.lower_is_better else "to the right is better"
    canvas.text((left, 34 * SCALE), better, FAINT, font_of(12))
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        x, is_zero = x_of(tick), tick == 0
        canvas.line((x, top, x, bottom), INK if is_zero else GRID, SCALE)
        canvas.text((x, bottom + 8 * SCALE), label, FAINT, font_of(12), anchor="mt")
    for row, differences in enumerate(panel.rows):
        if not differences:
            continue
        colour, y = colour_of(differences, panel.lower_is_better), middle_of(row)
        mean = x_of(statistics.fmean(differences))
        canvas.line((mean, y - 11 * SCALE, mean, y + 11 * SCALE), colour, 3 * SCALE)
        for value in differences:
            x, radius = x_of(value), 4 * SCALE
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
