"""A sweep as it is typed: processes, failures, Ctrl-C, and the same command again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import runs

import checkpoints
import sweep
from evaluation.run_figures import EVALUATION, RunFigures, read_run
from files import write_whole
from sweeps.children import FAILED, FINISHED, Outcome, is_finished, why_ended
from sweeps.plan import PlannedRun
from sweeps.summary import Summary, ranked
from training.config_file import toml_lines

SHORT = runs.SHORT | {"max_steps": 3, "log_steps": 1, "evaluate_steps": 3, "save_steps": 1}


def file_of(folder: Path, lists: str, **fields: object) -> Path:
    """A sweep of short runs on the small world."""
    runs.finished_run()  # has computed the features
    values = runs.RECIPE | SHORT | {"features": runs.shared() / "features"}
    for name, file in (("data", "train.json"), ("images", "images"),
                       ("held_out_questions", "held_out.jsonl"),
                       ("novel_pair_questions", "novel_pairs.jsonl")):  # fmt: skip
        values[name] = runs.world() / file
    values |= fields
    plain = {n: str(v) if isinstance(v, Path) else v for n, v in values.items()}
    path = folder / "sweep.toml"
    path.write_text(f"[run]\n{toml_lines(plain)}\n[sweep]\n{lists}\n")
    return path


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("checkpoint-*/*")}


def test_a_run_that_fails_is_told_of_and_the_others_go_on(tmp_path, capsys):
    file = file_of(tmp_path, f'start_from = ["{tmp_path}/gone", ""]')
    arguments = [str(file), "--folder", str(tmp_path / "out"), "--evaluate", "--json"]
    capsys.readouterr()  # of the run that computed the features
    assert sweep.main(arguments) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found == json.loads((tmp_path / "out/summary.json").read_text())
    failed, good = found["runs"]
    assert failed["state"] == FAILED and "gone" in failed["error"]
    assert good["state"] == FINISHED and good["step"] == 3 and good["error"] == ""
    assert f"error: {failed['name']}: {failed['error']}" in printed.err
    assert found["by_validation_loss"] == found["by_alignment"] == [good["name"]]
    asked = json.loads((tmp_path / "out" / good["name"] / EVALUATION).read_text())
    assert good["held_out"] == asked["held_out"]
    assert good["held_out_alignment"] == asked["alignment"]
    page = (tmp_path / "out/summary.md").read_text()
    assert "## Failed" in page and "| 1 |" in page
    assert (tmp_path / "out/comparison.png").is_file()
    # The same again: what is finished is not trained, nor asked, again.
    run = tmp_path / "out" / good["name"]
    before = modified(run), (run / EVALUATION).stat().st_mtime_ns
    assert sweep.main(arguments) == 1
    assert before == (modified(run), (run / EVALUATION).stat().st_mtime_ns)
    assert "finished before" in capsys.readouterr().err


def test_a_run_is_the_planned_one_also_in_what_the_file_leaves_out():
    run = runs.finished_run()
    fields = read_run(run).fields
    planned = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    del planned["run"], planned["features"]  # say where things lie
    assert is_finished(run, PlannedRun("a", planned))
    del planned["learning_rate"]  # as if it had been taken out of the file
    assert not is_finished(run, PlannedRun("a", planned))


def test_ctrl_c_leaves_all_of_it_to_be_gone_on_with_to_the_bit(tmp_path):
    file = file_of(tmp_path, "seed = [0, 1]", max_steps=20, evaluate_steps=0)
    command = ("sweep.py", file, "--folder", tmp_path / "out", "--jobs", 2)
    process = runs.started(*command)
    both = [tmp_path / f"out/seed={seed}" for seed in range(2)]
    runs.wait_until(lambda: any(checkpoints.checkpoints_in(run) for run in both), process)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=400)
    assert process.returncode == 130, (printed, errors)
    assert "the same command goes on from there" in errors
    stopped = [checkpoints.resolve(run) for run in both if checkpoints.checkpoints_in(run)]
    assert stopped and not any(one.trainer_state["finished"] for one in stopped)
    again = runs.started(*command)
    printed, errors = again.communicate(timeout=400)
    assert again.returncode == 0, (printed, errors)
    whole = tmp_path / "whole"
    runs.start(whole, **(SHORT | {"max_steps": 20, "evaluate_steps": 0, "seed": 1}))
    assert checkpoints.diff(whole, both[1]).identical


def test_the_runs_are_listed_and_nothing_is_trained(tmp_path, capsys):
    file = file_of(tmp_path, "seed = [3, 4]")
    assert sweep.main([str(file), "--folder", str(tmp_path / "out"), "--list"]) == 0
    assert capsys.readouterr().out == "seed=3\nseed=4\n2 runs\n"
    assert not (tmp_path / "out").exists()


def test_another_sweep_in_the_folder_is_refused(tmp_path):
    file = file_of(tmp_path, "seed = [0]")
    with sweep.RunLock(tmp_path / "out"):
        done = runs.command("sweep.py", file, "--folder", tmp_path / "out")
    assert "is training there" in runs.assert_one_line_error(done)
    assert "another --folder" in done.stderr


@pytest.mark.parametrize("jobs", ["0", "-1", "257"])
def test_jobs_that_cannot_be(jobs, tmp_path):
    with pytest.raises(sweep.PhiSightError, match="--jobs"):
        sweep.main([str(tmp_path / "sweep.toml"), "--jobs", jobs])


# -- ranks, without a run -------------------------------------------------------------------------


def run_with(name: str, loss: float | None, gap: float | None) -> RunFigures:
    record = {"kind": "evaluation", "step": 1}
    if loss is not None:
        record["validation_loss"] = loss
    if gap is not None:
        record["alignment"] = {"right": 50.0 + gap, "swapped": 50.0}
    return RunFigures(Path(name), records=[record])


def test_a_low_loss_and_a_high_alignment_rank_first_and_what_is_unknown_not_at_all():
    found = [
        run_with("a", 0.5, 10.0), run_with("b", 0.3, None), run_with("c", None, 30.0),
        run_with("d", 0.4, 20.0), run_with("e", 0.3, 20.0),
    ]  # fmt: skip
    assert ranked(found, "validation_loss") == ["b", "e", "d", "a"]
    assert ranked(found, "alignment") == ["c", "d", "e", "a"]


def test_a_summary_shows_text_as_it_is(tmp_path):
    planned = PlannedRun("evil", {}, choices={})
    outcome = Outcome(planned, FAILED, "<script>alert(1)</script> | [x](http://x)")
    summary = Summary(tmp_path, [outcome])
    summary.write()
    page = (tmp_path / "summary.md").read_text()
    assert "<script>" not in page and "](http" not in page


@pytest.mark.parametrize(
    ("code", "log", "said"),
    [
        (0, "error: not this", ""),
        (2, "warning\nerror: the thing: the reason; a remedy\n", "the thing: the reason; a remedy"),
        (1, "Traceback\nValueError: x\n\n", "ended with exit code 1"),
        (-9, "", "ended by signal 9; see"),
    ],
)
def test_why_a_command_ended(code, log, said, tmp_path):
    write_whole(tmp_path / "log", log.encode())
    told = why_ended("train.py", code, tmp_path / "log")
    assert said in told and bool(told) == bool(code) and "\n" not in told
