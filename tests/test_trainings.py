"""Trainings and exports that are begun by the web app's routes: real processes, small runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import runs
from pages import served, wait_for

import app
import config as configs
import config_values
from errors import PhiSightError
from reports.watching import holder_of
from system.processes import signal_if
from training.lock import RunLock
from web.model import Model
from web.trainings import exports as exporting
from web.trainings import launch
from web.trainings.downloads import zipped
from web.trainings.fields import COMMON, GROUPS, SET_ELSEWHERE, form_json

ROOT = runs.ROOT
UNSEEN = "/proc/1/root/x"  # which the system lets nobody look at
QUICK = {"greedy-answers": 4, "evaluation-conversations": 2}
ENDLESS = {"max_steps": 100_000, "save_steps": 2}


class Program:
    """Sends what a page sends."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=f"{url}/app/", timeout=60)

    def get(self, path: str) -> Any:
        return self._told(self.client.get(path))

    def post(self, path: str, body: dict | None = None) -> Any:
        return self._told(self.client.post(path, json=body or {}))

    def _told(self, answer: httpx.Response) -> Any:
        told = answer.json()
        return told if answer.is_success else (answer.status_code, told["error"])

    def events(self, path: str, body: dict) -> list[tuple[str, Any]]:
        with self.client.stream("POST", path, json=body) as answer:
            text = answer.read().decode()
        if answer.status_code != 200:
            return [("refused", json.loads(text)["error"])]
        blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("event")]
        return [(b[0].removeprefix("event: "), json.loads(b[1][len("data: ") :])) for b in blocks]

    def training(self, name: str) -> dict:
        return next(t for t in self.get("trainings")["trainings"] if t["name"] == name)


def form(name: str, **values: object) -> dict:
    """A short training of the tiny preset over the tests' world."""
    given = (
        {n: str(v) if isinstance(v, Path) else v for n, v in runs.RECIPE.items()}
        | runs.SHORT
        | {
            "data": str(runs.world() / "train.json"),
            "images": str(runs.world() / "images"),
            "held_out_questions": str(runs.world() / "held_out.jsonl"),
            "novel_pair_questions": "",
            "features": str(runs.shared() / "features"),
        }
        | values
    )
    return {"name": name, "preset": "tiny", "values": given}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """The folder of runs; whatever trains there at the end is stopped."""
    folder = tmp_path_factory.mktemp("runs")
    yield folder
    for name in launch.names(folder):
        end(folder / name)


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory) -> Iterator[Program]:
    with served(Model(), tmp_path_factory.mktemp("talk"), folder, may_train=True) as site:
        yield Program(site.url)


def end(run: Path) -> None:
    """Have nobody train a run any more."""
    record = launch.record_of(run)
    if record and signal_if(record["process"], record["born"], signal.SIGKILL):
        wait_for(lambda: not launch.is_busy(run))


# -- who may --------------------------------------------------------------------------------------


def test_nothing_is_told_or_started_where_training_is_not_allowed(tmp_path):
    with served(Model(), tmp_path, tmp_path / "runs") as site:
        page = Program(site.url)
        asked = [
            page.get("trainings/fields"),
            page.get("trainings"),
            page.get("trainings/recipes/x"),
            page.post("trainings/command", form("mine")),
            page.post("trainings/start", form("mine")),
            page.post("runs/x/stop"),
            page.post("runs/x/resume"),
            page.get("exports"),
            page.get("exports/forms"),
            page.post("runs/x/exports", {"form": "merge"}),
            page.get("exports/x/download"),
            page._told(page.client.delete("exports/x")),
        ]
        heard = page.events("trainings/preflight", {"data": "x", "preset": "tiny"})
    assert {(status, error["key"]) for status, error in asked} == {(403, "training_not_allowed")}
    assert heard[0][1]["key"] == "training_not_allowed"
    assert not (tmp_path / "runs").exists()


def test_a_page_of_another_site_starts_nothing(page, folder):
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        sent = page.client.post("trainings/start", json=form("foreign"), headers=headers)
        assert sent.status_code == 403
    assert not (folder / "foreign").exists()


