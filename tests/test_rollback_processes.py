"""A rollback in processes of their own: killed in the midst of it, and two that go together."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import poisoned
import pytest
import runs
from rollbacks import FIELDS, POISON, SAVED, assert_same_run, log_of, poison, went_back
from test_ranks import torchrun

SCRIPT = Path(poisoned.__file__)


@pytest.mark.parametrize(
    "place",
    [
        "training.rollback:restore_tensors",
        "checkpoints:remove_all!",
    ],
)
def test_a_kill_in_a_rollback_loses_nothing(place, tmp_path):
    run = tmp_path / "run"
    arguments = runs.flags(run, **FIELDS)
    killed = runs.command(SCRIPT, json.dumps(POISON), place, "--", *arguments)
    assert killed.returncode == -signal.SIGKILL, killed
    # The record of the rollback was written, and is cut off with what it tells of.
    assert log_of(run)[-1]["kind"] == "rollback" and runs.newest_step(run) in (SAVED, 10)
    with poison(POISON):
        runs.resume(run)
    assert_same_run(went_back(), run)


def test_two_processes_go_back_together_and_resume_to_the_bit(tmp_path):
    fields = FIELDS | {"batch_size": 2, "max_steps": 9}
    of_second = json.dumps({"0/13": 1e6})  # a row of the 7th step, of the second one's share
    for name, more in (("whole", ()), ("stopped", ("--stop-at-step=6",))):
        flags = runs.flags(tmp_path / name, **fields)
        done = torchrun(2, of_second, "", "--", *flags, *more, script=SCRIPT)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("went back from step 7 to 4") == (0 if more else 1)
    again = ("--resume", f"--run={tmp_path / 'stopped'}")
    done = torchrun(2, of_second, "", "--", *again, script=SCRIPT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("went back from step 7 to 4") == 1
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
