"""What a run tells of itself: a JSON-lines log, a console line, and a picture of the curves.

The log of a resumed run equals that of one that never stopped, to the byte, except for what the
clock and the machine decide; all of that sits under the one key "timing" of a record.

Records:
    {"kind": "train", "step", "loss", "lr", "gradient_norm", "gradient_norms": {owner: norm},
     "padding_share", "supervised_tokens", "tokens",
     "timing": {"seconds", "tokens_per_second", "memory_mb", ...}}
    {"kind": "evaluation", "step", "validation_loss",
     "alignment": {"right", "swapped", "blank"}}         (percentages, 0 to 100)

Every record bears a "chain": a digest of the record before it and of its own content, in which a
training record includes the digests of its steps' losses and of the weights after the last one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from errors import PhiSightError

TIMING = "timing"
NON_FINITE = "non_finite"
CHAIN = "chain"


# ---- the log -------------------------------------------------------------------------------------


class MetricsLog:
    """A JSON-lines file that grows by whole lines. A checkpoint stores `offset()` and `chain`; a
    resume gives them to `truncate_to`. Every method raises PhiSightError when the disk refuses.

    Attributes:
        chain: the digest that the last record bears; each record is linked to the one before it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.chain = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)  # a line is one write: nothing to flush
        except OSError as error:
            raise self._refused(error) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. A NaN or infinity becomes null, and its dotted name joins the list
        under "non_finite"."""
        names: list[str] = []
        clean = _without_non_finite(record, "", names)
        if names:
            clean[NON_FINITE] = names
        clean[CHAIN] = link(self.chain, clean)
        try:
            line = json.dumps(clean, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise PhiSightError(
                f"metrics record: {error}; give it plain numbers and strings"
            ) from error
        start = self.offset()
        try:
            if self._file.write(line) != len(line):
                self._file.truncate(start)  # half a line would spoil the next one
                raise OSError("only a part of a line could be written")
        except OSError as error:
            raise self._refused(error) from error
        self.chain = clean[CHAIN]

    def offset(self) -> int:
        """Bytes in the file so far."""
        return os.fstat(self._file.fileno()).st_size

    def truncate_to(self, offset: int, chain: str = "") -> None:
        """Cut what was logged after a checkpoint, exact to the byte; `chain` goes on from there."""
        size = self.offset()
        if offset < 0 or offset > size:
            raise PhiSightError(
                f"{self.path}: has {size} bytes, the checkpoint was saved at "
                f"{offset}; put back the log that belongs to this run"
            )
        with self.path.open("rb") as file:
            file.seek(max(offset - 1, 0))
            if offset and file.read(1) != b"\n":
                raise PhiSightError(
                    f"{self.path}: byte {offset} is not the end of a line; put "
                    "back the log that belongs to this run"
                )
        try:
            self._file.truncate(offset)
        except OSError as error:
            raise self._refused(error) from error
        self.chain = chain
        self.sync()

    def sync(self) -> None:
        """Return once all lines are on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        self._file.close()

    def _refused(self, error: OSError) -> PhiSightError:
        return PhiSightError(
            f"{self.path}: {error.strerror or error}; make room or make the "
            "folder writable, then resume"
        )


