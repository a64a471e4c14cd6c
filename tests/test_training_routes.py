"""The routes of the training room that look: runs, dashboards, curves, checkpoints, pictures."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import runs
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
from reports.log import MetricsLog, read_metrics
from training.lock import RunLock
from web.app import build_site, web_application
from web.errors import RequestError
from web.model import Model
from web.training import curves
from web.training import runs as web_runs
from web.training.logs import LOG_BYTES, LogReader
from web.training.recipe import QUARANTINE, quarantine_of, recipe_of
from web.training.runs import Runs
from web.training.saved import Verified
from web.trainings import launch


def record(step: int, **more: object) -> dict:
    timing = {"seconds": 4.0, "tokens_per_second": 100.0 + step, "memory_mb": 512.0}
    facts = {"kind": "train", "step": step, "total_steps": 100, "loss": 4.0 / step, "lr": 1e-3}
    return facts | {"gradient_norm": 1.0, "gradient_norms": {"lora": 0.5}, "timing": timing} | more


def evaluation(step: int, right: float = 70.0) -> dict:
    meter = {"right": right, "swapped": 10.0, "blank": 20.0}
    return {"kind": "evaluation", "step": step, "validation_loss": 0.5, "alignment": meter}


def sampled(step: int, answer: str = "red", picture: str = "a.png") -> dict:
    sample = {"question": "Which colour?", "picture": picture, "answer": answer}
    return {"kind": "samples", "step": step, "samples": [sample | {"right_answer": "red"}]}


def add(folder: Path, *records: dict) -> Path:
    log = MetricsLog(folder / "metrics.jsonl")
    for each in records:
        log.write(each)
    log.close()
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def client_of(root: Path | None, model: Model | None = None, **more: object) -> TestClient:
    folder = root.parent / "conversations" if root else Path(runs.shared()) / "public"
    site = build_site(model or Model(), conversations=folder, runs=root, **more)
    return TestClient(web_application(site), base_url="http://testserver/app/")


@pytest.fixture
def client(root) -> TestClient:
    return client_of(root)


def told(client: TestClient, path: str) -> dict:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- the list -------------------------------------------------------------------------------------


def test_a_run_begun_after_the_server_comes_first_and_is_marked(client, root):
    assert told(client, "runs") == {"runs": [], "left_out": 0}
    add(root / "old", record(10))
    add(root / "new", record(10))
    os.utime(root / "old" / "metrics.jsonl", (1, 1))
    os.utime(root / "old", (1, 1))
    assert [run["name"] for run in told(client, "runs")["runs"]] == ["new", "old"]
    with RunLock(root / "old"):
        os.utime(root / "old" / ".lock", (1, 1))
        first, second = told(client, "runs")["runs"]
        assert (first["name"], first["running"], first["state"]) == ("old", True, "training")
        assert (second["name"], second["running"], second["state"]) == ("new", False, "crashed")
    begun = RunLock(root / "begun")
    with begun:
        first = told(client, "runs")["runs"][0]
        assert (first["name"], first["state"], first["step"]) == ("begun", "preparing", 0)
    assert "begun" not in [run["name"] for run in told(client, "runs")["runs"]]


def test_the_list_tells_how_far_each_run_is(client, root):
    add(root / "mine", record(10), evaluation(10), record(20))
    shutil.copytree(runs.finished_run(), root / "done")
    found = {run["name"]: run for run in told(client, "runs")["runs"]}
    assert (found["mine"]["step"], found["mine"]["total_steps"]) == (20, 100)
    assert found["mine"]["loss"] == 0.2
    assert (found["mine"]["right"], found["mine"]["swapped"]) == (70.0, 10.0)
    assert found["done"]["state"] == "finished"


def test_many_runs_are_listed_up_to_a_bound_and_read_once(client, root, monkeypatch):
    monkeypatch.setattr("web.training.runs.MOST_RUNS", 5)
    for index in range(8):
        add(root / f"run{index}", record(10))
        os.utime(root / f"run{index}", (index, index))
        os.utime(root / f"run{index}" / "metrics.jsonl", (index, index))
    read = []
    real = web_runs.read_small_log
    monkeypatch.setattr("web.training.runs.read_small_log", lambda p: read.append(p) or real(p))
    for _ in range(3):
        answer = told(client, "runs")
    assert [run["name"] for run in answer["runs"]] == [f"run{index}" for index in (7, 6, 5, 4, 3)]
    assert answer["left_out"] == 3 and len(read) == 5


# -- names ----------------------------------------------------------------------------------------


NAMES = ["..", ".", ".hidden", "a/b", "../secret", "a\0b", "", "x" * 300, "ä" * 200]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_folder_of_runs(client, root, name):
    add(root.parent / "secret", record(1))
    add(root / ".hidden", record(1))
    with pytest.raises(RequestError, match="run_not_there"):
        Runs(root).folder_of(name)
    assert client.get(f"runs/{quote(name, safe='')}").status_code in (200, 404)
    assert "secret" not in client.get(f"runs/{quote(name, safe='')}/curves").text


def test_a_link_is_no_run_and_no_log(client, root):
    outside = add(root.parent / "secret", record(1, loss=0.125))
    (root / "link").symlink_to(outside)
    assert client.get("runs/link").json()["error"]["key"] == "run_not_there"
    (root / "mine").mkdir()
    (root / "mine" / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    page = told(client, "runs/mine")
    assert page["state"] == "damaged" and "link" in page["error"]
    assert "0.125" not in client.get("runs/mine/curves").text
    assert [run["name"] for run in told(client, "runs")["runs"]] == ["mine"]


@given(st.text())
def test_any_name_is_a_run_or_not_there(name):
    try:
        folder = Runs(runs.finished_run().parent).folder_of(name)
    except RequestError as error:
        assert error.key == "run_not_there"
    else:
        assert folder.parent == runs.finished_run().parent


def test_a_public_page_has_no_such_routes():
    client = client_of(None)
    for path in ("runs", "runs/tiny", "runs/tiny/curves"):
        assert client.get(path).status_code == 404
    assert client.post("model", json={"run": "a", "checkpoint": "b"}).status_code in (404, 405)


# -- a dashboard ----------------------------------------------------------------------------------


def test_a_dashboard_of_a_finished_run(client, root):
    shutil.copytree(runs.finished_run(), root / "done")
    page = told(client, "runs/done")
    newest = checkpoints.resolve(root / "done")
    last = [r for r in read_metrics(root / "done/metrics.jsonl") if r["kind"] == "evaluation"][-1]
    assert (page["state"], page["running"], page["error"]) == ("finished", False, "")
    assert page["status"]["step"] == newest.step and page["status"]["eta_seconds"] is None
    assert page["alignment"] == last["alignment"] | {"step": last["step"]}
    assert page["memory"]["memory_mb"] > 0
    assert page["data"]["counts"] == newest.config["data_counts"]
    assert page["data"]["quarantine"] == {"count": 0, "whole": True, "reasons": []}
    [first, *_] = page["checkpoints"]
    assert (first["name"], first["step"]) == (newest.path.name, newest.step)
    assert first["validation_loss"] == {
        "step": float(last["step"]),
        "value": last["validation_loss"],
    }
    fields = {field["name"]: field for field in page["recipe"]["fields"]}
    assert fields["accumulation"]["value"] == "2" and fields["accumulation"]["differs"]
    assert fields["seed"]["differs"] is False and fields["seed"]["help"]
    assert page["recipe"]["preset"] == "phi35"  # the tests name the base by its whole path


def test_what_a_run_is_doing(client, root):
    run = add(root / "mine", record(10), evaluation(10), record(20))
    long_ago = time.time() - 60
    with RunLock(run):
        os.utime(run / ".lock", (long_ago, long_ago))
        assert told(client, "runs/mine")["state"] == "evaluating"
        add(run, sampled(20), evaluation(20), record(25))
        assert told(client, "runs/mine")["state"] == "training"
        (run / ".tmp-checkpoint-000025-77").mkdir()
        assert told(client, "runs/mine")["state"] == "saving"
        (run / ".tmp-checkpoint-000025-77").rmdir()
        os.utime(run / "metrics.jsonl", (long_ago - 9, long_ago - 9))
        assert told(client, "runs/mine")["state"] == "preparing"
    assert told(client, "runs/mine")["state"] == "crashed"


def test_a_training_that_failed_tells_its_last_line_until_the_run_is_trained_again(client, root):
    noted = root / "mine" / launch.STARTED
    noted.mkdir(parents=True)
    note = {"command": "train.py", "began": 1.0, "process": 4_000_000, "born": "never"}
    (noted / launch.RECORD).write_text(json.dumps(note))
    (noted / launch.CODE).write_text("2")
    (noted / launch.ERRORS).write_text("loading\nerror: --data: <b>no</b> such file; name one\n")
    page = told(client, "runs/mine")
    assert (page["state"], page["error"]) == ("failed", "--data: <b>no</b> such file; name one")
    assert told(client, "runs")["runs"][0]["state"] == "failed"
    add(root / "mine", record(1))
    (root / "mine" / ".lock").touch()
    assert told(client, "runs/mine")["state"] == "crashed"


def test_a_damaged_log_is_told_and_shown_up_to_the_fault(client, root):
    run = add(root / "mine", record(10), evaluation(10))
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole + b"<script>alert(1)</script>\n")
    page = told(client, "runs/mine")
    assert page["state"] == "damaged" and "line 3 is not JSON" in page["error"]
    assert page["alignment"]["right"] == 70.0 and page["status"]["step"] == 10
    assert told(client, "runs/mine/curves")["series"]["loss"] == [[10.0, 0.4]]
    assert told(client, "runs")["runs"][0]["state"] == "damaged"
    (run / "metrics.jsonl").write_bytes(whole)
    assert told(client, "runs/mine")["state"] == "crashed"
    shutil.rmtree(run)
    assert client.get("runs/mine").status_code == 404


def test_a_log_without_records_and_one_too_large(client, root):
    (root / "mine").mkdir()
    log = root / "mine" / "metrics.jsonl"
    log.touch()
    page = told(client, "runs/mine")
    assert page["alignment"] is None and page["status"]["step"] == 0
    assert told(client, "runs/mine/curves")["series"] == {}
    with log.open("wb") as file:
        file.truncate(LOG_BYTES + 1)
    assert "over" in told(client, "runs/mine")["error"]


def test_samples_of_every_evaluation_marked_right_or_wrong(client, root):
    add(root / "mine", record(5), sampled(5, "blue"), evaluation(5), sampled(10, " Red"))
    found = told(client, "runs/mine/samples")["evaluations"]
    assert [(one["step"], one["samples"][0]["right"]) for one in found] == [(5, False), (10, True)]


@pytest.mark.parametrize("several", [False, True])
def test_a_picture_of_a_sample_is_given_and_nothing_else(client, root, several):
    run = Path(shutil.copytree(runs.finished_run(), root / "done"))
    images = root.parent / "images"
    images.mkdir()
    picture = next((runs.world() / "images").glob("*.png"))
    shutil.copy(picture, images / "a.png")
    (images / "words.png").write_text("secret words")
    shutil.copy(picture, root.parent / "outside.png")
    (images / "link.png").symlink_to(root.parent / "outside.png")
    newest = checkpoints.checkpoints_in(run)[-1]
    facts = json.loads((newest / "config.json").read_text())
    mark, facts["config"]["images"] = "", str(images)  # as older versions wrote it
    if several:
        mark, facts["config"]["images"] = "#2/", [str(root.parent / "others"), str(images)]
    (newest / "config.json").write_text(json.dumps(facts))
    names = ["a.png", "words.png", "link.png", "../outside.png", "/etc/passwd", "gone.png"]
    names = [mark + name for name in names]
    for name in names:
        add(run, sampled(99, picture=name))
    answer = client.get(f"runs/done/pictures/{quote(names[0], safe='')}")
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == picture.read_bytes()
    shutil.copy(picture, images / "unnamed.png")  # in the folder, and in no sample
    for name in [*names[1:], f"{mark}unnamed.png"]:
        answer = client.get(f"runs/done/pictures/{quote(name, safe='')}")
        assert answer.status_code == 404 and b"secret" not in answer.content, name
    found = told(client, "runs/done/samples")["evaluations"][-len(names) :]
    assert [one["samples"][0]["shown"] for one in found] == [True, True, *[False] * 4]


# -- curves ---------------------------------------------------------------------------------------


def test_curves_are_given_once_and_then_what_is_new(client, root):
    run = add(root / "mine", record(10), record(20))
    whole = told(client, "runs/mine/curves")
    assert whole["series"]["loss"] == [[10, 0.4], [20, 0.2]] and not whole["more"]
    assert whole["series"]["norm_lora"] == [[10, 0.5], [20, 0.5]] and whole["last"] == 20
    add(run, evaluation(20), record(30))
    more = told(client, f"runs/mine/curves?since=20&version={whole['version']}")
    assert more["more"] and more["series"]["loss"] == [[20, 0.2], [30, 4 / 30]]
    assert more["series"]["right"] == [[20, 70.0]]
    back = {"kind": "rollback", "step": 30, "from_step": 30, "to_step": 10}
    add(run, back, record(20, loss=0.75))
    anew = told(client, f"runs/mine/curves?since=30&version={more['version']}")
    assert not anew["more"] and anew["series"]["loss"] == [[10, 0.4], [20, 0.75]]
    log = MetricsLog(run / "metrics.jsonl")
    log.truncate_to(0)
    log.close()
    add(run, record(7))
    assert told(client, f"runs/mine/curves?since=30&version={anew['version']}")["series"][
        "loss"
    ] == [[7, 4 / 7]]


def test_numbers_that_have_no_place_on_an_axis_are_left_out(client, root):
    run = add(root / "mine", record(1, loss=float("nan")), record(2, lr=1e300), record(3))
    assert read_metrics(run / "metrics.jsonl")[0]["loss"] is None
    series = told(client, "runs/mine/curves")["series"]
    assert series["loss"] == [[2, 2.0], [3, 4 / 3]] and series["learning_rate"][-1] == [3, 1e-3]
    assert [step for step, _ in series["learning_rate"]] == [1, 3]


@given(
    st.lists(st.floats(-1e6, 1e6), max_size=500),
    st.integers(4, 60),
)
def test_thinning_keeps_the_ends_and_the_extremes(values, most):
    points = [(float(step), value) for step, value in enumerate(values)]
    thin = curves.thinned(points, most)
    assert len(thin) <= most and sorted(thin) == thin
    if points:
        assert (thin[0], thin[-1]) == (points[0], points[-1])
        assert max(v for _, v in thin) == max(values) and min(v for _, v in thin) == min(values)


def test_a_long_log_is_thinned_and_its_parts_are_not(client, root):
    steps = range(1, 4001)
    lines = [json.dumps(record(step, loss=9.0 if step == 1777 else 1.0)) for step in steps]
    (root / "long").mkdir()
    (root / "long" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    whole = told(client, "runs/long/curves")
    assert not whole["whole"] and len(whole["series"]["loss"]) <= curves.MOST_POINTS
    assert [1777, 9.0] in whole["series"]["loss"]
    part = told(client, "runs/long/curves?since=100&until=110")["series"]["loss"]
    assert [step for step, _ in part] == list(range(100, 111))
    rows = list(csv.reader(client.get("runs/long/curves.csv").text.splitlines()))
    assert rows[0][:2] == ["step", "loss"] and len(rows) == 4001 and rows[1777][1] == "9.0"


def test_a_table_names_no_formula_that_a_log_made_up(client, root):
    add(root / "mine", record(1, gradient_norms={"=cmd()": 1.0, "<b>": 2.0, "lora": 3.0}))
    head = client.get("runs/mine/curves.csv").text.splitlines()[0]
    assert "norm_lora" in head and "cmd" not in head and "<b>" not in head


@pytest.mark.parametrize("query", ["since=nan", "since=x", "since=1e400", "version=" + "x" * 99])
def test_questions_out_of_bounds_are_refused(client, root, query):
    add(root / "mine", record(1))
    assert client.get(f"runs/mine/curves?{query}").status_code == 422


def test_a_log_is_read_on_from_where_it_was_read_to(tmp_path, monkeypatch):
    path = add(tmp_path / "run", *(record(step) for step in range(1, 50))) / "metrics.jsonl"
    parsed = []
    from web.training import logs

    real = logs.record_of
    monkeypatch.setattr(logs, "record_of", lambda line: parsed.append(line) or real(line))
    reader = LogReader()
    assert len(reader.read(path)) == 49 == len(parsed)
    add(path.parent, record(50))
    with path.open("ab") as file:
        file.write(b'{"kind":"tra')  # half a line, which a writer has not finished
    assert len(reader.read(path)) == 50 == len(parsed) and reader.generation == 1
    shutil.copy(path, tmp_path / "other")
    os.replace(tmp_path / "other", path)
    assert len(reader.read(path)) == 50 and reader.generation == 2


def test_readers_at_once_agree(client, root):
    run = add(root / "mine", *(record(step) for step in range(1, 20)))
    answers = []

    def look() -> None:
        for _ in range(5):
            answers.append(len(told(client, "runs/mine/curves")["series"]["loss"]))
            told(client, "runs/mine")
            told(client, "runs")

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    add(run, *(record(step) for step in range(20, 40)))
    for thread in threads:
        thread.join()
    assert len(answers) == 20 and set(answers) <= set(range(19, 40))


# -- recipe and data ------------------------------------------------------------------------------


def test_the_recipe_of_the_tiny_preset_differs_in_nothing():
    from web.training.recipe import preset_values

    told = recipe_of(preset_values("tiny"))
    assert told["preset"] == "tiny" and not any(field["differs"] for field in told["fields"])
    assert {field["group"] for field in told["fields"]} >= {"recipe_model", "recipe_place"}


def test_the_quarantine_is_counted_by_reason(tmp_path):
    lines = [
        *(
            {"where": f"record {i}", "id": f"i{i}", "reason": f"a{i}.png: no such file; check it"}
            for i in range(5)
        ),
        {"where": "record 9", "id": "", "reason": "turn 3 is empty"},
    ]
    path = tmp_path / QUARANTINE
    path.write_text("\n".join(map(json.dumps, lines)) + "\nnot JSON\n[1]\n{}\n")
    found = quarantine_of(path)
    assert found is not None and (found["count"], found["whole"]) == (6, True)
    assert [(r["reason"], r["count"]) for r in found["reasons"]] == [
        ("…: no such file; check it", 5),
        ("turn … is empty", 1),
    ]
    assert [e["where"] for e in found["reasons"][0]["examples"]] == [
        f"record {i}" for i in range(3)
    ]
    assert quarantine_of(tmp_path / "absent") is None


# -- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_is_verified_when_asked_and_again_after_it_has_changed(client, root):
    run = Path(shutil.copytree(runs.finished_run(), root / "done"))
    newest = checkpoints.checkpoints_in(run)[-1]
    assert told(client, "runs/done")["checkpoints"][0]["verified"] is None
    path = f"runs/done/checkpoints/{newest.name}/verify"
    assert client.post(path).json()["problems"] == []
    assert told(client, "runs/done")["checkpoints"][0]["verified"]["problems"] == []
    weights = newest / "lora_weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert told(client, "runs/done")["checkpoints"][0]["verified"] is None
    assert "lora_weights" in client.post(path).json()["problems"][0]
    for name in ("checkpoint-000000", "..", "best", "checkpoint-1"):
        answer = client.post(f"runs/done/checkpoints/{quote(name, safe='')}/verify")
        assert answer.status_code == 404


def test_one_checkpoint_is_verified_at_a_time(monkeypatch, tmp_path):
    verified, go_on, begun = Verified(), threading.Event(), threading.Event()
    monkeypatch.setattr(
        checkpoints, "verify", lambda path: [] if begun.set() or go_on.wait(30) else []
    )
    first = threading.Thread(target=verified.verify, args=(tmp_path,))
    first.start()
    begun.wait(30)
    with pytest.raises(RequestError, match="verifying_another"):
        verified.verify(tmp_path)
    go_on.set()
    first.join()
    assert verified.of(tmp_path) is not None


def test_chatting_with_a_checkpoint_loads_it(root):
    run = Path(shutil.copytree(runs.finished_run(), root / "done"))
    newest, loaded = checkpoints.checkpoints_in(run)[-1], threading.Event()
    asked = []

    def load(source: str):
        asked.append(source)
        loaded.set()
        return runs.assistant()

    client = client_of(root, Model(load=load))
    choice = {"run": "done", "checkpoint": newest.name}
    assert client.post("model", json=choice).json() == {}
    assert loaded.wait(30) and asked == [str(newest)]
    for body in (
        {"run": "..", "checkpoint": newest.name},
        {"run": "done", "checkpoint": "../done"},
        {"run": "done", "checkpoint": "best"},
    ):
        assert client.post("model", json=body).status_code == 404
    assert client.post("model", json=choice | {"more": 1}).status_code == 422
    fixed = client_of(root, Model(runs.assistant())).post("model", json=choice)
    assert fixed.json()["error"]["key"] == "model_is_fixed"


def test_looking_at_runs_loads_no_torch():
    code = (
        "import sys\n"
        "from fastapi.testclient import TestClient\n"
        "from web.app import build_site, web_application\n"
        "from web.model import Model\n"
        "site = build_site(Model(), conversations=sys.argv[2], runs=sys.argv[1])\n"
        "client = TestClient(web_application(site))\n"
        "for path in ('runs', 'runs/finished', 'runs/finished/curves', 'runs/finished/samples'):\n"
        "    assert client.get(f'/app/{path}').status_code == 200, path\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(runs.finished_run().parent),
            str(runs.shared() / "conversations"),
        ],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
