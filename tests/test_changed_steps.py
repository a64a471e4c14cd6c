"""A run that goes on with steps of another size: it ends when the data are used up, sees each
conversation once an epoch, and its learning rate goes on from where it was. And runs so short that
they could end without having trained anything."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import Steps, assemble_with, cut_off, prepared, state_of

import checkpoints
import config as configs
import train
from data.sampler import plan
from errors import PhiSightError
from reports.log import read_metrics
from training import run as run_room
from training.loss_scaler import LossScaler
from training.progress import Progress
from training.rows import Rows, note_packing
from training.schedule import lr_at
from training.step import StepResult

LONG_SCHEDULE = {"warmup_fraction": 0.1, "schedule": "linear"}


# -- rows and positions, without a model ----------------------------------------------------------

CONFIG = configs.default_config()
SIZES = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 4),
        "accumulation": st.integers(1, 3),
        "row_tokens": st.sampled_from([0, 9, 12, 30]),
        "seed": st.integers(0, 2),
    }
)


def steps_of(rows: Rows, progress: Progress, seen: Counter) -> None:
    """One step: count what it sees and move on, as `Run.advance` does."""
    plan = rows.of_epoch(progress.epoch)
    end = min(progress.row + rows.rows_per_step, len(plan))
    seen.update(i for row in plan[progress.row : end] for i in row)
    progress.step, progress.row = progress.step + 1, end
    if end >= len(plan):
        progress.epoch, progress.row, progress.repacked = progress.epoch + 1, 0, []


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.lists(SIZES, min_size=2, max_size=4),
    st.lists(st.integers(1, 12), min_size=3, max_size=3),
    st.integers(1, 3),
)
def test_whatever_a_step_is_each_epoch_sees_everything_once(lengths, sizes, stops, epochs):
    progress, seen, saved, total = Progress(), Counter(), None, None
    for number, size in enumerate(sizes):
        config = configs.replace(CONFIG, epochs=epochs, **size)
        if saved is not None:
            note_packing(progress, saved, config, lengths)
        rows = Rows(config, lengths, progress.repacked)
        place = rows.place(progress.epoch, progress.row)
        planned, total = total, rows.total_steps(progress.step, *place)
        if planned is not None and planned != total and progress.step < planned:
            before = progress.schedule_place(planned)
            progress.go_on_with_other_steps(planned, total)
            assert progress.schedule_place(total) == pytest.approx(before)
        last = number == len(sizes) - 1
        for _ in range(10_000 if last else stops[number]):
            if progress.step == total:
                break
            steps_of(rows, progress, seen)
        position, end = progress.schedule_place(total)
        assert (position == pytest.approx(end)) == (progress.step == total)
        saved = config
    assert progress.step == total and progress.epoch == epochs
    assert seen == Counter({index: epochs for index in range(len(lengths))})


def test_without_a_change_a_position_is_the_step_itself():
    progress = Progress(step=7)
    assert progress.schedule_place(19) == (7, 19)
    assert all(isinstance(number, int) for number in progress.schedule_place(19))


def test_a_checkpoint_of_a_former_version_is_read_and_one_that_lacks_more_is_not():
    state = {**vars(Progress(step=3, best_loss=1.5)), "loss_scaler": {}}
    for name in ("best_step", "repacked", "schedule"):
        del state[name]
    assert Progress.from_state(state) == Progress(step=3, best_loss=1.5)
    del state["row"]
    with pytest.raises(KeyError):
        Progress.from_state(state)


# -- as it is typed -------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch) -> Steps:
    prepared()
    steps = Steps()
    monkeypatch.setattr(train, "train_step", steps)
    return steps


def begin(run: Path, stop: int, **fields: object) -> int:
    """Stop a run of one epoch after so many steps of one row; the number of its rows."""
    usual = {"evaluate_steps": 0, "accumulation": 1, "epochs": 1, "save_steps": 1000}
    runs.start(run, f"--stop-at-step={stop}", **(usual | LONG_SCHEDULE | fields))
    _, data = prepared()
    return len(plan(0, 0, data.train.lengths, runs.RECIPE["row_tokens"]))


@pytest.mark.parametrize(
    ("changed", "size"),
    [
        (["--batch-size=3"], 3),
        (["--accumulation=2"], 2),
        (["--batch-size=2", "--accumulation=2"], 4),
        (["--batch-size=50"], 50),
    ],
)
def test_the_end_is_what_was_done_and_what_is_left_in_the_new_steps(
    steps, tmp_path, capsys, changed, size
):
    rows = begin(tmp_path / "run", 3)
    first = list(steps.rates)
    assert runs.resume(tmp_path / "run", "--allow-changes", *changed) == 0
    left = -(-(rows - 3) // size)
    state = state_of(tmp_path / "run")
    assert (state["step"], state["total_steps"]) == (3 + left, 3 + left)
    assert (state["epoch"], state["row"], state["finished"]) == (1, 0, "all steps done")
    _, data = prepared()
    assert steps.conversations() == Counter(tuple(sample.input_ids) for sample in data.train)
    said = capsys.readouterr().out
    assert f"what is left takes {left} steps of the new size, in place of {rows - 3}" in said
    peak = runs.RECIPE["learning_rate"]
    pace = (rows - 3) / left
    assert first == [lr_at(step, rows, 0.1, peak) for step in range(3)]
    rest = [lr_at(3 + number * pace, rows, 0.1, peak) for number in range(left)]
    assert steps.rates[3:] == pytest.approx(rest)
    assert steps.rates[3] == lr_at(3, rows, 0.1, peak), "it goes on from where it was"


def test_smaller_steps_come_down_to_the_end_too(steps, tmp_path):
    rows = begin(tmp_path / "run", 2, batch_size=2)
    runs.resume(tmp_path / "run", "--allow-changes", "--batch-size=1")
    assert state_of(tmp_path / "run")["step"] == 2 + rows - 4
    falling = steps.rates[2:]
    assert falling == sorted(falling, reverse=True)
    planned = -(-rows // 2)
    last_step = 1 - (planned - 2) / (rows - 4)  # of the first schedule's steps, from its end
    assert falling[-1] == pytest.approx(
        lr_at(planned - 1 + last_step, planned, 0.1, runs.RECIPE["learning_rate"])
    )


def test_a_changed_run_is_resumed_exactly(tmp_path):
    for name, stop in (("whole", ()), ("run", ("--stop-at-step=4",))):
        runs.start(
            tmp_path / name,
            "--stop-at-step=3",
            **runs.SHORT | {"max_steps": 0, "epochs": 2, "data_fraction": 0.4},
        )
        changes = ["--allow-changes", "--batch-size=2", "--row-tokens=500"]
        runs.resume(tmp_path / name, *changes, *stop)
    assert state_of(tmp_path / "run")["repacked"] and state_of(tmp_path / "run")["schedule"]
    runs.resume(tmp_path / "run")
    assert checkpoints.diff(tmp_path / "whole", tmp_path / "run").identical


def test_rows_of_another_length_go_on_with_what_was_not_seen(steps, tmp_path):
    begin(tmp_path / "run", 3)
    runs.resume(tmp_path / "run", "--allow-changes", "--row-tokens=704")
    _, data = prepared()
    assert steps.conversations() == Counter(tuple(sample.input_ids) for sample in data.train)
    state = state_of(tmp_path / "run")
    assert state["step"] == state["total_steps"] == len(steps.windows) and state["epoch"] == 1


@pytest.mark.parametrize(("fraction", "more"), [(1.0, True), (0.3, False)])
def test_the_rows_done_count_where_the_data_grew_or_shrank(steps, tmp_path, fraction, more):
    rows = begin(tmp_path / "run", 3)
    runs.resume(tmp_path / "run", "--allow-changes", f"--data-fraction={fraction}")
    state = state_of(tmp_path / "run")
    assert (state["step"] > rows) == more and state["step"] == state["total_steps"]
    assert steps.rates[3] == lr_at(3, rows, 0.1, runs.RECIPE["learning_rate"])
    assert state["epoch"] == 1 and 0 < steps.rates[-1] < steps.rates[3]


def test_data_with_fewer_rows_than_were_done_are_used_up(steps, tmp_path):
    begin(tmp_path / "run", 7)
    with pytest.raises(PhiSightError, match="ends at step 7; ask for more --epochs"):
        runs.resume(tmp_path / "run", "--allow-changes", "--data-fraction=0.2")
    runs.resume(tmp_path / "run", "--allow-changes", "--data-fraction=0.2", "--epochs=2")
    assert state_of(tmp_path / "run")["epoch"] == 2


def test_more_epochs_have_the_schedule_of_the_longer_run(steps, tmp_path):
    rows = begin(tmp_path / "run", 3)
    runs.resume(tmp_path / "run", "--allow-changes", "--epochs=2")
    peak = runs.RECIPE["learning_rate"]
    assert steps.rates[3:] == [lr_at(step, 2 * rows, 0.1, peak) for step in range(3, 2 * rows)]


# -- a run that trains nothing --------------------------------------------------------------------


def said_warnings(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]


def test_a_run_of_one_step_trains(tmp_path, capsys):
    runs.start(tmp_path / "run", **runs.SHORT | {"max_steps": 1})
    [record] = read_metrics(tmp_path / "run/metrics.jsonl")
    assert record["lr"] == runs.RECIPE["learning_rate"]
    assert said_warnings(capsys) == []
    ups = [
        tensor
        for name, tensor in checkpoints.resolve(tmp_path / "run").state["lora_weights"].items()
        if name.endswith("lora_B")
    ]
    assert all(up.any() for up in ups)


@pytest.mark.parametrize("schedule", configs.SCHEDULES)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 2, 3, 20])
def test_every_run_has_a_rate_above_0(total, fraction, schedule):
    assert max(lr_at(step, total, fraction, 1.0, schedule) for step in range(total)) > 0


def test_three_steps_where_an_epoch_is_one_step(tmp_path):
    runs.start(tmp_path / "run", **runs.SHORT | {"max_steps": 3, "batch_size": 100, "log_steps": 1})
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["lr"] > 0 for record in records] == [False, True, True]
    assert records[0]["tokens"] == records[1]["tokens"] == records[2]["tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_steps": 1, "log_steps": 25},  # its only step is not one that is logged
        {"max_steps": 3, "log_steps": 25},
        {"max_steps": 3, "log_steps": 2},  # the last step is not measured, the one before is
        {"max_steps": 2, "log_steps": 1},
    ],
)
def test_weights_that_did_not_move_are_told_once_at_the_end_too(
    fields, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run_room, "assemble", assemble_with(cut_off))
    runs.start(tmp_path / "run", **runs.SHORT | fields)
    [warning] = said_warnings(capsys)
    assert "'projector' did not move" in warning


def test_a_rate_too_small_to_move_anything_is_told(tmp_path, capsys):
    runs.start(tmp_path / "run", **runs.SHORT | {"learning_rate": 1e-30, "log_steps": 25})
    said = said_warnings(capsys)
    # B begins at 0 and moves by any step; the projector's weights are too large for this one.
    assert len(said) == 1 and "'projector' did not move in any step" in said[0]


def test_text_alone_is_told_to_leave_the_projector_out(tmp_path, capsys):
    records = [{"instruction": f"Say {n}.", "input": "", "output": "two"} for n in range(8)]
    (tmp_path / "text.json").write_text(json.dumps(records))
    fields = runs.SHORT | {"data": tmp_path / "text.json", "validation_fraction": 0.0}
    runs.start(tmp_path / "run", **fields | {"log_steps": 25})
    [warning] = said_warnings(capsys)
    assert "no conversation that is trained on has a picture; --no-train-projector" in warning


def test_steps_that_were_all_skipped_are_told(tmp_path, capsys, monkeypatch):
    def overflowing(enabled: bool) -> LossScaler:
        return LossScaler(enabled, initial_scale=2.0**100)

    monkeypatch.setattr(run_room, "LossScaler", overflowing)
    runs.start(tmp_path / "run", **runs.SHORT | {"compute_type": "float16"})
    said = said_warnings(capsys)
    assert len(said) == 2 and all("did not move in any step" in line for line in said)


def test_a_resumed_run_that_moves_is_not_warned_of(tmp_path, capsys):
    runs.start(tmp_path / "run", "--stop-at-step=1", **runs.SHORT)
    runs.resume(tmp_path / "run")
    assert said_warnings(capsys) == []


def test_a_step_without_a_supervised_token_moves_nothing_and_is_logged():
    from test_train import Toy, toy_batch

    from training.optimizer import AdamW
    from training.step import train_step

    model = Toy()
    before = model.projector.weight.clone()
    result = train_step(
        model, AdamW(model.named_parameters()), LossScaler(False), [toy_batch(9)], 0.1, 1.0
    )
    assert isinstance(result, StepResult) and result.supervised_tokens == 0
    assert result.gradient_norm == 0 and torch.equal(model.projector.weight, before)
    progress = Progress()
    progress.add_step(result, seconds=1.0)
    loss, window = progress.take_window()
    assert loss != loss and window["supervised_tokens"] == 0