def _without_non_finite(value: Any, path: str, names: list[str]) -> Any:
    """A copy with null for NaN and infinities; their dotted paths are added to `names`."""
    if isinstance(value, Mapping):
        return {
            key: _without_non_finite(inner, f"{path}.{key}".lstrip("."), names)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [
            _without_non_finite(inner, f"{path}.{index}", names)
            for index, inner in enumerate(value)
        ]
    if isinstance(value, float) and not math.isfinite(value):
        names.append(path)
        return None
    return value


def read_metrics(path: str | Path, whole_bytes: int | None = None) -> list[dict]:
    """The records of a log. A last line without its end, from a killed run, is left out; anything
    else that is not a JSON object raises PhiSightError with the number of the line.

    With `whole_bytes`, only so many bytes must be whole: what comes after them was never synced, a
    lost power supply may have left anything there, and records end at the first line that is none.
    """
    try:
        *lines, _half = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; name the metrics file of a run") from error
    records, read = [], 0
    for number, line in enumerate(lines, start=1):
        read += len(line) + 1
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if whole_bytes is not None and read > whole_bytes:
                break
            raise PhiSightError(
                f"{path}: line {number} is not JSON ({error}); mend it or remove it"
            ) from error
        if not isinstance(record, dict):
            raise PhiSightError(f"{path}: line {number} is not a record; mend it or remove it")
        records.append(record)
    return records


def deterministic_part(record: Mapping[str, Any]) -> dict:
    """The record without what the clock and the machine decide: equal in a resumed run."""
    kept = {key: value for key, value in record.items() if key not in (TIMING, NON_FINITE)}
    names = [name for name in record.get(NON_FINITE, ()) if not name.startswith(f"{TIMING}.")]
    return kept | ({NON_FINITE: names} if names else {})


# ---- the chain -----------------------------------------------------------------------------------


def link(previous: str, record: Mapping[str, Any]) -> str:
    """sha256 over the digest before and all of a record that the computation decides. Two runs
    whose digests are equal at a step have logged the same, to the bit, up to that step."""
    kept = {key: value for key, value in deterministic_part(record).items() if key != CHAIN}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def broken_link(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The index of the first record that does not follow from those before it, or None."""
    previous = ""
    for index, record in enumerate(records):
        if record.get(CHAIN) != link(previous, record):
            return index
        previous = record[CHAIN]
    return None


@dataclass(frozen=True)
class Parting:
    """Where two logs part: the last step at which they agree, the first at which they differ, and
    the names of the fields that differ there. None: a log ends."""

    agree_to: int | None
    part_by: int | None
    fields: list[str]
    loss_gap: float
    """the largest difference of two training losses of the same step, in nats"""

    def __str__(self) -> str:
        since = "" if self.agree_to is None else f"agree to step {self.agree_to}, "
        if self.part_by is None:
            return f"the logs {since or 'do not both begin, '}then one of them ends"
        return (
            f"the logs {since}part by step {self.part_by} ({', '.join(self.fields)}); losses of"
            f" the same step differ by at most {self.loss_gap:.2g}"
        )


def parting(first: Sequence[Mapping], second: Sequence[Mapping]) -> Parting | None:
    """Where two runs' records part, or None where they are equal to the end of the shorter log and
    of one length."""
    losses = [
        {r.get("step"): r.get("loss") for r in records if r.get("kind") == "train"}
        for records in (first, second)
    ]
    gaps = [
        abs(losses[0][step] - losses[1][step])
        for step in losses[0].keys() & losses[1].keys()
        if isinstance(losses[0][step], float) and isinstance(losses[1][step], float)
    ]
    agree_to, loss_gap = None, max(gaps, default=0.0)
    for one, other in zip(first, second):
        if one.get(CHAIN) != other.get(CHAIN):
            a, b = deterministic_part(one), deterministic_part(other)
            fields = [
                key for key in dict.fromkeys([*a, *b]) if key != CHAIN and a.get(key) != b.get(key)
            ]
            return Parting(agree_to, one.get("step"), fields, loss_gap)
        agree_to = one.get("step")
    return None if len(first) == len(second) else Parting(agree_to, None, [], loss_gap)


def peak_memory_mb() -> dict[str, float]:
    """The most memory this process has held, in MiB, to go into a record's timing:
    {"memory_mb": resident} and, once CUDA is in use, "cuda_memory_mb" over all devices."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = {"memory_mb": round(resident / 2**20, 1)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        held = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
        peak["cuda_memory_mb"] = round(held / 2**20, 1)
    return peak


def _number(value: Any, pattern: str) -> str:
    """A value for people; null in a record stands for NaN or an infinity."""
    return format(value, pattern) if isinstance(value, (int, float)) else "not finite"


def console_line(record: Mapping[str, Any]) -> str:
    """One line for people; fields that the record lacks are left out."""
    parts = [f"step {record.get('step', '?'):>6}"]

    def add(source: Mapping[str, Any], key: str, label: str, pattern: str, unit: str = "") -> None:
        if key in source:
            parts.append(f"{label} {_number(source[key], pattern)}{unit}".lstrip())

    if record.get("kind") == "evaluation":
        add(record, "validation_loss", "validation loss", ".4f")
        alignment = record.get("alignment") or {}
        for key, label in (("right", "right picture"), ("swapped", "swapped"), ("blank", "blank")):
            add(alignment, key, label, ".1f", "%")
        return "  ".join(parts)
    add(record, "loss", "loss", ".4f")
    add(record, "lr", "lr", ".3g")
    add(record, "gradient_norm", "gradient", ".3g")
    if norms := record.get("gradient_norms"):
        text = ", ".join(f"{owner} {_number(norm, '.3g')}" for owner, norm in norms.items())
        parts.append(("" if "gradient_norm" in record else "gradient ") + f"({text})")
    add(record, "supervised_tokens", "answer tokens", ",")
    add(record, "padding_share", "padding", ".1%")
    timing = record.get(TIMING) or {}
    add(timing, "seconds", "", ".2f", " s")
    add(timing, "tokens_per_second", "", ",.0f", " tokens/s")
    add(timing, "memory_mb", "", ",.0f", " MB")
    add(timing, "cuda_memory_mb", "GPU", ",.0f", " MB")
    return "  ".join(parts)


# ---- the curves ----------------------------------------------------------------------------------

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


def draw_curves(metrics: str | Path | Iterable[Mapping[str, Any]], out_png: str | Path) -> None:
    """Draw a log (a path or its records) as a PNG of 1200 x 800: loss, learning rate, gradient norm
    by owner, and alignment. A curve without points is left out; an empty panel says so."""
    records = read_metrics(metrics) if isinstance(metrics, (str, Path)) else list(metrics)
    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    owners = list(
        dict.fromkeys(owner for record in train for owner in record.get("gradient_norms") or {})
    )
    colours = (_BLUE, _ORANGE, _GREEN, _PINK, _SKY)
    norms = [
        _Series(owner, colours[index % len(colours)], points(train, "gradient_norms", owner))
        for index, owner in enumerate(owners)
    ]
    panels = (
        (
            "Loss per answer token",
            "",
            None,
            [
                _Series("training", _BLUE, points(train, "loss")),
                _Series("validation", _ORANGE, points(evaluations, "validation_loss"), dots=True),
            ],
        ),
        ("Learning rate", "", (0.0, None), [_Series("learning rate", _BLUE, points(train, "lr"))]),
        (
            "Gradient norm by owner",
            "",
            (0.0, None),
            norms or [_Series("all", _BLUE, points(train, "gradient_norm"))],
        ),
        (
            "Alignment: right answers by picture shown",
            "%",
            (0.0, 100.0),
            [
                _Series(
                    f"{name} picture", colour, points(evaluations, "alignment", name), dots=True
                )
                for name, colour in (("right", _BLUE), ("swapped", _ORANGE), ("blank", _GREEN))
            ],
        ),
    )
    image = Image.new("RGB", (SIZE[0] * _SCALE, SIZE[1] * _SCALE), "white")
    canvas = ImageDraw.Draw(image)
    steps = [step for *_, series in panels for one in series for step, _ in one.points]
    span = (min(steps), max(steps)) if steps else (0.0, 1.0)  # one axis of steps for all panels
    if span[0] == span[1]:
        span = (span[0] - 1, span[1] + 1)
    for index, (title, unit, limits, series) in enumerate(panels):
        column, row = index % 2, index // 2
        corner = (SIZE[0] // 2 * column * _SCALE, SIZE[1] // 2 * row * _SCALE)
        _draw_panel(
            canvas, corner, title, unit, span, limits, [one for one in series if one.points]
        )
    out_png = Path(out_png)
    temporary = out_png.with_name(f".{out_png.name}.tmp")  # a viewer never sees half a picture
    try:
        out_png.parent.mkdir(parents=True, exist_ok=True)
        image.resize(SIZE, Image.Resampling.LANCZOS).save(temporary, format="PNG")
        os.replace(temporary, out_png)
    except OSError as error:
        raise PhiSightError(f"{out_png}: {error}; name a file in a writable folder") from error


def points(records: Sequence[Mapping[str, Any]], *keys: str) -> list[tuple[float, float]]:
    """(step, value) of every record that has a finite number under the nested keys."""
    points = []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if all(
            isinstance(number, (int, float)) and math.isfinite(number)
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
    title: str,
    unit: str,
    span: tuple[float, float],
    limits: tuple[float, float | None] | None,
    series: list[_Series],
) -> None:
    """One panel of half the width and height of the picture, its top left at `corner`."""

    def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return ImageFont.load_default(size * _SCALE)

    left, top = corner[0] + 78 * _SCALE, corner[1] + 72 * _SCALE
    right, bottom = corner[0] + 576 * _SCALE, corner[1] + 342 * _SCALE
    canvas.text((left, corner[1] + 16 * _SCALE), title, _INK, font(18))
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
        canvas.text((left - 8 * _SCALE, y_of(tick)), label + unit, _FAINT, font(13), anchor="rm")
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
