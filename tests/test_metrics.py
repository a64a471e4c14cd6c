"""The metrics log: whole lines, cut exact to the byte on resume; and a picture of any records."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from errors import PhiSightError
from reports import compare, curves, show
from reports import log as logs
from training import memory


def train(step: int, seconds: float = 1.2, **more) -> dict:
    return {
        "kind": "train",
        "step": step,
        "loss": 3.0 / step,
        "lr": 2e-4,
        "gradient_norm": 1.5,
        "gradient_norms": {"lora": 1.2, "projector": 0.9},
        "padding_share": 0.031,
        "supervised_tokens": 1234,
        "tokens": 4096,
        "timing": {"seconds": seconds, "tokens_per_second": 4096 / seconds},
    } | more


def evaluation(step: int) -> dict:
    return {
        "kind": "evaluation",
        "step": step,
        "validation_loss": 2.5,
        "alignment": {"right": 81.25, "swapped": 30.0, "blank": 25.0},
    }


# ---- the log -------------------------------------------------------------------------------------


def test_lines_are_compact_and_in_order(tmp_path: Path) -> None:
    log = logs.MetricsLog(tmp_path / "run" / "metrics.jsonl")
    assert log.offset() == 0
    log.write({"kind": "train", "step": 1, "a": [1.5, None], "é": True})
    start = b'{"kind":"train","step":1,"a":[1.5,null],"\\u00e9":true,"chain":"'
    assert log.path.read_bytes() == start + log.chain.encode() + b'"}\n' and len(log.chain) == 64
    assert log.offset() == log.path.stat().st_size  # without a flush
    log.sync()
    log.close()
    again = logs.MetricsLog(log.path)
    again.write(evaluation(2))
    assert logs.read_metrics(log.path)[1] == evaluation(2) | {"chain": again.chain}


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    log = logs.MetricsLog(tmp_path / "m")
    record = {
        "loss": math.nan,
        "norms": {"lora": math.inf, "other": 1.0},
        "list": [-math.inf, 2.0],
        "timing": {"seconds": math.nan},
    }
    log.write(record)
    (read,) = logs.read_metrics(log.path)
    assert read == {
        "loss": None,
        "norms": {"lora": None, "other": 1.0},
        "list": [None, 2.0],
        "timing": {"seconds": None},
        "non_finite": ["loss", "norms.lora", "list.0", "timing.seconds"],
        "chain": log.chain,
    }
    assert math.isnan(record["loss"])  # the caller's record is as it was
    assert logs.deterministic_part(read)["non_finite"] == ["loss", "norms.lora", "list.0"]
    with pytest.raises(PhiSightError, match="plain numbers"):
        log.write({"loss": object()})
    assert len(logs.read_metrics(log.path)) == 1


def test_a_resumed_log_equals_one_that_never_stopped(tmp_path: Path) -> None:
    whole, stopped = logs.MetricsLog(tmp_path / "a"), logs.MetricsLog(tmp_path / "b")
    for step in range(1, 9):
        whole.write(train(step, seconds=1.0 + step / 7))
    for step in range(1, 6):
        stopped.write(train(step, seconds=2.0))
        if step == 3:
            stopped.sync()
            offset, chain, good = stopped.offset(), stopped.chain, stopped.path.read_bytes()
    with stopped.path.open("ab") as file:
        file.write(b'{"kind":"train","st')  # killed in the middle of a line
    assert len(logs.read_metrics(stopped.path)) == 5
    resumed = logs.MetricsLog(stopped.path)
    resumed.truncate_to(offset, chain)
    assert resumed.path.read_bytes() == good and resumed.offset() == offset
    for step in range(4, 9):
        resumed.write(train(step, seconds=3.0))
    first, second = (logs.read_metrics(log.path) for log in (whole, resumed))
    assert first != second
    assert [*map(logs.deterministic_part, first)] == [*map(logs.deterministic_part, second)]
    assert logs.broken_link(first) is None and compare.parting(first, second) is None
    assert logs.deterministic_part(first[0]).keys() == train(1).keys() - {"timing"} | {"chain"}
    resumed.truncate_to(0)
    assert resumed.path.read_bytes() == b""


def test_a_log_that_does_not_fit_the_checkpoint(tmp_path: Path) -> None:
    log = logs.MetricsLog(tmp_path / "m")
    log.write({"step": 1})
    size = log.offset()
    for offset, words in (
        (size + 1, f"has {size} bytes"),
        (-1, f"has {size} bytes"),
        (5, "not the end of a line"),
    ):
        with pytest.raises(PhiSightError, match=words):
            log.truncate_to(offset)
    assert log.offset() == size


@pytest.mark.parametrize(
    "data, words",
    [
        (b'{"step":1}\n{"st\n{"step":3}\n', "line 2 is not JSON"),
        (b"[1]\n", "line 1 is not a record"),
        (b"\xff\n", "line 1"),
        (b"\n", "line 1"),
        (b"[" * 100_000 + b"\n", "line 1"),
    ],
)
def test_a_damaged_log_is_named_by_line(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(PhiSightError, match=words):
        logs.read_metrics(tmp_path / "m")
    with pytest.raises(PhiSightError, match="No such file"):
        logs.read_metrics(tmp_path / "none")


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PhiSightError, match="folder writable"):
        logs.MetricsLog(tmp_path / "file" / "m")

    class Full:
        """Takes half of a line, as a full disk does."""

        cut = None

        def fileno(self) -> int:
            return log._file.fileno()

        def write(self, data: bytes) -> int:
            return log._file.write(data[: len(data) // 2])

        def truncate(self, size: int) -> None:
            log._file.truncate(size)

    log, broken = logs.MetricsLog(tmp_path / "m"), logs.MetricsLog(tmp_path / "m")
    log.write({"step": 1})
    broken._file = Full()
    with pytest.raises(PhiSightError, match="only a part of a line"):
        broken.write({"step": 2})
    log.write({"step": 3})
    assert [record["step"] for record in logs.read_metrics(tmp_path / "m")] == [1, 3]


# ---- for people ----------------------------------------------------------------------------------


def test_console_lines() -> None:
    assert show.console_line(train(12, 0.5) | {"loss": None}) == (
        "step     12  loss not finite  lr 0.0002  gradient 1.5  (lora 1.2, projector 0.9)  "
        "answer tokens 1,234  padding 3.1%  0.50 s  8,192 tokens/s"
    )
    assert show.console_line(evaluation(50)) == (
        "step     50  validation loss 2.5000  right picture 81.2%  swapped 30.0%  blank 25.0%"
    )
    assert show.console_line({}) == "step      ?"
    only_owners = show.console_line({"step": 1, "gradient_norms": {"lora": 2.0}})
    assert only_owners == "step      1  gradient (lora 2)"


def test_peak_memory() -> None:
    assert 10 < memory.peak_memory_mb()["memory_mb"] < 1e6


# ---- the curves ----------------------------------------------------------------------------------


def pixels_of(path: Path, colour: str) -> list[int]:
    """How many pixels near a colour each panel has: top left, top right, bottom left, bottom
    right, under the legends."""
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    with Image.open(path) as image:
        assert image.size == curves.SIZE and image.mode == "RGB" and image.format == "PNG"
        pixels = numpy.asarray(image).astype(int)  # (800, 1200, 3)
    near = numpy.abs(pixels - wanted).max(axis=2) < 40
    return [
        int(near[top : top + 300, left : left + 600].sum())
        for top in (66, 466)
        for left in (0, 600)
    ]


def test_curves(tmp_path: Path) -> None:
    log = logs.MetricsLog(tmp_path / "m.jsonl")
    for step in range(1, 101):
        log.write(train(step))
        if step % 25 == 0:
            log.write(evaluation(step))
    out = tmp_path / "new" / "curves.png"
    curves.draw_curves(log.path, out)
    blue, orange, green = (
        pixels_of(out, colour) for colour in (curves._BLUE, curves._ORANGE, curves._GREEN)
    )
    assert min(blue) > 100 and orange[1] == 0 and min(orange[0], *orange[2:]) > 100
    assert green[:3] == [0, 0, 0] and green[3] > 100
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]
    with pytest.raises(PhiSightError, match="name a file in a writable folder"):
        curves.draw_curves([], log.path / "curves.png")


@pytest.mark.parametrize(
    "records",
    [
        [],
        [train(1)],
        [evaluation(7)],
        [train(1), train(2)],
        [train(5), train(5)],
        [{}],
        [{"kind": "train", "step": 1, "loss": None}, {"kind": "train", "loss": 2.0}],
        [train(1, loss=math.nan), train(2, loss=math.inf), train(3)],
        [train(1, gradient_norms=None)],
        [train(1, loss=0.0, lr=0.0), train(10**9, loss=-1e-9, lr=1e30)],
        [train(1, loss=1e300), train(2, loss=-1e300)],
        [train(1, loss=5e-324)],
        [train(1, loss=1.0), train(2, loss=1.0 + 1e-16), train(3, loss=1.0 + 3e-16)],
    ],
)
def test_curves_of_odd_records(tmp_path: Path, records: list[dict]) -> None:
    curves.draw_curves(records, tmp_path / "c.png")
    blue = pixels_of(tmp_path / "c.png", curves._BLUE)
    assert (sum(blue) > 0) == any(
        curves.points([record], key)
        for record in records
        for key in ("loss", "lr", "gradient_norm")
    ) or records == [evaluation(7)]


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(finite, finite)
def test_ticks_are_few_and_cover_the_values(first: float, second: float) -> None:
    low, high = sorted((first, second))
    ticks = curves.nice_ticks(low, high, 5)
    slack = (ticks[-1] - ticks[0]) * 1e-6
    assert 2 <= len(ticks) <= 8 and ticks == sorted(set(ticks))
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    labels = curves.tick_labels(ticks)
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    "low, high, labels",
    [
        (0, 100, ["0", "20", "40", "60", "80", "100"]),
        (0.6, 2.9, ["0.5", "1.0", "1.5", "2.0", "2.5", "3.0"]),
        (0, 2e-4, ["0", "0.5e-4", "1.0e-4", "1.5e-4", "2.0e-4"]),
        (3, 3, ["2.6", "2.8", "3.0", "3.2", "3.4"]),
    ],
)
def test_tick_labels(low: float, high: float, labels: list[str]) -> None:
    assert curves.tick_labels(curves.nice_ticks(low, high, 5)) == labels
