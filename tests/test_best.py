"""The best checkpoint: kept beside the newest, named, asked for, and still there after any kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch
from test_train import damage, state_of

import checkpoints
import evaluate
import export
import infer
from assistant.assistant import Assistant
from errors import PhiSightError
from reports.log import read_metrics
from training import evaluating
from training.progress import Progress

RECIPE = runs.SHORT | {
    "max_steps": 6,
    "evaluate_steps": 1,
    "save_steps": 100,
    "log_steps": 1,
    "keep_checkpoints": 1,
}
NAN = float("nan")


@pytest.fixture
def losses(monkeypatch):
    """Give the evaluations of the following runs these losses."""

    def set_losses(*values: float) -> None:
        left: Iterator[float] = iter(values)
        monkeypatch.setattr(
            evaluating.meter,
            "evaluate",
            lambda *_: {"validation_loss": next(left), "alignment": {}},
        )

    return set_losses


def steps_in(run: Path) -> list[int]:
    return [int(path.name[-6:]) for path in checkpoints.checkpoints_in(run)]


# -- early stopping -------------------------------------------------------------------------------


def test_early_stopping_keeps_the_best_and_names_it(losses, tmp_path, capsys):
    losses(2.567, 6.583, 4.578)
    run = tmp_path / "run"
    runs.start(run, **RECIPE | {"early_stopping": 2})
    assert steps_in(run) == [1, 3]
    assert (checkpoints.resolve(run).step, checkpoints.resolve(run / "best").step) == (3, 1)
    state = state_of(run)
    assert (state["best_step"], state["best_loss"], state["step"]) == (1, 2.567, 3)
    said = capsys.readouterr().out
    assert "finished at step 3: early stopping" in said
    best = "the best is of step 1, validation loss 2.5670; ask it with: python infer.py --run"
    assert f"{best} {run}/best" in said
    assert runs.resume(run) == 0
    assert best in capsys.readouterr().out, "a finished run names it again"
    assert not any(checkpoints.verify_run(run).values())


def test_the_best_gives_way_to_a_better_one(losses, tmp_path):
    losses(3.0, 2.0, 2.5, 1.0, 1.5, 1.2)
    runs.start(tmp_path / "run", "--keep-best", **RECIPE)
    assert steps_in(tmp_path / "run") == [4, 6]
    assert checkpoints.resolve(tmp_path / "run" / "best").step == 4


def test_the_best_that_is_the_newest_is_there_once(losses, tmp_path):
    losses(3.0, 2.0, 1.5, 1.4, 1.3, 1.2)
    runs.start(tmp_path / "run", "--keep-best", **RECIPE | {"keep_checkpoints": 2})
    assert steps_in(tmp_path / "run") == [5, 6]
    assert checkpoints.resolve(tmp_path / "run" / "best").step == 6


def test_the_best_is_kept_beside_as_many_as_are_asked_for(losses, tmp_path):
    losses(1.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    runs.start(tmp_path / "run", "--keep-best", **RECIPE | {"save_steps": 1, "keep_checkpoints": 3})
    assert steps_in(tmp_path / "run") == [1, 4, 5, 6]


def test_a_loss_that_is_not_a_number_is_never_the_best(losses, tmp_path):
    losses(NAN, 2.0, NAN, float("inf"), 3.0)
    runs.start(tmp_path / "run", **RECIPE | {"early_stopping": 3})
    state = state_of(tmp_path / "run")
    assert (state["best_step"], state["best_loss"], state["step"]) == (2, 2.0, 5)
    assert steps_in(tmp_path / "run") == [2, 5]
    losses(NAN, NAN)
    runs.start(tmp_path / "nan", **RECIPE | {"early_stopping": 2})
    assert state_of(tmp_path / "nan")["best_step"] is None and steps_in(tmp_path / "nan") == [2]
    with pytest.raises(PhiSightError, match="nan: keeps no best checkpoint; train with"):
        checkpoints.resolve(tmp_path / "nan" / "best")


def test_without_being_asked_no_best_is_kept(losses, tmp_path):
    losses(1.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    runs.start(tmp_path / "run", **RECIPE)
    assert steps_in(tmp_path / "run") == [6] and state_of(tmp_path / "run")["best_step"] is None
    with pytest.raises(PhiSightError, match="keeps no best checkpoint"):
        checkpoints.resolve(tmp_path / "run/best")


# -- across a resume ------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_patience_and_best_go_on_where_a_run_was_stopped(losses, tmp_path, stop):
    values = (3.0, 1.0, 2.0, 1.0, 1.5, 0.5)
    losses(*values)
    runs.start(tmp_path / "whole", **RECIPE | {"early_stopping": 3})
    losses(*values)
    run = tmp_path / "run"
    runs.start(run, f"--stop-at-step={stop}", **RECIPE | {"early_stopping": 3})
    runs.resume(run)
    for name in ("", "best"):
        assert checkpoints.diff(tmp_path / "whole" / name, run / name).identical
    assert steps_in(run) == steps_in(tmp_path / "whole") == [2, 5]


def test_the_best_of_an_older_checkpoint_is_there_when_the_newest_is_damaged(losses, tmp_path):
    losses(2.0, 3.0, 3.0, 1.0)
    fields = RECIPE | {"save_steps": 3, "keep_checkpoints": 2}
    runs.start(tmp_path / "run", "--keep-best", "--stop-at-step=4", **fields)
    run = tmp_path / "run"
    assert steps_in(run) == [1, 3, 4], "the best that step 3 knows of is kept with it"
    damage(checkpoints.checkpoints_in(run)[-1])
    assert checkpoints.resolve(run / "best").step == 1
    losses(1.0, 0.5, 3.0)
    runs.resume(run)
    assert checkpoints.resolve(run / "best").step == 5


def test_a_resume_may_begin_and_cease_to_keep_the_best(losses, tmp_path):
    losses(3.0, 2.0, 2.5, 1.0, 1.5, 1.2)
    run = tmp_path / "run"
    runs.start(run, "--stop-at-step=1", **RECIPE)
    runs.resume(run, "--keep-best", "--stop-at-step=3")
    assert steps_in(run) == [2, 3]
    runs.resume(run, "--no-keep-best")
    assert steps_in(run) == [6] and state_of(run)["best_step"] is None


def test_a_run_that_early_stopping_ended_goes_on_with_more_patience(losses, tmp_path):
    losses(1.0, 2.0, 2.0, 0.5, 0.7, 0.7)
    run = tmp_path / "run"
    runs.start(run, **RECIPE | {"early_stopping": 1})
    assert state_of(run)["step"] == 2
    runs.resume(run, "--early-stopping=3", "--allow-changes")
    state = state_of(run)
    assert (state["step"], state["best_step"]) == (6, 4) and steps_in(run) == [4, 6]


def test_a_damaged_best_is_named(losses, tmp_path):
    losses(1.0, 2.0)
    runs.start(tmp_path / "run", **RECIPE | {"early_stopping": 1})
    damage(checkpoints.checkpoints_in(tmp_path / "run")[0])
    with pytest.raises(PhiSightError, match="checkpoint-000001.*lora_weights"):
        checkpoints.resolve(tmp_path / "run" / "best")


# -- whoever takes a run takes its best -----------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose best is not its newest. Tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        left = iter([1.0, 2.0])
        patch.setattr(
            evaluating.meter,
            "evaluate",
            lambda *_: {"validation_loss": next(left), "alignment": {}},
        )
        folder = tmp_path_factory.mktemp("best") / "run"
        runs.start(folder, **RECIPE | {"early_stopping": 1, "warmup_fraction": 0.0})
    return folder


def test_every_command_takes_the_best(run, tmp_path, capsys):
    best = str(run / "best")
    capsys.readouterr()
    assert infer.main(["--run", best, "--prompt", "What?", "--max-new-tokens=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(run / "checkpoint-000001")
    assert evaluate.main(["--run", best, "--max-new-tokens=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(run / "checkpoint-000001")
    assert export.main([f"--peft={tmp_path / 'adapter'}", f"--run={best}"]) == 0
    assert checkpoints.main(["show", best]) == 0
    assert "checkpoint-000001: step 1, verified" in capsys.readouterr().out
    assert checkpoints.main(["verify", best]) == 0
    assert checkpoints.main(["diff", best, str(run)]) == 1
    runs.start(tmp_path / "next", **runs.SHORT | {"start_from": best, "max_steps": 1})
    assert checkpoints.resolve(tmp_path / "next").config["started_from"]["step"] == 1


def test_the_best_is_other_weights_than_the_newest(run):
    states = [
        Assistant.load(run / name).model.projector.state_dict()["linear_1.weight"]
        for name in ("", "best")
    ]
    assert not torch.equal(*states)
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 1, 1, 2, 2, 2]


def test_a_folder_that_is_called_best_is_a_folder(run, tmp_path):
    folder = tmp_path / "best"
    folder.mkdir()
    with pytest.raises(PhiSightError, match="no checkpoint in"):
        checkpoints.resolve(folder)
    runs.copy_of(run, folder).rename(folder / "real")
    (folder / "real").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(folder / "best")
    assert checkpoints.resolve(folder / "best").step == 2


@pytest.mark.parametrize("keep", [True, False])
def test_progress_knows_the_best_step_only_where_it_is_kept(keep):
    progress = Progress(step=4)
    progress.add_validation_loss(1.0, 0, keep)
    assert progress.best_step == (4 if keep else None)
