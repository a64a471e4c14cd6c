"""One run on several processes: real ones, started by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch

import checkpoints
from reports.log import read_metrics
from training.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
FIELDS = runs.SHORT | {
    "data_fraction": 1.0,
    "batch_size": 3,
    "max_steps": 6,
    "save_steps": 2,
    "log_steps": 1,
    "evaluate_steps": 3,
}
FEW_TEXT_ONLY = 6  # conversations without a picture among those with one


def torchrun(
    processes: int,
    *arguments: str,
    script: Path | str = "train.py",
) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--standalone",
        "--",
        str(script),
        *arguments,
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    try:
        said, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's processes too
        raise
    return subprocess.CompletedProcess(command, process.returncode, said, errors)


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> dict:
    """The run's config; some of its data has no picture, so that a rank's rows may have none."""
    records = json.loads((runs.world() / "train.json").read_text())
    for record in records[: 3 * FEW_TEXT_ONLY : 3]:
        del record["image"]
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>\n", "").replace("\n<image>", "")
    data = tmp_path_factory.mktemp("mixed") / "train.json"
    data.write_text(json.dumps(records))
    return FIELDS | {"data": data}


@pytest.fixture(scope="module")
def alone(fields, tmp_path_factory) -> Path:
    """The run on one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    runs.start(run, **fields)
    return run


def assert_the_same_but_for_rounding(one: Path, other: Path) -> None:
    first, second = (read_metrics(run / "metrics.jsonl") for run in (one, other))
    assert [(r["kind"], r["step"]) for r in first] == [(r["kind"], r["step"]) for r in second]
    for a, b in zip(first, second):
        if a["kind"] == "train":
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            for key in ("row", "epoch", "lr", "tokens", "supervised_tokens", "padding_share"):
                assert a[key] == b[key]
        else:
            assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-5)


def test_two_processes_do_what_one_does_and_resume_to_the_bit(alone, fields, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = torchrun(2, *runs.flags(whole, **fields))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in each of 2 processes" in done.stdout
    assert_the_same_but_for_rounding(alone, whole)
    assert not checkpoints.diff(alone, whole).identical  # or the comparison compares nothing

    assert torchrun(2, *runs.flags(stopped, **fields), "--stop-at-step=3").returncode == 0
    resumed = torchrun(2, "--resume", f"--run={stopped}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    found = checkpoints.diff(whole, stopped)
    assert found.identical and found.parted is None, found
    assert found.owners["rng"] == 12  # six of each process


def test_a_run_may_go_on_with_more_or_fewer_processes(alone, fields, tmp_path):
    run = tmp_path / "run"
    runs.start(run, "--stop-at-step=2", **fields)
    more = torchrun(4, "--resume", f"--run={run}", "--stop-at-step=4")
    assert more.returncode == 0, more.stdout + more.stderr
    assert "saved on 1 processes, resumed on 4: same samples" in more.stdout
    assert f"torchrun --nproc-per-node 4 -- train.py --resume --run {run}" in more.stdout
    assert runs.resume(run) == 0
    assert_the_same_but_for_rounding(alone, run)


@pytest.mark.parametrize(
    "how, words",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "another process of the run is gone"),
        ("raise PhiSightError('step: the disk of this machine is gone; mend it')", "disk of this"),
    ],
)
def test_a_rank_that_dies_brings_the_others_down(how, words, fields, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(f"""
import os, signal, sys
import train
from errors import PhiSightError, run_main
from training.optimizer import AdamW

step = AdamW.step

def dying_step(self, rate):
    if os.environ["RANK"] == "1" and self.step_count == 2:
        {how}
    step(self, rate)

AdamW.step = dying_step
run_main(train.main)
""")
    clock = time.monotonic()
    done = torchrun(2, *runs.flags(tmp_path / "run", **fields), script=script)
    assert done.returncode != 0 and words in done.stderr
    # Start included; a hang would last until PATIENCE, which is hours.
    assert time.monotonic() - clock < 120
    assert runs.newest_step(tmp_path / "run") == 2


def test_without_torchrun_nothing_is_exchanged():
    ranks, parameter = Ranks(), torch.nn.Parameter(torch.ones(2))
    assert ranks.is_first and ranks.share_of([1, 2, 3]) == [1, 2, 3]
    assert ranks.any_of(True, False) == [True, False] and ranks.sum_numbers(0.1) == [0.1]
    ranks.sum_gradients([parameter])
    assert parameter.grad is None and ranks.from_first(lambda: "x") == "x"


def test_shares_cover_the_rows_once():
    rows = list(range(7))
    for size in (1, 2, 4, 9):
        shares = [Ranks(rank, size).share_of(rows) for rank in range(size)]
        assert sorted(sum(shares, [])) == rows
