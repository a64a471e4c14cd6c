"""What a run was started with: a line for every start, in a file that stays small."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st

import config_values
import train
from errors import PhiSightError
from reports.starts import ARGUMENTS, MOST, STARTS, add_start, kept_arguments, read_starts
from reports.watching import run_status
from training.environment import git_state, kept_variables


def lines_in(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / STARTS).read_bytes().splitlines()]


def start(**more: object) -> dict:
    return {"time": "now", "step": 0, "arguments": [], "git": None} | more


# -- what is written ------------------------------------------------------------------------------


def test_every_start_is_written_down(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run = tmp_path / "run"
    runs.start(run, "--stop-at-step=1", **runs.SHORT)
    runs.resume(run)
    first, second = lines_in(run)
    assert first["arguments"] == [*runs.flags(run, **runs.SHORT), "--stop-at-step=1"]
    assert second["arguments"] == ["--resume", "--run", str(run)]
    assert (first["step"], second["step"]) == (0, 1)
    assert first["config"] == second["config"] and first["config"]["max_steps"] == 2
    assert config_values.from_dict(first["config"], "").batch_size == 1
    assert first["versions"]["torch"] and first["platform"] and first["processor_name"]
    assert (first["threads"], first["world_size"], first["device"]) == (1, 1, "cpu")
    assert first["environment"]["OMP_NUM_THREADS"] == "1"
    assert "hf_secret" not in (run / STARTS).read_text()
    assert first["git"] == git_state(runs.ROOT)

    capsys.readouterr()
    assert train.main(["--status", str(run)]) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("started")]
    assert "2 times, the last at" in line and f"train.py --resume --run {run}" in line
    assert "from step 1" in line
    train.main(["--status", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["starts"]["count"] == 2

    runs.start(run, "--overwrite", "--stop-at-step=1", **runs.SHORT)  # another run
    assert [entry["step"] for entry in lines_in(run)] == [0]


def test_a_run_of_before_has_none(tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    (run / STARTS).unlink()
    assert run_status(run).starts is None
    runs.resume(run)
    assert [entry["step"] for entry in lines_in(run)] == [1]


def test_the_file_keeps_the_first_and_the_newest_lines(tmp_path):
    for step in range(MOST + 7):
        add_start(tmp_path, start(step=step), anew=False)
    steps = [entry["step"] for entry in lines_in(tmp_path)]
    assert len(steps) == MOST and steps[0] == 0 and steps[1:] == [*range(8, MOST + 7)]
    assert list(tmp_path.iterdir()) == [tmp_path / STARTS]


def test_a_last_line_that_does_not_end_is_a_line(tmp_path):
    (tmp_path / STARTS).write_text(json.dumps(start(step=3)))
    add_start(tmp_path, start(step=4), anew=False)
    assert [entry["step"] for entry in lines_in(tmp_path)] == [3, 4]


def test_a_command_line_is_kept_as_far_as_there_is_room():
    assert kept_arguments(("--run", "x")) == ["--run", "x"]
    assert kept_arguments(("a", "b" * ARGUMENTS, "c")) == ["a", "..."]


def test_variables_are_kept_by_name_and_none_that_is_secret():
    environment = {
        "OMP_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "PYTORCH_CUDA_ALLOC_CONF": "x" * 999,
        "HF_TOKEN": "secret",
        "HF_HOME": "/models\x1b[31m",
        "TORCH_API_KEY": "secret",
        "NCCL_PASSWORD": "secret",
        "AWS_ACCESS": "secret",
        "PATH": "/bin",
    }
    kept = kept_variables(environment)
    assert "secret" not in kept.values()
    assert [*kept] == [
        "CUDA_VISIBLE_DEVICES",
        "HF_HOME",
        "OMP_NUM_THREADS",
        "PYTORCH_CUDA_ALLOC_CONF",
    ]
    assert kept["HF_HOME"] == r"/models\x1b[31m" and len(kept["PYTORCH_CUDA_ALLOC_CONF"]) == 200


def test_the_commit_of_the_code(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "x")
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "changed": False}
    (tmp_path / "other.txt").write_text("not of the code")
    assert git_state(tmp_path) == {"commit": commit, "changed": False}
    (tmp_path / "code.py").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "changed": True}
    (tmp_path / "copy").mkdir()
    assert git_state(tmp_path / "copy") is None  # a copy of the code within something else
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None  # git is not installed


# -- what is read ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("starts")


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists))
def test_whatever_the_file_holds_is_read_or_refused(folder, content):
    run = folder
    data = content if isinstance(content, bytes) else json.dumps(start(git=content)).encode()
    (run / STARTS).write_bytes(data)
    try:
        starts = read_starts(run)
    except PhiSightError as error:
        assert str(error).startswith(f"{run / STARTS}: ") and str(error).endswith("remove it")
    else:
        assert starts is not None and starts.count >= 1 and starts.commit == ""


def test_what_is_told_is_safe_for_a_terminal(tmp_path):
    git = {"commit": "\x1b[2J", "changed": True}
    add_start(tmp_path, start(arguments=["--run", "\x1b]0;x\x07"], time="\x9b", git=git), anew=True)
    starts = read_starts(tmp_path)
    assert starts is not None
    assert all(text.isprintable() for text in (starts.command, starts.time, starts.commit))


def test_what_is_no_file_of_ours_stops_the_start_in_one_line(tmp_path):
    os.mkfifo(tmp_path / STARTS)
    with pytest.raises(PhiSightError, match="a pipe.*remove it"):
        add_start(tmp_path, start(), anew=False)
    with pytest.raises(PhiSightError, match="a pipe.*remove it"):
        read_starts(tmp_path)
