"""TensorBoard and trackio show what the log holds, whatever happened to the run, and change none of
it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import rollbacks
import runs

import train
from errors import PhiSightError
from reports.log import MetricsLog, read_metrics, without_abandoned
from training.options import parse
from training.trackers import TRACKERS, Trackers, name_of

Curves = dict[str, list[tuple[int, float]]]


def events_in(folder: Path) -> tuple[Curves, dict[str, list[tuple[int, str]]]]:
    """Scalars and texts by tag, as (step, value), by the reader that TensorBoard itself uses."""
    name = "tensorboard.backend.event_processing.plugin_event_accumulator"
    reading = pytest.importorskip(name)
    events = reading.EventAccumulator(str(folder), tensor_size_guidance={"scalars": 0, "text": 0})
    events.Reload()
    scalars: Curves = {}
    texts: dict[str, list[tuple[int, str]]] = {}
    for tag in events.Tags()["tensors"]:
        found = [(event.step, event.tensor_proto) for event in events.Tensors(tag)]
        if tag.endswith("/text_summary"):
            of_tag = [(step, proto.string_val[0].decode()) for step, proto in found]
            texts[tag.removesuffix("/text_summary")] = of_tag
        else:
            scalars[tag] = [(step, proto.float_val[0]) for step, proto in found]
    return scalars, texts


def curve(run: Path, kind: str, *path: str) -> list[tuple[int, float]]:
    """A figure of the log, without what was undone."""
    found = []
    for record in without_abandoned(read_metrics(run / "metrics.jsonl")):
        value: Any = record if record["kind"] == kind else None
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            found.append((record["step"], value))
    return found


def as_float32(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, float(numpy.float32(value))) for step, value in points]


FIGURES = [
    ("train", "loss"),
    ("train", "lr"),
    ("train", "gradient_norms", "projector"),
    ("train", "timing", "tokens_per_second"),
    ("evaluation", "validation_loss"),
    ("evaluation", "alignment", "right"),
]


def assert_shows(run: Path, folder: Path) -> None:
    """TensorBoard shows every figure of the log once, and no other step."""
    scalars, texts = events_in(folder)
    for path in FIGURES:
        logged = curve(run, *path)
        assert logged and scalars["/".join(path)] == as_float32(logged), path
    [saves, told] = [
        [
            (save["step"], save["lora"]["norm"])
            for record in without_abandoned(read_metrics(run / "metrics.jsonl"))
            for save in (record.get("timing") or {}).get("saves", ())
        ],
        scalars.get("save/lora/norm", []),
    ]
    assert told == as_float32(saves)
    assert len({step for step, _ in saves}) == len(saves)  # none of a step that was undone
    samples = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "samples"]
    assert {step for step, _ in texts["samples"]} <= {r["step"] for r in samples}
    step, text = texts["samples"][-1]
    last = samples[-1]["samples"][0]
    assert step == samples[-1]["step"] and last["question"] in text and last["answer"] in text


def test_tensorboard_shows_each_step_once_after_a_resume_and_a_rollback(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    run, stop = tmp_path / "run", rollbacks.SAVED + 1
    with rollbacks.poison(rollbacks.POISON):
        runs.start(run, "--tensorboard", f"--stop-at-step={stop}", **rollbacks.FIELDS)
        assert_shows(run, run / "tensorboard")
        runs.resume(run, "--tensorboard")
    assert_shows(run, run / "tensorboard")
    _, texts = events_in(run / "tensorboard")
    assert [step for step, _ in texts["rollbacks"]] == [rollbacks.JUMPED]
    assert "gradient" in texts["alerts"][0][1]
    assert f"tensorboard --logdir {run}" in capsys.readouterr().out
    rollbacks.assert_same_run(rollbacks.went_back(), run)  # which no tracker has followed


def test_a_run_that_was_begun_without_is_shown_from_its_first_step(tmp_path):
    pytest.importorskip("tensorboard")
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    runs.resume(run, f"--tensorboard={tmp_path / 'all'}", "--allow-changes", "--log-steps=1")
    folder = tmp_path / "all" / name_of(str(run))
    assert events_in(folder)[0]["train/loss"] == as_float32(curve(run, "train", "loss"))
    assert not (run / "tensorboard").exists()


def test_a_finished_run_is_shown(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    run = runs.copy_of(runs.finished_run(), tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*.jsonl")}
    runs.resume(run, "--tensorboard")
    assert_shows(run, run / "tensorboard")
    assert {path: path.read_bytes() for path in before} == before
    assert f"tensorboard --logdir {run}" in capsys.readouterr().out


def test_two_runs_of_one_name_are_two():
    assert name_of("/a/run") != name_of("/b/run")
    assert name_of(str(runs.ROOT / "runs/tiny")) == "runs/tiny"
    assert name_of(os.path.relpath(runs.ROOT / "runs/tiny")) == "runs/tiny"


def test_a_full_disk_stops_the_curves_and_not_the_run(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    log = MetricsLog(tmp_path / "metrics.jsonl")
    with Trackers(str(tmp_path), log, {"tensorboard": ""}) as trackers:
        tensorboard: Any = trackers._trackers["tensorboard"]
        log.write({"kind": "train", "step": 1, "loss": 1.0})
        with open("/dev/full", "wb", buffering=0) as full:
            tensorboard._records = RecordWriter(full)
            for step in (2, 3, 4):
                log.write({"kind": "train", "step": step, "loss": 1.0})
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("warning: --tensorboard: failed (")
    assert "No space left" in told[0]
    assert [record["step"] for record in read_metrics(log.path)] == [1, 2, 3, 4]
    assert events_in(tmp_path / "tensorboard")[0]["train/loss"] == [(1, 1.0)]
    assert log.followers == []


def test_what_cannot_begin_stops_the_start(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    run = tmp_path / "run"
    with pytest.raises(PhiSightError, match="--tensorboard: cannot begin .*mend it"):
        runs.start(run, f"--tensorboard={tmp_path / 'file'}", **runs.SHORT)
    assert not list(run.glob("checkpoint-*"))


def test_only_the_first_process_has_trackers(tmp_path):
    with Trackers(str(tmp_path), None, {"tensorboard": "", "trackio": "project"}):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TRACKERS)
def test_a_package_that_is_not_there_is_named_before_anything_is_loaded(
    name, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    words = f"--{name}: needs the package {name}; pip install {name}==[0-9.]+$"
    with pytest.raises(PhiSightError, match=words):
        train.main([f"--{name}=given", "--run", str(tmp_path / "run")])
    assert list(tmp_path.iterdir()) == []


def test_a_project_has_a_name():
    with pytest.raises(PhiSightError, match="--trackio: is empty; give a PROJECT"):
        parse(["--trackio="])


def test_the_pinned_version_is_the_one_that_is_named():
    pins = (runs.ROOT / "requirements-extras.txt").read_text().split()
    assert f"tensorboard=={TRACKERS['tensorboard'].version}" in pins


def test_trackio_shows_each_step_once_and_asks_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda *given: asked.append(given[1:]))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: asked.append(given))
    trackio = pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    run = tmp_path / "run"
    with rollbacks.poison(rollbacks.POISON):
        stop = rollbacks.JUMPED + 1
        runs.start(run, "--trackio=phisight", f"--stop-at-step={stop}", **rollbacks.FIELDS)
        runs.resume(run, "--trackio=phisight")
    [shown] = trackio.Api().runs("phisight")
    assert shown.name == name_of(str(run))
    logs = storage.get_logs("phisight", shown.name, run_id=shown.id)
    for path in FIGURES:
        name = "/".join(path)
        points = [(entry["step"], entry[name]) for entry in logs if name in entry]
        assert points == curve(run, *path), path
    rollbacks.assert_same_run(rollbacks.went_back(), run)
    assert asked == []
    assert "* " not in capsys.readouterr().out  # its own greetings
