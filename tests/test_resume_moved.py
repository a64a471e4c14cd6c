"""What a resume takes and what it refuses: things that lie elsewhere now, imported runs, stops that
are behind the run, and early stopping that could never stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import runs
from test_train import refusal, state_of

import checkpoints
import export
from errors import PhiSightError


@pytest.fixture
def moved(tmp_path) -> dict[str, Path]:
    """Copies of all that a run was made of, in another place."""
    data = shutil.copy(runs.world() / "train.json", tmp_path / "other name.json")
    (tmp_path / "images").symlink_to(runs.world() / "images")
    (tmp_path / "vision").symlink_to(runs.VISION)
    return {
        "data": Path(data),
        "images": tmp_path / "images",
        "base": Path(shutil.copytree(runs.BASE, tmp_path / "base")),
        "vision": tmp_path / "vision",
        "held-out-questions": tmp_path / "gone.jsonl",
    }


def flags(places: dict[str, Path]) -> list[str]:
    return [f"--{name}={path}" for name, path in places.items()]


def test_what_lies_elsewhere_and_is_the_same_resumes_exactly(moved, tmp_path, capsys):
    runs.start(tmp_path / "whole", **runs.SHORT)
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    capsys.readouterr()
    assert runs.resume(run, *flags(moved)) == 0
    said = capsys.readouterr().out
    assert "resumed at step 1" in said and "warning" not in said
    found = checkpoints.diff(tmp_path / "whole", run).differences
    assert {difference["name"] for difference in found} == {
        f"config.{name.replace('-', '_')}" for name in moved
    }
    saved = checkpoints.resolve(run).config["config"]
    assert saved["data"] == [str(moved["data"])], "the next resume finds it there"


def test_a_finished_run_whose_data_moved_is_still_finished(moved, tmp_path, capsys):
    run = runs.copy_of(runs.finished_run(), tmp_path)
    before = {name: data for name, data in runs.contents(run).items() if "curves" not in name}
    capsys.readouterr()
    assert runs.resume(run, *flags(moved)) == 0
    said = capsys.readouterr().out
    assert "finished at step" in said and "warning" not in said
    now = {name: data for name, data in runs.contents(run).items() if "curves" not in name}
    assert now == before


@pytest.mark.parametrize(
    ("name", "fact"), [("data", "data_fingerprint"), ("base", "base_fingerprint")]
)
def test_what_lies_elsewhere_and_is_another_is_refused_by_its_fingerprint(
    moved, tmp_path, name, fact
):
    if name == "data":
        records = json.loads(moved["data"].read_text())
        records[0]["conversations"][-1]["value"] += " indeed"
        moved["data"].write_text(json.dumps(records))
    else:
        config = moved["base"] / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-4}))
    for run in (runs.stopped_run(), runs.finished_run()):
        more = [f"--{name}={moved[name]}", "--data-fraction=1.0"]
        message = refusal(runs.copy_of(run, tmp_path / run.name), *more[: 1 + (name == "data")])
        assert fact in message and f"config.{name}:" in message  # what differs, and by which name


# -- imported runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    base, vision = f"--base={runs.BASE}", f"--vision={runs.VISION}"
    export.main([f"--peft={folder / 'adapter'}", f"--run={runs.finished_run()}"])
    export.main([f"--import-peft={folder / 'adapter'}", f"--out={folder / 'run'}", base, vision])
    return folder / "run"


@pytest.mark.parametrize(
    "more",
    [
        ["--max-steps=5"],
        ["--max-steps=5", "--allow-changes"],
        ["--epochs=3", "--allow-changes"],
        ["--data=gone.json"],
    ],
)
def test_an_imported_run_cannot_be_gone_on_with_but_begun_from(imported, tmp_path, more):
    run = runs.copy_of(imported, tmp_path)
    before = runs.contents(run)
    with pytest.raises(PhiSightError) as error:
        runs.resume(run, *more)
    message = str(error.value)
    assert runs.contents(run).keys() - before.keys() <= {".lock"}
    assert "was imported, without the state of an optimizer" in message
    assert f"python train.py --run NEW --start-from {run} --projector mlp --lora-rank" in message


def test_an_imported_run_is_where_another_begins(imported, tmp_path):
    """By the flags that the refusal to go on with it names."""
    with pytest.raises(PhiSightError) as error:
        runs.resume(runs.copy_of(imported, tmp_path), "--epochs=3")
    named = str(error.value).partition("--start-from")[2].split()[1:]
    fields = runs.SHORT | {"start_from": imported}
    assert named[::2] == ["--projector", "--lora-rank", "--lora-alpha", "--lora-targets"]
    assert runs.start(tmp_path / "new", *named, **fields) == 0
    assert state_of(tmp_path / "new")["finished"] == "all steps done"


# -- stops that are behind ------------------------------------------------------------------------


@pytest.fixture
def at_step_2(tmp_path) -> Path:
    runs.start(tmp_path / "run", "--stop-at-step=2", **runs.SHORT | {"max_steps": 4})
    return tmp_path / "run"


def test_a_stop_before_the_present_step_is_refused(at_step_2):
    message = refusal(at_step_2, "--stop-at-step=1")
    assert message == (
        "--stop-at-step 1: the run stands at step 2 already; give a later step, or leave it out"
    )


@pytest.mark.parametrize("how", ["--resume", "--resume-if-any"])
def test_a_stop_at_the_present_step_stops_at_once(at_step_2, capsys, how):
    before = runs.contents(at_step_2)
    capsys.readouterr()
    if how == "--resume":
        assert runs.resume(at_step_2, "--stop-at-step=2") == 0
    else:
        fields = runs.SHORT | {"max_steps": 4}
        assert runs.start(at_step_2, "--stop-at-step=2", how, **fields) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{at_step_2}: stands at step 2, where --stop-at-step stops it; nothing")
    assert said.endswith(f"go on with: python train.py --resume --run {at_step_2}\n")
    assert runs.contents(at_step_2) == before


# -- early stopping needs evaluations -------------------------------------------------------------


@pytest.mark.parametrize("name", ["early_stopping", "keep_best"])
def test_what_needs_evaluations_is_refused_without(name, tmp_path):
    value = {"early_stopping": 2, "keep_best": "true"}[name]
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(PhiSightError, match=f"^{flag}: needs evaluations, and --evaluate-steps is"):
        runs.start(tmp_path / "deep" / "run", **runs.SHORT | {name: value})
    assert not (tmp_path / "deep").exists()


def test_a_resume_is_asked_for_evaluations_only_where_that_is_new(tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    message = refusal(run, "--early-stopping=2", "--allow-changes")
    assert "--early-stopping: needs evaluations" in message
    message = refusal(run, "--keep-best")
    assert "--keep-best: needs evaluations" in message


def test_early_stopping_that_comes_too_seldom_is_told(tmp_path, capsys):
    fields = {"evaluate_steps": 50, "early_stopping": 1, "max_steps": 2}
    runs.start(tmp_path / "run", **runs.SHORT | fields)
    assert "warning: --early-stopping cannot stop a run of 2 steps" in capsys.readouterr().out