@pytest.mark.parametrize(
    ("flags", "key", "said"),
    [
        (["--allow-training", "--public"], "secret", "strangers"),
        (["--allow-training", "--host", "0.0.0.0"], "", "set PHISIGHT_API_KEY"),
        (["--allow-training", "--host", "0.0.0.0", "--without-key"], "", "set PHISIGHT_API_KEY"),
        (["--allow-training", "--allow-host", "x.example"], "", "set PHISIGHT_API_KEY"),
        (["--allow-training", "--allow-origin", "*"], "", "set PHISIGHT_API_KEY"),
        (["--trainings-at-once", "0"], "", "from 1 to"),
    ],
)
def test_the_app_does_not_start_where_others_could_train(monkeypatch, tmp_path, flags, key, said):
    monkeypatch.setenv("PHISIGHT_API_KEY", key) if key else monkeypatch.delenv(
        "PHISIGHT_API_KEY", raising=False
    )
    with pytest.raises(PhiSightError, match=said):
        app.main([*flags, "--run", str(tmp_path), "--port", "0"])


# -- the form and the command ----------------------------------------------------------------------


def test_the_form_has_every_field_of_the_config_once_with_its_help():
    told = form_json()
    names = [one["name"] for one in told["fields"]]
    assert sorted([*names, *SET_ELSEWHERE]) == sorted(configs.FIELDS)
    assert set(COMMON) <= set(names) and GROUPS.keys() <= configs.FIELDS.keys()
    assert all(one["help"] and one["group"] in told["groups"] for one in told["fields"])
    for preset in told["presets"]:
        assert preset["values"] == config_values.plain(configs.default_config(preset["name"]))


def test_the_command_is_what_train_py_would_be_typed(page, folder):
    told = page.post("trainings/command", form("mine", pack=False, lora_targets=["qkv_proj"]))
    assert told["problems"] == [] and told["command"].startswith("python train.py --preset tiny")
    assert f"--run {folder}/mine" in told["command"]
    assert "--no-pack" in told["command"] and "--lora-targets qkv_proj" in told["command"]
    assert "--quantization" not in told["command"], "it is the preset's own"
    assert not (folder / "mine").exists()


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"epochs": "many"}, "epochs", "a whole number"),
        ({"epochs": 0}, "epochs", "at least 1"),
        ({"schedule": "stairs"}, "schedule", "one of linear"),
        ({"data": "/dev/zero"}, "data", "no such file"),
        ({"data": "a\0b"}, "data", "null character"),
        ({"images": "/nowhere"}, "images", "no such folder"),
        ({"data": UNSEEN}, "data", "no such file"),
        ({"images": UNSEEN}, "images", "no such folder"),
        ({"keep_best": True}, None, "needs evaluations"),
        ({"run": "/etc"}, None, "cannot be set here"),
        ({"no_such": 1}, None, "cannot be set here"),
    ],
)
def test_every_problem_is_told_at_its_field(page, changes, field, said):
    problems = page.post("trainings/command", form("mine", **changes))["problems"]
    assert [one["field"] for one in problems] == [field] and said in problems[0]["text"]
    status, error = page.post("trainings/start", form("mine", **changes))
    assert status == 400 and said in error["text"]


@pytest.mark.parametrize("source", [UNSEEN, "x" * 300, "y/" * 2000, "a\0b", "/dev/zero"])
def test_what_a_training_cannot_begin_with_is_told_at_its_field(page, source):
    problems = page.post("trainings/command", form("mine") | {"start_from": source})["problems"]
    assert [one["field"] for one in problems] == ["start_from"]


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "a b", "-x", "x" * 65, "a\n"])
def test_a_name_that_is_no_name_of_a_folder_is_refused(page, name):
    status, error = page.post("trainings/start", form(name))
    assert status == 409 and error["key"] in ("training_name", "training_name_missing")
    assert page.client.post("runs/%2e%2e/stop", json={}).status_code == 404


def test_what_is_no_form_is_refused(page):
    for body in ({}, {"name": "x"}, {**form("x"), "more": 1}, {**form("x"), "values": {"a": {}}}):
        assert page.post("trainings/start", body)[0] == 422


# -- the preflight ---------------------------------------------------------------------------------


