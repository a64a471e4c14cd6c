"""The curves of several runs in one picture, on the axes of `reports.curves`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageDraw

from errors import printable
from reports.curves import (
    FAINT,
    INK,
    SCALE,
    SIZE,
    Panel,
    Series,
    blank_picture,
    draw_panels,
    font_of,
    points,
    save_picture,
)

# Told apart by people who do not see all colours (Okabe and Ito's palette, without its yellow).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LEGEND_COLUMNS, LEGEND_LINE, LEGEND_MARGIN = 3, 24, 16  # pixels but the first


@dataclass(frozen=True)
class Curves:
    """One run, or several of one setting, which then have one colour and one name."""

    label: str
    logs: Sequence[Sequence[Mapping[str, Any]]]


def draw_overlay(runs: Sequence[Curves], out_png: str | Path) -> None:
    """Training loss, validation loss, and alignment of all runs over their steps, as a PNG of
    1200 pixels across. Raises `PhiSightError` where it cannot be written."""
    lines = -(-len(runs) // LEGEND_COLUMNS)
    size = (SIZE[0], SIZE[1] + 2 * LEGEND_MARGIN + lines * LEGEND_LINE)
    image, canvas = blank_picture(size)
    draw_panels(canvas, overlaid_panels(runs), legends=False)
    for index, run in enumerate(runs):
        _draw_name(canvas, index, run)
    save_picture(image, size, out_png)


def overlaid_panels(runs: Sequence[Curves]) -> list[Panel]:
    """The panels, each with a series for every log that has what it shows."""
    panels = [
        Panel("Training loss per learnt token", "", None, []),
        Panel("Validation loss per answer token", "", None, []),
        Panel("Right answers with the right picture", "%", (0.0, 100.0), []),
        Panel("Right answers: right picture minus swapped", "", (0.0, None), []),
    ]
    for index, run in enumerate(runs):
        for log in run.logs:
            train = [record for record in log if record.get("kind") == "train"]
            evaluations = [record for record in log if record.get("kind") == "evaluation"]
            curves = (
                points(train, "loss"),
                points(evaluations, "validation_loss"),
                points(evaluations, "alignment", "right"),
                _gaps(evaluations),
            )
            for panel, curve in zip(panels, curves, strict=True):
                if curve:
                    panel.series.append(Series(run.label, colour_of(index), curve))
    return panels


def colour_of(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _gaps(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(step, points between the right picture and a swapped one)."""
    swapped = dict(points(evaluations, "alignment", "swapped"))
    return [
        (step, right - swapped[step])
        for step, right in points(evaluations, "alignment", "right")
        if step in swapped
    ]


def _draw_name(canvas: ImageDraw.ImageDraw, index: int, run: Curves) -> None:
    """One name of the legend below the panels, cut to the room that it has."""
    row, column = divmod(index, LEGEND_COLUMNS)
    width = (SIZE[0] - 2 * 24) // LEGEND_COLUMNS
    x = (24 + column * width) * SCALE
    y = (SIZE[1] + LEGEND_MARGIN + row * LEGEND_LINE) * SCALE
    canvas.line((x, y, x + 18 * SCALE, y), colour_of(index), 3 * SCALE)
    text, font = printable(run.label, 200), font_of(13)
    room = (width - 36) * SCALE
    if canvas.textlength(text, font) > room:
        while text and canvas.textlength(text + "...", font) > room:
            text = text[:-1]
        text += "..."
    canvas.text((x + 24 * SCALE, y), text, INK if any(run.logs) else FAINT, font, anchor="lm")
