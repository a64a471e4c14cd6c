"""The parts that exact resume rests on: row dropout, the lock, the background saver, the chain."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
import train
from data.features import FeatureStore
from errors import PhiSightError
from lora.dropout import RowDropout, key_of
from reports.log import MetricsLog, read_metrics
from training.lock import RunLock
from training.saving import BackgroundSaver

ROOT = Path(__file__).resolve().parent.parent


# -- dropout by row -------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5, unique=True), st.randoms())
def test_a_rows_mask_is_the_same_in_any_company(keys, order):
    rows = torch.rand(len(keys), 7, 33) + 1
    dropout = RowDropout(0.3, layer_key=5)
    together = dropout(rows, keys)
    shuffled = order.sample(range(len(keys)), len(keys))
    again = dropout(rows[shuffled], [keys[i] for i in shuffled])
    assert torch.equal(again, together[shuffled])
    for row, key in enumerate(keys):
        assert torch.equal(dropout(rows[row : row + 1], [key])[0], together[row])


def test_masks_differ_by_row_and_by_layer_and_keep_the_mean():
    rows = torch.ones(2, 64, 512)
    first, second = RowDropout(0.25, layer_key=1), RowDropout(0.25, layer_key=2)
    a, b = first(rows, [10, 11]), second(rows, [10, 11])
    assert not torch.equal(a[0], a[1]) and not torch.equal(a, b)
    assert a.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert abs(a.mean().item() - 1) < 0.02 and abs((a == 0).float().mean().item() - 0.25) < 0.01


def test_rows_without_their_padding_have_the_masks_of_padded_ones():
    dropout, keys, lengths = RowDropout(0.3, layer_key=5), [7, 8, 9], [3, 6, 1]
    x = torch.ones(3, 6, 5)  # 15 numbers in the first row: no whole number of words
    padded, scale = dropout.mask(x, keys)
    tokens = torch.cat([row[:length] for row, length in zip(padded, lengths)])
    together, same_scale = dropout.mask(x.reshape(1, -1, 5)[:, : sum(lengths)], keys, lengths)
    assert torch.equal(together[0], tokens) and scale == same_scale


def test_dropout_draws_no_number_from_torchs_generator():
    dropout, before = RowDropout(0.5), torch.get_rng_state()
    dropout(torch.rand(1, 4, 4, generator=torch.Generator()), [3])
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_off_in_evaluation_and_counts_its_keys():
    dropout = RowDropout(0.5)
    x = torch.rand(3, 4, 4)
    with pytest.raises(PhiSightError, match="3 rows came with 2 row keys"):
        dropout(x, [1, 2])
    assert dropout.eval()(x, [1, 2]) is x


def test_keys_depend_on_every_part():
    keys = {
        key_of(seed, epoch, row) for seed in range(5) for epoch in range(5) for row in range(50)
    }
    assert len(keys) == 5 * 5 * 50 and all(0 <= key < 2**63 for key in keys)


# -- one writer -----------------------------------------------------------------------------------


def holding_process(run: Path) -> subprocess.Popen:
    """Another process that holds the lock of `run`, and has said so."""
    code = (
        "import sys, time; from training.lock import RunLock\n"
        "with RunLock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_trainer_stops_and_names_the_first(tmp_path):
    process = holding_process(tmp_path / "run")
    try:
        with pytest.raises(PhiSightError, match=f"process {process.pid} on .* is training there"):
            runs.start(tmp_path / "run", **runs.SHORT)
    finally:
        process.kill()
        process.wait()
    # The lock file is still there, and its holder is dead: taken over without a word.
    assert (tmp_path / "run" / ".lock").exists()
    assert runs.start(tmp_path / "run", **runs.SHORT) == 0


def test_a_lock_is_given_back_and_an_unused_folder_with_it(tmp_path):
    for _ in range(2):
        with RunLock(tmp_path / "run"):
            assert (tmp_path / "run").exists()
        assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(PhiSightError, match="file/run: .*another --run"),
        RunLock(tmp_path / "file" / "run"),
    ):
        pass


# -- saving beside the training -------------------------------------------------------------------


def test_saves_run_beside_their_caller_and_one_at_a_time():
    saver, release, log = BackgroundSaver(), threading.Event(), []

    def first() -> None:
        release.wait(30)
        log.append("first")

    saver.start(first)
    log.append("training goes on")
    threading.Timer(0.1, release.set).start()
    saver.start(lambda: log.append("second"))
    saver.wait()
    assert log == ["training goes on", "first", "second"]


@pytest.mark.parametrize("notice", ["check", "wait", "start"])
def test_an_error_of_a_save_comes_out_once(notice):
    saver = BackgroundSaver()
    saver.start(lambda: 1 / 0)
    saver._thread.join()
    with pytest.raises(ZeroDivisionError):
        saver.start(lambda: None) if notice == "start" else getattr(saver, notice)()
    saver.check()
    saver.wait()


def test_a_save_that_fails_stops_the_run_with_its_cause(tmp_path, monkeypatch):
    committed = checkpoints.commit

    def commit(run_dir, snapshot, keep):
        if snapshot.step == 2:
            raise PhiSightError("checkpoint-000002: not saved (no space); make room")
        return committed(run_dir, snapshot, keep)

    monkeypatch.setattr(checkpoints, "commit", commit)
    fields = runs.SHORT | {"max_steps": 6, "save_steps": 1}
    with pytest.raises(PhiSightError, match="no space"):
        runs.start(tmp_path / "run", **fields)
    assert runs.newest_step(tmp_path / "run") == 1
    monkeypatch.undo()
    assert runs.resume(tmp_path / "run") == 0
    runs.start(tmp_path / "whole", **fields)
    assert checkpoints.diff(tmp_path / "run", tmp_path / "whole").identical


def test_a_time_limit_stops_and_a_time_saves(tmp_path, capsys):
    fields = runs.SHORT | {"max_steps": 3, "save_steps": 100, "save_every_minutes": 1e-6}
    runs.start(tmp_path / "run", "--max-minutes=1e-6", **fields)
    assert "stopped at step 1 of 3: the time is up, saved" in capsys.readouterr().out
    assert runs.resume(tmp_path / "run", "--stop-at-step=2") == 0
    assert runs.resume(tmp_path / "run") == 0
    runs.start(tmp_path / "whole", **runs.SHORT | {"max_steps": 3, "save_steps": 100})
    found = checkpoints.diff(tmp_path / "run", tmp_path / "whole")
    assert {row["name"] for row in found.differences} == {"config.save_every_minutes"}


# -- the chain ------------------------------------------------------------------------------------


def edited(folder: Path, line: int, old: str, new: str) -> None:
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new)
    log.write_text("".join(lines))


def test_a_finished_run_is_intact_and_an_edited_log_is_not(tmp_path, capsys):
    run = runs.copy_of(runs.finished_run(), tmp_path)
    assert checkpoints.main(["verify", str(run)]) == 0
    log = read_metrics(run / "metrics.jsonl")
    edited(run, 1, f'"step":{log[1]["step"]}', f'"step":{log[1]["step"] + 1}')
    capsys.readouterr()
    assert checkpoints.main(["verify", "--json", str(run)]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert "line 2 (step" in problems[str(run / "metrics.jsonl")][0]


def test_timings_are_no_part_of_the_chain(tmp_path):
    run = runs.copy_of(runs.finished_run(), tmp_path)
    log = read_metrics(run / "metrics.jsonl")
    edited(run, 0, f'"seconds":{log[0]["timing"]["seconds"]}', '"seconds":1e9')
    assert checkpoints.main(["verify", str(run)]) == 0


def test_a_missing_line_shows(tmp_path):
    run = runs.copy_of(runs.finished_run(), tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:1] + lines[2:]))
    problems = checkpoints.verify_run(run)
    assert "line 2" in problems[str(run / "metrics.jsonl")][0]


def test_a_log_of_another_run_shows(tmp_path):
    """Whole in itself, but not what the checkpoint came with."""
    run = runs.copy_of(runs.finished_run(), tmp_path)
    log = MetricsLog(tmp_path / "other.jsonl")
    for record in read_metrics(run / "metrics.jsonl"):
        log.write({key: value for key, value in record.items() if key != "chain"} | {"lr": 1.0})
    (tmp_path / "other.jsonl").replace(run / "metrics.jsonl")
    problems = checkpoints.verify_run(run)
    assert problems[str(run / "metrics.jsonl")] == []
    assert any(
        "its chain is not that of the log" in found[0]
        for path, found in problems.items()
        if "checkpoint-" in path
    )


def test_the_log_knows_the_weights_of_a_checkpoint(tmp_path):
    """Weights of another run, sealed as these: every file is whole, the log disagrees."""
    run = runs.copy_of(runs.finished_run(), tmp_path)
    checkpoint = checkpoints.resolve(run)
    state = {
        stem: {name: tensor.clone() for name, tensor in tensors.items()}
        for stem, tensors in checkpoint.state.items()
    }
    next(iter(state["image_projector"].values())).view(-1)[0] += 1e-3
    checkpoints.save(run, checkpoint.step, state, checkpoint.config, checkpoint.trainer_state)
    assert checkpoints.verify(checkpoint.path) == []
    problems = checkpoints.verify_run(run)[str(checkpoint.path)]
    assert "its weights are not those that the log has for step" in problems[0]


def test_where_two_runs_part(tmp_path, capsys):
    fields = runs.SHORT | {"max_steps": 4, "log_steps": 1, "lora_dropout": 0.0}
    runs.start(tmp_path / "a", **fields)
    runs.start(tmp_path / "b", "--stop-at-step=2", **fields)
    assert runs.resume(tmp_path / "b", "--allow-changes", "--lora-dropout=0.5") == 0
    capsys.readouterr()
    assert checkpoints.main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "the logs agree to step 2, part by step 3 (loss, " in capsys.readouterr().out
    found = checkpoints.diff(tmp_path / "a", tmp_path / "b").as_json()
    assert (found["parted"]["agree_to"], found["parted"]["part_by"]) == (2, 3)
    first = found["differences"][0]
    assert first["owner"] == "lora" and first["max_abs_difference"] > 0


def test_show_says_how_far_the_weights_moved(tmp_path, capsys):
    runs.start(tmp_path / "run", **runs.SHORT | {"max_steps": 4, "save_steps": 2})
    capsys.readouterr()
    assert checkpoints.main(["show", "--json", str(tmp_path / "run")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["change_since_step"] == 2
    assert shown["owners"]["lora"]["change"] > 0 and shown["owners"]["projector"]["change"] > 0
    assert shown["owners"]["rng"]["change"] is None


# -- however a run ends ---------------------------------------------------------------------------


def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path):
    flags = runs.flags(tmp_path / "run", **runs.SHORT)
    process = subprocess.Popen(
        [sys.executable, "-u", "train.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(120) == 0, errors
    assert checkpoints.resolve(tmp_path / "run").trainer_state["finished"]


def test_the_lock_is_held_until_the_last_save_is_written(tmp_path, monkeypatch):
    committed, taken = checkpoints.commit, []

    def slow_commit(run_dir, snapshot, keep):
        threading.Event().wait(1)
        with pytest.raises(PhiSightError, match="is training there"), RunLock(run_dir):
            pass
        taken.append(snapshot.step)
        return committed(run_dir, snapshot, keep)

    step, calls = train.train_step, []

    def diverging_step(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise PhiSightError("step: has diverged; lower it")
        return step(*arguments, **named)

    monkeypatch.setattr(checkpoints, "commit", slow_commit)
    monkeypatch.setattr(train, "train_step", diverging_step)
    with pytest.raises(PhiSightError, match="has diverged"):
        runs.start(tmp_path / "run", **runs.SHORT | {"save_steps": 1})
    assert taken == [1] and runs.newest_step(tmp_path / "run") == 1
    with RunLock(tmp_path / "run"):
        pass


def test_what_a_power_loss_left_in_the_log_is_cut(tmp_path):
    run = tmp_path / "run"
    fields = runs.SHORT | {"max_steps": 3, "log_steps": 1}
    runs.start(run, "--stop-at-step=2", **fields)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\0\0\0\n\0\0")
    assert runs.resume(run) == 0
    runs.start(tmp_path / "whole", **fields)
    found = checkpoints.diff(run, tmp_path / "whole")
    assert found.identical and found.parted is None


def test_features_that_another_machine_computed_are_noticed(tmp_path, monkeypatch):
    run = tmp_path / "run"
    runs.start(run, "--stop-at-step=1", **runs.SHORT)
    check_of = FeatureStore.check_of
    monkeypatch.setattr(FeatureStore, "check_of", lambda self, name: check_of(self, name) ^ 1)
    with pytest.raises(PhiSightError, match="data_fingerprint"):
        runs.resume(run)