def test_a_preflight_counts_what_is_there_and_says_what_is_set_aside(page, tmp_path):
    records = json.loads((runs.world() / "train.json").read_text())[:5]
    (tmp_path / "images").symlink_to(runs.world() / "images")
    (tmp_path / "mine.json").write_text(json.dumps([*records, {"id": "odd"}]))
    heard = page.events("trainings/preflight", {"data": str(tmp_path), "preset": "tiny"})
    assert heard[0] == (
        "data",
        {"data": [str(tmp_path / "mine.json")], "images": [str(tmp_path / "images")]},
    )
    counts = {data["label"]: data["number"] for name, data in heard if name == "count"}
    assert counts["records"] == 6 and counts["conversations"] == 5 and counts["malformed"] == 1
    asides = [data["text"] for name, data in heard if name == "aside"]
    assert len(asides) == 1 and "odd" in asides[0]
    assert heard[-1] == ("done", {"set_aside": True})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("/nowhere/at/all", "no such file or folder"),
        ("/dev/null", "neither a file nor a folder"),
        (["a.json", "/nowhere/at/all"], "no such file or folder"),
        ("a\0b", "null character"),
        (UNSEEN, "no such file or folder"),
    ],
)
def test_data_that_are_neither_file_nor_folder_are_refused(page, data, said):
    [(name, told)] = page.events("trainings/preflight", {"data": data, "preset": "tiny"})
    assert said in told["error"]["text"] and "\n" not in told["error"]["text"]


