"""Where a run stands, by its files: on the terminal, in the app and in /metrics."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
import train
from api.run_measures import RunMeasures
from errors import PhiSightError
from reports.alerts import alert_text, alerts_of
from reports.log import LINE_LIMIT, MetricsLog, read_metrics
from reports.status import Status, span, status_lines, status_of
from reports.watching import LOCK, StatusReader, holder_of, run_status
from training.alerts import RATE_AFTER, ClockAlerts
from training.lock import RunLock
from training.progress import Progress


def record(step: int, **more: object) -> dict:
    timing = {"seconds": 4.0, "tokens_per_second": 100.0 * step}
    facts = {"kind": "train", "step": step, "total_steps": 100, "loss": 4.0 / step}
    return facts | {"timing": timing} | more


def run_with(folder: Path, *records: dict) -> Path:
    """A run that has logged these and saved nothing."""
    log = MetricsLog(folder / "metrics.jsonl")
    for each in records:
        log.write(each)
    log.close()
    return folder


def told(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert train.main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


# -- states ---------------------------------------------------------------------------------------


def test_a_finished_run(capsys):
    run = runs.finished_run()
    newest = checkpoints.resolve(run)
    out = told(capsys, "--status", run)
    assert out.startswith(f"{run}: finished, step {newest.step} of {newest.step}: all steps done\n")
    status = json.loads(told(capsys, "--status", "--run", run, "--json"))
    assert (status["state"], status["step"], status["holder"]) == ("finished", newest.step, "")
    assert status["save"]["bytes"] == sum(
        path.stat().st_size for path in newest.path.rglob("*") if path.is_file()
    )
    last = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "evaluation"][-1]
    assert status["evaluation"]["validation_loss"] == last["validation_loss"]
    assert status["eta_seconds"] is None and status["seconds_left"] == 0
    [one] = [line for line in out.splitlines() if line.startswith("last save")]
    assert f"step {newest.step}" in one and "ago" in one


def test_running_stopped_and_ended_without_a_save(tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    assert run_status(run).state == "stopped"
    with RunLock(run):
        status = run_status(run)
        assert (status.state, status.step, status.total_steps) == ("running", 1, 2)
        assert f"process {os.getpid()} on" in status.holder
        assert status_lines(status)[0].startswith(f"{run}: running (process {os.getpid()} on")
    assert run_status(run).state == "stopped"
    log = MetricsLog(run / "metrics.jsonl")
    log.write(record(2))
    log.close()
    status = run_status(run)
    assert (status.state, status.step) == ("crashed", 2)
    assert "ended without a save" in status_lines(status)[0]
    assert run_status(run_with(tmp_path / "unsaved", record(1))).state == "crashed"


def test_a_run_that_trains_is_looked_at_from_outside_and_goes_on(tmp_path):
    run = tmp_path / "run"
    fields = runs.SHORT | {"max_steps": 12, "log_steps": 1}
    process = runs.started("train.py", *runs.flags(run, **fields))
    runs.wait_until(lambda: (run / "metrics.jsonl").exists() and run_status(run).step > 1, process)
    seen = runs.command("train.py", "--status", run, "--json")
    assert seen.returncode == 0, seen.stderr
    status = json.loads(seen.stdout)
    if process.poll() is None:
        assert f"process {process.pid} on" in status["holder"]
        assert status["state"] == "running" and status["eta_seconds"] >= 0
    assert process.wait(60) == 0, process.communicate()
    process.communicate()
    assert run_status(run).state == "finished"


def test_looking_does_not_keep_a_trainer_from_starting(tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    with open(run / LOCK, "rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        started = time.monotonic()
        with pytest.raises(PhiSightError, match="is training there"), RunLock(run):
            pass
        assert time.monotonic() - started > 0.01  # it has asked again
    before = runs.contents(run)
    assert holder_of(run) == "" and runs.contents(run) == before
    with RunLock(run):
        assert holder_of(run)


@pytest.mark.parametrize(
    "written",
    [
        b"",
        b"[1]",
        b"\xff",
        b"[" * 1000,
        b'{"process":1e400,"machine":"here"}',
        b'{"process":NaN,"machine":"here"}',
        b'{"process":' + b"9" * 900 + b',"machine":"here"}',
        b'{"process":"7","machine":"here"}',
        b'{"process":7,"machine":null}',
    ],
)
def test_a_lock_that_names_no_process_is_held_by_another_one(written, tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    (run / LOCK).write_bytes(written)
    with open(run / LOCK, "rb") as holding:
        fcntl.flock(holding, fcntl.LOCK_EX)
        assert holder_of(run) == "another process"
        with pytest.raises(PhiSightError, match="another process is training there"), RunLock(run):
            pass


def test_no_torch_is_loaded_for_it():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', '--status', sys.argv[1]]\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs.finished_run())],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 False"


# -- figures --------------------------------------------------------------------------------------


def test_what_is_left_follows_from_the_latest_steps_and_evaluations(tmp_path):
    evaluation = {"kind": "evaluation", "step": 20, "validation_loss": 1.0, "alignment": None}
    records = [record(step, timing={"seconds": 5.0, "tokens_per_second": 7}) for step in (10, 20)]
    run = run_with(tmp_path, *records, evaluation | {"timing": {"seconds": 3.0}})
    status = status_of(run, "process 1 on here")
    assert status.seconds_left == 80 * 0.5 + 4 * 3.0
    assert status.logged_at is not None
    assert status.eta(status.logged_at + 12) == 40.0
    assert status.as_json(status.logged_at + 1e6)["eta_seconds"] == 0
    assert (status.loss, status.loss_before) == (0.2, 0.4)
    assert "; 52 s left" in status_lines(status, status.logged_at)[0]


def test_steps_that_were_undone_do_not_count(tmp_path):
    back = {"kind": "rollback", "step": 9, "from_step": 9, "to_step": 4, "reason": "gradient_spike"}
    back |= {"skipped": {"rows": 5}}
    status = status_of(run_with(tmp_path, record(4), record(8, loss=99.0), back), "")
    assert (status.step, status.loss) == (4, 1.0)
    [alert] = status.alerts
    assert alert["text"].startswith("went back from step 9 to 4 and goes on behind the 5 rows")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3700, "1 h 1 min"), (200_000, "2 d 7 h"), (-5, "0 s")],
)
def test_times_for_people(seconds, text):
    assert span(seconds) == text


# -- whatever the files hold ----------------------------------------------------------------------


def test_half_a_line_a_missing_log_and_a_missing_run(tmp_path, capsys):
    run = run_with(tmp_path / "run", record(1))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind":"train","st')
    assert run_status(run).step == 1
    for folder, what in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no run")):
        done = runs.command("train.py", "--status", folder)
        assert what in runs.assert_one_line_error(done)
    with RunLock(tmp_path / "new"):
        assert "step 0" in status_lines(run_status(tmp_path / "new"))[0]
    with pytest.raises(PhiSightError, match="--json: goes with --status"):
        train.main(["--json"])


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def line(data: bytes):
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("metrics.jsonl", pipe),
        ("metrics.jsonl", folder),
        ("metrics.jsonl", link),
        ("metrics.jsonl", line(b"not json\n")),
        ("metrics.jsonl", line(b"x" * (LINE_LIMIT + 1))),
        ("metrics.jsonl", line(b'{"kind":"samples","step":1,"samples":[{"answer":3}]}\n')),
        (LOCK, pipe),
        (LOCK, folder),
        (LOCK, link),
        ("checkpoint-000001/trainer_state.json", pipe),
        ("checkpoint-000001/trainer_state.json", link),
        ("checkpoint-000001/trainer_state.json", line(b"[]")),
        ("checkpoint-000001/trainer_state.json", line(b'{"step":"x","finished":1}')),
    ],
)
def test_a_hostile_folder_is_one_line_and_none_waits(name, make, tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    path = run / name
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(PhiSightError) as caught:
        run_status(run)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(
        st.sampled_from(["alert", "seconds", "rows", "alerts", "right"]),
        st.one_of(st.integers(), st.floats()),
    ),
)
NAMES = (
    "kind",
    "step",
    "loss",
    "validation_loss",
    "timing",
    "alert",
    "to_step",
    "total_steps",
    "alignment",
    "samples",
)
KINDS = st.sampled_from(["train", "evaluation", "samples", "alert", "rollback"])


def test_a_loss_that_is_not_finite_is_null_and_samples_of_no_step_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind":"evaluation","step":1,"validation_loss":NaN,"alignment":{"right":1e400}}\n'
        '{"kind":"samples","samples":[{"answer":"x"}]}\n'
    )
    status = status_of(tmp_path, "")
    figures = {"step": 1, "validation_loss": None, "alignment": {"right": None}}
    assert json.loads(json.dumps(status.as_json(), allow_nan=False))["evaluation"] == figures
    assert "evaluation  step 1: validation loss not finite" in status_lines(status)
    assert status.samples is None


@given(st.lists(st.tuples(KINDS, st.dictionaries(st.sampled_from(NAMES), VALUES)), max_size=6))
def test_any_record_is_shown_or_refused_in_a_line(tmp_path_factory, drawn):
    run = tmp_path_factory.mktemp("any")
    lines = [json.dumps({"kind": kind} | fields) + "\n" for kind, fields in drawn]
    (run / "metrics.jsonl").write_text("".join(lines))
    try:
        status = status_of(run, "")
    except PhiSightError as error:
        assert "\n" not in str(error)
        return
    assert all(line.isprintable() for line in status_lines(status))
    json.dumps(status.as_json(), allow_nan=False)


@given(st.dictionaries(st.sampled_from(["kind", "alert", "owner", "skipped", "reason"]), VALUES))
def test_any_alert_is_a_sentence_on_a_line(alert):
    assert alert_text(alert).isprintable()


# -- alerts ---------------------------------------------------------------------------------------


def test_a_loader_that_starves_the_device_is_told_of_once():
    clock = ClockAlerts()
    window = {"seconds": 2.0, "wait_seconds": 0.9, "tokens": 100}
    assert clock.of_window(window) == [{"alert": "data_starvation", "wait_share": 0.45}]
    assert clock.of_window(window) == []
    assert clock.of_window(window | {"wait_seconds": 0.1}) == []
    assert [a["alert"] for a in clock.of_window(window)] == ["data_starvation"]
    assert ClockAlerts().of_window(window | {"seconds": 0.5}) == [], "too short to judge"


def test_a_rate_that_falls_is_compared_with_the_runs_own():
    clock = ClockAlerts()
    fast, slow = ({"seconds": 2.0, "tokens": tokens} for tokens in (1000, 400))
    assert [clock.of_window(fast) for _ in range(RATE_AFTER)] == [[]] * RATE_AFTER
    assert clock.of_window(slow) == [
        {"alert": "falling_rate", "tokens_per_second": 200.0, "median": 500.0}
    ]
    assert ClockAlerts().of_window(slow) == []


def test_what_the_clock_tells_lies_under_timing_and_the_rest_in_the_chain(tmp_path):
    clock_alert = {"alert": "data_starvation", "wait_share": 0.5}
    quiet = run_with(tmp_path / "a", record(1), record(2))
    timing = {"seconds": 1.0, "alerts": [clock_alert]}
    loud = run_with(tmp_path / "b", record(1), record(2, timing=timing))
    logs = [read_metrics(run / "metrics.jsonl") for run in (quiet, loud)]
    assert logs[0][-1]["chain"] == logs[1][-1]["chain"]
    assert [(a["step"], a["alert"]) for a in alerts_of(logs[1])] == [(2, "data_starvation")]
    spike = {"kind": "alert", "step": 2, "alert": "gradient_spike", "gradient_norm": 9.0}
    told = run_with(tmp_path / "c", record(1), record(2), spike)
    assert read_metrics(told / "metrics.jsonl")[-1]["chain"] != logs[0][-1]["chain"]


def test_an_alert_begins_once_and_again_after_it_ceased():
    progress = Progress()
    held = [True, True, False, True]
    assert [progress.begins("x", holds) for holds in held] == [True, False, False, True]
    assert progress.standing_alerts == ["x"]


# -- read again, and /metrics ----------------------------------------------------------------------


def test_a_status_is_read_again_only_when_something_changed(tmp_path, monkeypatch):
    run = run_with(tmp_path / "run", record(1))
    reader, read = StatusReader(run), []

    def counted(folder: Path, *how: object) -> Status:
        read.append(folder)
        return status_of(folder, *how)

    monkeypatch.setattr("reports.watching.status_of", counted)
    assert reader.read() is reader.read() and len(read) == 1
    log = MetricsLog(run / "metrics.jsonl")
    log.write(record(2))
    assert reader.read().step == 2
    with RunLock(run):
        assert reader.read().state == "running"
    assert reader.read().state == "crashed" and len(read) == 4


def gauges(source: Path) -> dict[str, float]:
    lines = RunMeasures(str(source)).page().splitlines()
    return {
        name: float(value)
        for name, value in (each.split(" ") for each in lines if not each.startswith("#"))
    }


def test_gauges_of_the_run_that_is_served(tmp_path):
    newest = checkpoints.resolve(runs.finished_run())
    found = gauges(newest.path)
    status = run_status(runs.finished_run())
    assert status.loss is not None
    assert found["phisight_training_step"] == found["phisight_training_total_steps"] == newest.step
    assert found["phisight_training_loss"] == pytest.approx(status.loss)
    assert found["phisight_training_running"] == 0
    assert found["phisight_training_last_save_age_seconds"] >= 0
    assert found["phisight_training_alerts"] == len(status.alerts)
    assert gauges(Path("hf:someone/model@main")) == {}

    run = runs.copy_of(runs.stopped_run(), tmp_path)
    served = checkpoints.resolve(run).path
    measures = RunMeasures(str(served))
    assert "phisight_training_step 1\n" in measures.page()
    (run / "metrics.jsonl").write_bytes(b"no record\n")
    assert measures.page() == ""
    shutil.rmtree(run)
    assert measures.page() == ""