def test_a_preflight_of_a_preset_of_several_sources_and_of_a_folder(page, tmp_path):
    """What the form holds before anything is typed is looked through as it is."""
    told = page.get("trainings/fields")
    assert all(isinstance(preset["values"]["data"], list) for preset in told["presets"])
    world = runs.world()
    for number, picture in enumerate(sorted((world / "images").glob("*.png"))[:4]):
        shutil.copy(picture, tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("shapes")
    body = {
        "data": [f"{world / 'train.json'}:2", f"{tmp_path}:0.5", ""],
        "images": [str(world / "images"), str(tmp_path)],
        "preset": "tiny",
    }
    heard = page.events("trainings/preflight", body)
    assert heard[0] == ("data", {"data": body["data"][:2], "images": body["images"]})
    lines = [data["text"] for name, data in heard if name == "line"]
    assert any("2 times" in line for line in lines) and any("0.5 times" in line for line in lines)
    assert heard[-1] == ("done", {"set_aside": False})
    [(_, told)] = page.events("trainings/preflight", {"data": [], "preset": "tiny"})
    assert told["error"]["key"] == "training_data_missing"


def test_a_form_without_pictures_does_not_take_the_presets(page):
    status = page.post("trainings/command", form("mine", images=[]))
    assert "--images=" in json.dumps(status)


def test_a_preflight_ends_when_its_page_leaves(page, monkeypatch):
    code = "import time; print('ready', flush=True); time.sleep(600)"
    monkeypatch.setattr("web.trainings.preflight.arguments", lambda *_: ["-c", code])
    body = {"data": str(runs.world()), "preset": "tiny"}
    with page.client.stream("POST", "trainings/preflight", json=body) as answer:
        for line in answer.iter_lines():
            if "ready" in line:
                break
        assert children("time.sleep(600)")
    wait_for(lambda: not children("time.sleep(600)"))


def children(words: str) -> list[int]:
    """Processes of this one whose command line has these words."""
    found = subprocess.run(
        ["ps", "-ww", "--ppid", str(os.getpid()), "-o", "pid=,args="],
        capture_output=True,
        text=True,
    ).stdout
    return [int(line.split()[0]) for line in found.splitlines() if words in line]


# -- training --------------------------------------------------------------------------------------


def test_a_training_is_started_found_stopped_and_gone_on_with(page, folder):
    assert page.post("trainings/start", form("first", **ENDLESS))["name"] == "first"
    assert page.training("first")["state"] in ("starting", "running")
    status, error = page.post("trainings/start", form("first", **ENDLESS))
    assert (status, error["key"]) in ((409, "training_already"), (409, "training_exists"))
    status, error = page.post("trainings/start", form("second"))
    assert (status, error["key"], error["values"]["name"]) == (409, "training_busy", "first")
    assert not (folder / "second").exists()

    wait_for(lambda: list((folder / "first").glob("checkpoint-*")))
    assert page.post("runs/first/stop") == {}
    wait_for(lambda: page.training("first")["state"] == "ended")
    stopped = runs.newest_step(folder / "first")

    status, error = page.post("trainings/start", form("first"))
    assert (status, error["key"]) == (409, "training_exists")
    told = page.post("runs/first/resume", {"values": {"max_steps": stopped + 2}})
    assert told["command"].endswith(f"--max-steps {stopped + 2} --allow-changes")
    wait_for(lambda: page.training("first")["state"] == "ended")
    assert runs.newest_step(folder / "first") == stopped + 2
    assert page.post("runs/first/stop")[1]["key"] == "training_not_running"


def test_a_training_that_fails_says_why_and_its_name_is_free_again(page, folder):
    (folder / "bad.json").write_text("not JSON")
    page.post("trainings/start", form("bad", data=str(folder / "bad.json")))
    wait_for(lambda: page.training("bad")["state"] == "failed")
    assert page.training("bad")["lines"][-1].startswith("error: ")
    assert "bad.json" in launch.failure_of(folder / "bad")
    assert page.post("trainings/command", form("bad"))["problems"] == []


def test_of_starts_at_once_one_starts(page, folder):
    answers: list[Any] = []
    names = [f"race-{number}" for number in range(6)]

    def start(name: str) -> None:
        answers.append(
            Program(str(page.client.base_url)[: -len("/app/")]).post(
                "trainings/start", form(name, **ENDLESS)
            )
        )

    threads = [threading.Thread(target=start, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = [answer["name"] for answer in answers if isinstance(answer, dict)]
    assert len(started) == 1, answers
    assert {a[1]["key"] for a in answers if isinstance(a, tuple)} == {"training_busy"}
    assert [name for name in names if (folder / name).exists()] == started
    end(folder / started[0])


def test_a_training_survives_its_server_and_the_next_one_finds_and_stops_it(tmp_path):
    """The server is killed by SIGKILL, in a process of its own."""
    folder = tmp_path / "runs"
    code = f"""
import sys, time; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from pages import served
from web.model import Model
with served(Model(), Path({str(tmp_path)!r}), Path({str(folder)!r}), may_train=True) as site:
    print(site.url, flush=True)
    time.sleep(600)
"""
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        page = Program(server.stdout.readline().strip())
        page.post("trainings/start", form("kept", **ENDLESS))
        wait_for(lambda: list((folder / "kept").glob("checkpoint-*")))
    finally:
        server.kill()
        server.wait()
    before = runs.newest_step(folder / "kept")
    wait_for(lambda: runs.newest_step(folder / "kept") > before)

    with served(Model(), tmp_path, folder, may_train=True) as site:
        page = Program(site.url)
        assert page.training("kept")["state"] == "running"
        assert page.post("trainings/start", form("more"))[1]["key"] == "training_busy"
        assert page.post("runs/kept/stop") == {}
        wait_for(lambda: page.training("kept")["state"] == "ended")
    assert holder_of(folder / "kept") == ""


def test_only_the_process_that_holds_the_run_is_ever_stopped(page, folder):
    """A lock that another process's number is written into, and one that this process holds."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        run = folder / "forged"
        with RunLock(run):
            signed = {"process": sleeper.pid, "machine": json.loads((run / ".lock").read_text())}
            signed["machine"] = signed["machine"]["machine"]
            for owner in (signed, signed | {"machine": "elsewhere"}):
                (run / ".lock").write_text(json.dumps(owner))
                assert page.post("runs/forged/stop")[1]["key"] == "training_elsewhere"
            (run / ".lock").write_text("")
            assert page.post("runs/forged/stop")[1]["key"] == "training_elsewhere"
        run.mkdir(exist_ok=True)
        (run / ".lock").write_text(json.dumps(signed))  # of a dead process, whose number is reused
        assert page.post("runs/forged/stop")[1]["key"] == "training_not_running"
        (run / ".started").mkdir()
        record = {"command": "x", "began": 1.0, "process": sleeper.pid, "born": "1"}
        (run / ".started/training.json").write_text(json.dumps(record))
        assert page.post("runs/forged/stop")[1]["key"] == "training_not_running"
        time.sleep(0.1)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_training_begins_with_the_weights_and_the_recipe_of_another(page, folder):
    shutil.copytree(runs.stopped_run(), folder / "old")
    recipe = page.get("trainings/recipes/old")
    assert recipe["preset"] == "tiny" and recipe["values"]["max_steps"] == 2
    asked = {"name": "new", **recipe, "start_from": "old"}
    assert page.post("trainings/command", asked)["problems"] == []
    page.post("trainings/start", asked)
    wait_for(lambda: page.training("new")["state"] not in ("starting", "running"))
    assert page.training("new")["state"] == "ended", page.training("new")
    assert "weights of" in (folder / "new/.started/output.log").read_text()
    missing = page.post("trainings/command", asked | {"name": "newer", "start_from": "nothing"})
    assert [one["field"] for one in missing["problems"]] == ["start_from"]


# -- exports ---------------------------------------------------------------------------------------


def test_an_export_is_made_told_downloaded_and_removed(page, folder):
    shutil.copytree(runs.finished_run(), folder / "done")
    forms = {one["form"]: one for one in page.get("exports/forms")["forms"]}
    assert forms.keys() == {"merge", "llava", "requantize", "prune", "gguf", "peft"}
    assert "split" in [one["name"] for one in forms["peft"]["options"]]
    assert all(option["help"] for one in forms.values() for option in one["options"])

    begun = page.post(
        "runs/done/exports", {"form": "merge", "options": QUICK | {"dtype": "float32"}}
    )
    assert page.post("runs/done/exports", {"form": "peft"})[1]["key"] == "export_busy"
    assert page.get(f"exports/{begun['id']}/download")[1]["key"] == "export_not_ready"

    def job() -> dict:
        return next(one for one in page.get("exports")["exports"] if one["id"] == begun["id"])

    wait_for(lambda: job()["state"] != "running")
    done = job()
    assert done["state"] == "done", done
    assert done["certificate"]["within_tolerance"] and done["certificate"]["greedy_equal"] == 100
    sent = page.client.get(f"exports/{begun['id']}/download")
    with zipfile.ZipFile(io.BytesIO(sent.content)) as archive:
        assert archive.testzip() is None
        names = {Path(name).name for name in archive.namelist()}
        certificate = json.loads(archive.read(f"{done['name']}/merge_certificate.json"))
    assert {"merge_certificate.json", "config.json", "model.safetensors", "README.md"} <= names
    assert certificate["greedy_equal"] == 100
    assert page._told(page.client.delete(f"exports/{begun['id']}")) == {}
    assert page.get("exports")["exports"] == []


def test_an_export_that_is_removed_ends_and_one_that_fails_says_why(page, folder):
    if not (folder / "done").exists():
        shutil.copytree(runs.finished_run(), folder / "done")
    begun = page.post("runs/done/exports", {"form": "merge"})
    wait_for(lambda: children("export.py"))
    page.client.delete(f"exports/{begun['id']}")
    assert not children("export.py")

    options = QUICK | {"max-loss-difference": -1}
    begun = page.post("runs/done/exports", {"form": "merge", "options": options})
    wait_for(lambda: page.get("exports")["exports"][0]["state"] == "failed")
    assert "--max-loss-difference" in page.get("exports")["exports"][0]["lines"][-1]
    page.client.delete(f"exports/{begun['id']}")


@pytest.mark.parametrize("fault", [ValueError("odd"), OSError(28, "No space left on device")])
def test_an_export_whose_thread_fails_does_not_bar_the_next_one(monkeypatch, tmp_path, fault):
    def failing(*given):
        raise fault

    monkeypatch.setattr(exporting, "lines_of", failing)
    exports = exporting.Exports()
    for _ in range(2):
        job = exports.begin(tmp_path, tmp_path / "checkpoint-000001", "merge", {})
        wait_for(lambda job=job: job.state == exporting.FAILED)
        assert len(job.lines) == 1 and "odd" not in job.lines[0]
        exports.remove(job.id)


def test_a_download_takes_files_of_any_time(tmp_path):
    """A machine without a clock of its own begins in 1970, which no ZIP can hold."""
    for name, at in (("old", 0), ("new", 5e9), ("usual", 1.7e9)):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (at, at))
    with zipfile.ZipFile(io.BytesIO(b"".join(zipped(tmp_path)))) as archive:
        years = {Path(one.filename).name: one.date_time[0] for one in archive.infolist()}
        assert archive.testzip() is None
    assert years == {"old": 1980, "new": 1980, "usual": 2023}


@pytest.mark.parametrize(
    "body",
    [
        {"form": "push"},
        {"form": "import-peft"},
        {"form": "gguf", "options": {"llama-python": "/bin/sh"}},
        {"form": "merge", "options": {"run": "/etc"}},
        {"form": "merge", "options": {"greedy-answers": "1 --push x"}},
        {"form": "prune"},
        {"form": "merge", "checkpoint": "../x"},
        {"form": "merge", "checkpoint": "checkpoint-٣"},
    ],
)
def test_what_the_page_does_not_offer_is_not_exported(page, folder, body):
    if not (folder / "done").exists():
        shutil.copytree(runs.finished_run(), folder / "done")
    assert page.post("runs/done/exports", body)[0] in (400, 409)
    assert page.get("exports")["exports"] == []
