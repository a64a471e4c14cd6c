"""The loop: a stopped, killed or interrupted run ends exactly where an uninterrupted one does, a
resume that would not be exact is refused, and a step means the same however it is cut."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import config as configs
import train
from data.collate import IGNORED, Batch, batch_of, collate
from data.features import FeatureStore
from data.prepare import TrainingData, prepare
from data.sampler import plan
from errors import PhiSightError
from model.build import Assembled, assemble
from model.vision import VisionTower
from reports.log import deterministic_part, read_metrics
from training import evaluating
from training import run as run_room
from training.batches import chunks
from training.exactness import check_place, check_same_run
from training.loss_scaler import LossScaler
from training.optimizer import AdamW
from training.progress import Progress
from training.rows import Rows
from training.schedule import lr_at
from training.signals import StopSignals
from training.step import StepResult, train_step

SHORT = runs.SHORT


def state_of(run: Path) -> dict:
    return checkpoints.resolve(run).trainer_state


def lasting(state: dict) -> dict:
    """A trainer state without what the clock decides."""
    window = {name: value for name, value in state["window"].items() if name != "seconds"}
    clock = ("saved_at", "metrics_offset", "window")
    return {name: value for name, value in state.items() if name not in clock} | {"window": window}


def assert_same_end(first: Path, second: Path) -> None:
    """Two runs of one recipe ended alike, to the bit."""
    a, b = checkpoints.resolve(first), checkpoints.resolve(second)
    assert a.step == b.step
    for stem in checkpoints.OWNERS:
        assert a.state[stem] and a.state[stem].keys() == b.state[stem].keys()
        for name, tensor in a.state[stem].items():
            assert torch.equal(tensor, b.state[stem][name]), f"{stem}: {name}"
    assert lasting(a.trainer_state) == lasting(b.trainer_state)
    logs = [
        [deterministic_part(record) for record in read_metrics(run / "metrics.jsonl")]
        for run in (first, second)
    ]
    assert logs[0] == logs[1] and len(logs[0]) > 2
    assert checkpoints.diff(first, second).identical


# -- stopped, killed, interrupted -----------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_stopped_and_resumed_run_ends_like_one_that_never_stopped(epoch, tmp_path, capsys):
    whole = runs.finished_run()
    steps = state_of(whole)["step"]
    inside_a_window = [s for s in range(2, steps - 1) if s % runs.RECIPE["log_steps"]]
    stop = next(s for s in inside_a_window if s > epoch * steps // 2)
    run = tmp_path / "run"
    capsys.readouterr()
    assert runs.start(run, f"--stop-at-step={stop}") == 0
    assert f"stopped at step {stop} of {steps}" in capsys.readouterr().out
    stopped = state_of(run)
    assert (stopped["step"], stopped["epoch"]) == (stop, epoch)
    assert stopped["window"] and not stopped["finished"]
    assert runs.resume(run) == 0
    assert f"resumed at step {stop} of {steps}" in capsys.readouterr().out
    assert_same_end(whole, run)


def test_a_killed_and_resumed_run_ends_like_one_that_never_was(tmp_path):
    run = tmp_path / "run"
    process = runs.started("train.py", *runs.flags(run))
    runs.wait_until(lambda: checkpoints.checkpoints_in(run), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not state_of(run)["finished"]

    done = runs.command("train.py", "--resume", "--run", run)
    assert done.returncode == 0, done.stderr
    assert_same_end(runs.finished_run(), run)
    compared = runs.command("checkpoints.py", "diff", runs.finished_run(), run)
    assert compared.returncode == 0 and compared.stdout.startswith("identical"), compared
    assert compared.stderr == ""


def test_diff_as_json(tmp_path, capsys):
    finished = str(runs.finished_run())
    capsys.readouterr()
    assert checkpoints.main(["diff", finished, finished, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True


def test_a_run_with_another_seed_differs(tmp_path, capsys):
    runs.start(tmp_path / "other", "--stop-at-step=1", **SHORT, seed=1)
    stopped = runs.stopped_run()
    capsys.readouterr()
    assert checkpoints.main(["diff", str(stopped), str(tmp_path / "other"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] is False
    assert {"lora", "projector", "optimizer", "rng"} <= {d["owner"] for d in found["differences"]}


def test_a_run_starts_alike_whether_its_features_are_stored_yet_or_not(tmp_path):
    stopped = runs.stopped_run()
    runs.start(tmp_path / "run", "--stop-at-step=1", **SHORT, features=tmp_path / "features")
    differences = checkpoints.diff(stopped, tmp_path / "run").differences
    assert [found["name"] for found in differences] == ["config.features"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_in_hand_and_says_how_to_go_on(number, tmp_path):
    run = tmp_path / "a run"  # its name must be quoted in the command that is printed
    process = runs.started(
        "train.py", *runs.flags(run, log_steps=1, save_steps=10_000, epochs=200, evaluate_steps=0)
    )
    log = run / "metrics.jsonl"
    runs.wait_until(lambda: log.exists() and log.stat().st_size > 0, process)
    logged = len(read_metrics(log))
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    step = runs.newest_step(run)
    assert step == len(read_metrics(log)) and step - logged < 20  # of well over a thousand
    last = said.splitlines()[-1]
    assert last.startswith(f"stopped at step {step} of ")
    assert last.endswith(f"go on with: python train.py --resume --run '{run}'")
    assert runs.resume(run, f"--stop-at-step={step + 1}") == 0
    assert runs.newest_step(run) == step + 1


def test_a_second_interrupt_stops_at_once():
    former = signal.getsignal(signal.SIGINT)  # ignored, where a shell started the tests with `&`
    with StopSignals() as stop:
        stop._ask(signal.SIGTERM, None)
        stop._ask(signal.SIGTERM, None)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            stop._ask(signal.SIGINT, None)
    assert signal.getsignal(signal.SIGINT) is former


# -- how long a run is, and what it sees ----------------------------------------------------------


class Steps:
    """Stands in for `train_step`: computes nothing, remembers what it was given."""

    def __init__(self) -> None:
        self.windows: list[list[Batch]] = []
        self.rates: list[float] = []

    def __call__(
        self, model, optimizer, scaler, batches, rate, max_norm, measure_updates, ranks
    ) -> StepResult:
        self.windows.append(batches)
        self.rates.append(rate)
        supervised = sum(batch.supervised_tokens for batch in batches)
        tokens = sum(batch.tokens for batch in batches)
        places = sum(batch.input_ids.numel() for batch in batches)
        return StepResult(float(supervised), supervised, tokens, places, 1.0, {}, False, None)

    def conversations(self) -> Counter:
        """How often each conversation was seen, by its ids."""
        return Counter(
            tuple(row_ids[row_segments == segment].tolist())
            for batches in self.windows
            for batch in batches
            for row_ids, row_segments in zip(batch.input_ids, batch.segment_ids, strict=True)
            for segment in range(1, int(row_segments.max()) + 1)
        )


@pytest.fixture
def steps(monkeypatch) -> Steps:
    prepared()
    runs.finished_run()
    steps = Steps()
    monkeypatch.setattr(train, "train_step", steps)
    return steps


def test_each_epoch_sees_every_conversation_once_and_ends_with_a_partial_step(steps, tmp_path):
    _, data = prepared()
    expected = Counter(tuple(sample.input_ids) for sample in data.train)
    lengths = [len(sample.input_ids) for sample in data.train]
    planned = len(plan(0, 0, lengths, runs.RECIPE["row_tokens"]))
    assert planned < len(data.train), "several conversations share a row"
    full = next(size for size in (3, 4, 5, 6, 7) if planned % size)  # leaves a remainder
    runs.start(tmp_path / "run", evaluate_steps=0, accumulation=full)
    assert steps.conversations() == Counter({ids: 2 * n for ids, n in expected.items()})
    rows = [sum(len(batch.input_ids) for batch in window) for window in steps.windows]
    epoch_end = -(-planned // full) - 1
    assert set(rows[:epoch_end]) == {full} and 0 < rows[epoch_end] < full
    state = state_of(tmp_path / "run")
    assert (state["step"], state["epoch"], state["row"]) == (len(rows), 2, 0)
    assert state["finished"] == "all steps done"


def test_the_epochs_come_in_different_orders_and_another_seed_in_another(steps, tmp_path):
    def order(windows: list[list[Batch]]) -> list[list]:
        return [batch.input_ids.tolist() for window in windows for batch in window]

    runs.start(tmp_path / "first", evaluate_steps=0)
    first = order(steps.windows)
    assert first[: len(first) // 2] != first[len(first) // 2 :]
    steps.windows.clear()
    runs.start(tmp_path / "same", evaluate_steps=0)
    assert order(steps.windows) == first
    steps.windows.clear()
    runs.start(tmp_path / "other", evaluate_steps=0, seed=1)
    assert order(steps.windows) != first


def test_max_steps_ends_the_run_and_stretches_the_schedule(steps, tmp_path):
    runs.start(tmp_path / "run", max_steps=5, evaluate_steps=0, warmup_fraction=0.4)
    peak = runs.RECIPE["learning_rate"]
    assert steps.rates == [lr_at(step, 5, 0.4, peak) for step in range(5)]
    state = state_of(tmp_path / "run")
    assert (state["step"], state["total_steps"], state["finished"]) == (5, 5, "all steps done")


def test_steps_beyond_the_epochs_go_through_the_data_again(steps, tmp_path, capsys):
    _, data = prepared()
    rows = len(plan(0, 0, data.train.lengths, runs.RECIPE["row_tokens"]))
    runs.start(tmp_path / "run", max_steps=3, evaluate_steps=0, epochs=1, accumulation=rows)
    seen = Counter(tuple(sample.input_ids) for sample in data.train)
    assert steps.conversations() == Counter({ids: 3 * n for ids, n in seen.items()})
    state = state_of(tmp_path / "run")
    assert (state["step"], state["epoch"], state["row"]) == (3, 3, 0)
    assert state["finished"] == "all steps done" and state["total_steps"] == 3
    assert "--max-steps 3: the data are gone through about 3.0 times" in capsys.readouterr().out
    first, second = (steps.windows[number][0].input_ids.tolist() for number in (0, 1))
    assert first != second, "each time in another order"


def test_the_log_adds_up_to_all_that_was_trained_on(steps, tmp_path):
    runs.start(tmp_path / "run", evaluate_steps=0, log_steps=3)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    batches = [batch for window in steps.windows for batch in window]
    for name in ("tokens", "supervised_tokens"):
        assert sum(r[name] for r in records) == sum(getattr(batch, name) for batch in batches)
    assert records[-1]["step"] == len(steps.windows)


def test_early_stopping_counts_evaluations_across_a_resume(steps, tmp_path, capsys, monkeypatch):
    losses = iter([2.0, 1.0, 1.5, 1.0, 0.5])
    monkeypatch.setattr(
        evaluating.meter, "evaluate", lambda *_: {"validation_loss": next(losses), "alignment": {}}
    )
    run = tmp_path / "run"
    runs.start(run, "--stop-at-step=3", evaluate_steps=1, early_stopping=2)
    assert state_of(run)["evaluations_without_better"] == 1
    runs.resume(run)
    state = state_of(run)
    assert (state["step"], state["best_loss"]) == (4, 1.0)  # an equal loss is no better one
    assert "early stopping" in state["finished"] and "in 2 evaluations" in state["finished"]
    assert "finished at step 4: early stopping" in capsys.readouterr().out
    assert runs.resume(run) == 0 and state_of(run) == state


def test_no_early_stopping_unless_asked(steps, tmp_path, monkeypatch):
    rising = iter(range(1, 100))
    monkeypatch.setattr(
        evaluating.meter,
        "evaluate",
        lambda *_: {"validation_loss": float(next(rising)), "alignment": {}},
    )
    runs.start(tmp_path / "run", evaluate_steps=1, max_steps=6)
    assert state_of(tmp_path / "run")["step"] == 6


def test_checkpoints_come_every_save_steps_and_at_the_end(steps, tmp_path):
    runs.start(tmp_path / "run", max_steps=5, save_steps=2, keep_checkpoints=9, evaluate_steps=0)
    saved = [path.name for path in checkpoints.checkpoints_in(tmp_path / "run")]
    assert saved == ["checkpoint-000002", "checkpoint-000004", "checkpoint-000005"]
    assert (tmp_path / "run/curves.png").is_file()


# -- one step -------------------------------------------------------------------------------------


@functools.cache
def prepared() -> tuple[Assembled, TrainingData]:
    """The recipe's model without dropout, and its data."""
    config, _ = train.parse(runs.flags(runs.shared() / "never-made", lora_dropout=0.0))
    parts = assemble(config)
    return parts, prepare(
        config, parts.chat_format, store(), lambda: VisionTower(parts.vision), positions=2048
    )


@functools.cache
def store() -> FeatureStore:
    config, _ = train.parse(runs.flags(runs.shared() / "never-made", lora_dropout=0.0))
    vision = assemble(config).vision
    return FeatureStore(config.features, vision.key, vision.shape)


class Recorder(AdamW):
    """Keeps the gradients that it is given and changes nothing."""

    def step(self, learning_rate: float) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.parameters.items()}


def test_a_step_does_not_depend_on_how_its_window_is_cut():
    parts, data = prepared()
    samples = sorted(data.train, key=lambda s: sum(s.supervised))
    samples = [samples[0], samples[-1], samples[1], samples[-2]]  # short and long answers by turns
    found = []
    for size in (4, 2, 1):
        batches = [
            collate(
                [[s] for s in chunk],
                store().features_of,
                parts.chat_format.padding_id,
                parts.chat_format.image_id,
                store().shape,
            )
            for chunk in chunks(samples, size)
        ]
        counts = [batch.supervised_tokens for batch in batches]
        recorder = Recorder(parts.model.trainable())
        result = train_step(
            parts.model.train(), recorder, LossScaler(False), batches, 1.0, max_norm=1e9
        )
        found.append((result, recorder.gradients))
    assert len(set(counts)) > 1, "unequal answers, or a mean of means would pass too"
    whole, gradients = found[0]
    assert whole.gradient_norm > 0 and set(whole.gradient_norms) == {"lora", "projector"}
    for result, others in found[1:]:
        assert result.supervised_tokens == whole.supervised_tokens
        assert result.loss_sum == pytest.approx(whole.loss_sum, rel=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5)


class Toy(torch.nn.Module):
    """Loss: the weight times the sum of the supervised ids, so that the gradient is known."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.projector = torch.nn.Linear(1, 1, bias=False)
        self.factor = factor

    def forward(self, batch: Batch) -> tuple[torch.Tensor, int]:
        chosen = batch.input_ids[batch.labels != IGNORED].float()
        return (self.projector.weight * chosen).sum() * self.factor, len(chosen)


def toy_batch(*ids: int) -> Batch:
    """All ids but the first are supervised."""
    row = torch.tensor([ids])
    labels = row.clone()
    labels[:, 0] = IGNORED
    no_pictures = torch.zeros(0, 1, 1)
    return batch_of(row, labels, torch.zeros_like(row), torch.ones_like(row), no_pictures, -1)


def test_the_sum_is_divided_by_the_tokens_of_the_whole_window():
    model = Toy()
    optimizer = AdamW(model.named_parameters())
    window = [toy_batch(9, 1), toy_batch(9, 2, 3, 4, 5)]
    result = train_step(model, optimizer, LossScaler(False), window, 0.1, max_norm=100.0)
    assert result.supervised_tokens == 5
    assert result.gradient_norm == pytest.approx((1 + 2 + 3 + 4 + 5) / 5)
    assert result.gradient_norms == {"projector": pytest.approx(3.0)}
    assert model.projector.weight.grad is None, "nothing is carried into the next window"
    assert optimizer.step_count == 1 and not result.skipped


def test_an_overflow_skips_the_step_and_lowers_the_scale():
    model = Toy()
    optimizer = AdamW(model.named_parameters())
    before = model.projector.weight.clone()
    scaler = LossScaler(True, initial_scale=2.0**127)
    overflow, fine = [toy_batch(0, 3, 3)], [toy_batch(0, 1)]
    result = train_step(model, optimizer, scaler, overflow, 0.1, 1.0, measure_updates=True)
    assert result.skipped and result.update_norms == {"projector": 0.0}
    assert torch.equal(model.projector.weight, before) and optimizer.step_count == 0
    assert scaler.scale == 2.0**126 and model.projector.weight.grad is None
    result = train_step(model, optimizer, scaler, fine, 0.1, 1.0, measure_updates=True)
    assert not result.skipped and result.update_norms["projector"] > 0
    assert optimizer.step_count == 1 and scaler.growth_tracker == 1


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_diverged_loss_stops_before_it_spoils_the_weights(factor):
    model = Toy(factor)
    before = model.projector.weight.clone()
    optimizer = AdamW(model.named_parameters())
    with pytest.raises(PhiSightError, match="diverged.*--learning-rate"):
        train_step(model, optimizer, LossScaler(False), [toy_batch(0, 1)], 0.1, 1.0)
    assert torch.equal(model.projector.weight, before) and optimizer.step_count == 0


def assemble_with(change):
    """`assemble`, and then a change to the model."""

    def changed(config) -> Assembled:
        parts = assemble(config)
        change(parts.model)
        return parts

    return changed


def freeze(model) -> None:
    model.projector.requires_grad_(False)


def cut_off(model) -> None:
    """The projector is trainable and gets no gradient, as when its output is computed under
    `no_grad`."""
    model.projector.forward = torch.no_grad()(model.projector.forward)


@pytest.mark.parametrize(
    ("change", "warning"),
    [(freeze, "'projector' are frozen"), (cut_off, "'projector' did not move")],
)
def test_a_projector_that_stays_as_it_is_is_warned_of(
    change, warning, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run_room, "assemble", assemble_with(change))
    fields = SHORT | {"max_steps": 1, "log_steps": 1, "warmup_fraction": 0.0}
    runs.start(tmp_path / "run", **fields)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(said) == 1 and warning in said[0]


def test_a_learning_rate_of_zero_is_no_cause_for_a_warning(tmp_path, capsys):
    fields = SHORT | {"log_steps": 1, "warmup_fraction": 0.5}
    runs.start(tmp_path / "run", **fields)
    assert "warning" not in capsys.readouterr().out
    first, second = read_metrics(tmp_path / "run/metrics.jsonl")
    assert first["lr"] == 0 and set(first["update_norms"].values()) == {0}
    assert second["lr"] > 0 and all(moved > 0 for moved in second["update_norms"].values())


# -- half precision -------------------------------------------------------------------------------


def test_float16_trains_under_a_loss_scaler_whose_state_is_resumed(tmp_path):
    fields = SHORT | {"compute_type": "float16", "log_steps": 1}
    whole, run = tmp_path / "whole", tmp_path / "run"
    runs.start(whole, **fields)
    runs.start(run, "--stop-at-step=1", **fields)
    scaler = state_of(run)["loss_scaler"]
    assert scaler["enabled"] and scaler["growth_tracker"] == 1
    runs.resume(run)
    assert state_of(run)["loss_scaler"]["growth_tracker"] == 2
    assert checkpoints.diff(whole, run).identical
    assert checkpoints.resolve(run).config["compute_dtype"] == "float16"


def test_skipped_steps_are_counted_and_move_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_room, "LossScaler", functools.partial(LossScaler, initial_scale=2.0**100)
    )
    run = tmp_path / "run"
    runs.start(run, **SHORT | {"compute_type": "float16", "log_steps": 2})
    checkpoint = checkpoints.resolve(run)
    assert checkpoint.trainer_state["loss_scaler"]["scale"] == 2.0**98
    assert checkpoint.state["optimizer"]["step"] == 0
    assert [r["skipped_steps"] for r in read_metrics(run / "metrics.jsonl")] == [2]
    ups = [t for n, t in checkpoint.state["lora_weights"].items() if n.endswith("lora_B")]
    assert ups and not any(up.any() for up in ups)


def test_bfloat16_needs_no_loss_scaler(tmp_path):
    run = tmp_path / "run"
    runs.start(run, **SHORT | {"compute_type": "bfloat16"})
    assert state_of(run)["loss_scaler"]["enabled"] is False
    state = checkpoints.resolve(run).state
    assert {t.dtype for t in state["lora_weights"].values()} == {torch.float32}


# -- what a resume refuses ------------------------------------------------------------------------


def refusal(run: Path, *more: str) -> str:
    """The message of a resume that is refused and changes nothing."""
    before = runs.contents(run)
    with pytest.raises(PhiSightError) as error:
        runs.resume(run, *more)
    assert runs.contents(run) == before
    return str(error.value)


def test_a_changed_flag_is_refused_by_name_and_allowed_on_request(tmp_path, capsys):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    message = refusal(run, "--batch-size", "3", "--learning-rate", "0.5")
    assert "config.batch_size: 1 in the checkpoint, 3 now" in message
    assert "config.learning_rate" in message and "--allow-changes" in message
    capsys.readouterr()
    assert runs.resume(run, "--batch-size", "3", "--allow-changes") == 0
    said = capsys.readouterr().out
    assert "warning: the resumed run is not exact" in said and "config.batch_size" in said
    assert checkpoints.resolve(run).config["config"]["batch_size"] == 3
    assert state_of(run)["finished"]


def rows_of(lengths: list[int], **fields: int) -> Rows:
    config = configs.default_config()
    return Rows(configs.replace(config, row_tokens=10, **fields), lengths)


@pytest.mark.parametrize(
    ("step", "epoch", "row", "max_steps"), [(9, 0, 1, 9), (2, 2, 0, 0), (2, 1, 3, 0)]
)
def test_a_place_beyond_the_changed_run_is_refused(step, epoch, row, max_steps):
    rows = rows_of([10, 10, 10], batch_size=1, epochs=2, max_steps=max_steps)
    progress = Progress(step, *rows.place(epoch, row))
    with pytest.raises(PhiSightError, match="ask for more --epochs or --max-steps"):
        check_place(progress, rows.total_steps(progress.step, progress.epoch, progress.row))
    assert rows.total_steps(8, 1, 2) == 9
    check_place(Progress(8, 1, 2), 9)


def test_a_changed_run_that_would_end_before_its_place_is_refused(tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    message = refusal(run, "--max-steps", "1", "--allow-changes")
    assert "the changed run ends at step 1" in message


def test_smaller_steps_after_a_change_end_with_the_rows(tmp_path):
    run = tmp_path / "run"
    fields = runs.SHORT | {"accumulation": 2, "max_steps": 0, "epochs": 1}
    runs.start(run, "--stop-at-step", "1", **fields)
    assert runs.resume(run, "--accumulation", "1", "--allow-changes") == 0
    state = state_of(run)
    assert state["finished"] and state["step"] == state["total_steps"]
    assert (state["epoch"], state["row"]) == (1, 0)


def test_a_negative_stop_is_refused(tmp_path):
    with pytest.raises(PhiSightError, match="--stop-at-step -1"):
        runs.start(tmp_path / "run", "--stop-at-step", "-1")


def test_training_tells_cublas_to_be_deterministic(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back after the test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(PhiSightError):
        runs.start(tmp_path / "run", base="./gone")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_fields_that_change_nothing_may_change(tmp_path, capsys):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    capsys.readouterr()
    assert runs.resume(run, "--save-steps", "7", "--keep-checkpoints", "1") == 0
    assert "warning" not in capsys.readouterr().out
    assert len(checkpoints.checkpoints_in(run)) == 1


def test_another_base_is_refused(tmp_path):
    base, run = Path(shutil.copytree(runs.BASE, tmp_path / "base")), tmp_path / "run"
    runs.start(run, "--stop-at-step=1", **SHORT | {"base": base})
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    message = refusal(run)
    assert "base_fingerprint" in message and "data_fingerprint" not in message


def test_other_data_is_refused(tmp_path):
    data, run = tmp_path / "data.json", tmp_path / "run"
    shutil.copy(runs.world() / "train.json", data)
    runs.start(run, "--stop-at-step=1", **SHORT | {"data": data, "data_fraction": 1.0})
    records = json.loads(data.read_text())
    records[0]["conversations"][-1]["value"] += " indeed"
    data.write_text(json.dumps(records))
    message = refusal(run)
    assert "data_fingerprint" in message and "base_fingerprint" not in message


@pytest.mark.parametrize(
    "field",
    [
        "base_fingerprint",
        "tokenizer_fingerprint",
        "vision_fingerprint",
        "data_fingerprint",
        "compute_dtype",
        "device",
        "threads",
        "total_steps",
        "versions.torch",
        "versions.phisight_arithmetic",
        "config.seed",
        "config.epochs",
    ],
)
def test_every_fact_that_exactness_rests_on_is_compared(field, capsys):
    saved = checkpoints.resolve(runs.stopped_run()).config
    check_same_run(saved, saved, allow_changes=False)
    current = json.loads(json.dumps(saved))
    *path, last = field.split(".")
    functools.reduce(dict.__getitem__, path, current)[last] = "something else"
    with pytest.raises(PhiSightError, match=f"{field}: "):
        check_same_run(saved, current, allow_changes=False)
    capsys.readouterr()
    check_same_run(saved, current, allow_changes=True)
    assert f"warning: the resumed run is not exact, these differ: {field}: " in (
        capsys.readouterr().out
    )


def test_a_checkpoint_of_code_that_rounded_otherwise_is_not_gone_on_with_in_silence(capsys):
    """What was written before the code said how it rounds."""
    current = checkpoints.resolve(runs.stopped_run()).config
    saved = json.loads(json.dumps(current))
    del saved["versions"]["phisight_arithmetic"]
    with pytest.raises(PhiSightError, match='phisight_arithmetic: "before .*--allow-changes'):
        check_same_run(saved, current, allow_changes=False)
    check_same_run(saved, current, allow_changes=True)
    assert 'phisight_arithmetic: "before' in capsys.readouterr().out


def test_a_run_that_has_a_checkpoint_is_not_started_anew_by_accident(tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    before = runs.contents(run)
    with pytest.raises(PhiSightError, match="checkpoint-000001 already.*--resume.*--overwrite"):
        runs.start(run, **SHORT)
    with pytest.raises(PhiSightError, match="no such file"):  # overwriting waits for good inputs
        runs.start(run, "--overwrite", **SHORT | {"data": tmp_path / "missing.json"})
    assert runs.contents(run) == before
    assert runs.start(run, "--overwrite", **SHORT) == 0
    assert [p.name for p in checkpoints.checkpoints_in(run)] == ["checkpoint-000002"]


def test_resume_without_a_checkpoint_is_one_line(tmp_path):
    done = runs.command("train.py", "--resume", "--run", tmp_path / "none")
    assert "no checkpoint in " in runs.assert_one_line_error(done)
    assert not (tmp_path / "none").exists()


def test_resume_if_any_starts_and_then_resumes(tmp_path, capsys):
    run = tmp_path / "run"
    runs.start(run, "--resume-if-any", "--stop-at-step=1", **SHORT)
    capsys.readouterr()
    runs.start(run, "--resume-if-any", **SHORT)
    assert "resumed at step 1" in capsys.readouterr().out and state_of(run)["finished"]


def damage(checkpoint: Path) -> None:
    path = checkpoint / "lora_weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    whole = runs.finished_run()
    run = runs.copy_of(whole, tmp_path)
    older, newest = checkpoints.checkpoints_in(run)
    damage(newest)
    capsys.readouterr()
    assert runs.resume(run) == 0
    said = capsys.readouterr()
    assert f"warning: {newest} is not used: lora_weights.safetensors" in said.err
    assert f"resumed at step {int(older.name[-6:])}" in said.out
    assert_same_end(whole, run)


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    damage(checkpoints.checkpoints_in(run)[0])
    assert "no checkpoint is intact" in refusal(run)


def test_a_log_that_is_not_the_runs_own_is_refused(tmp_path):
    run = runs.copy_of(runs.finished_run(), tmp_path)
    older, newest = checkpoints.checkpoints_in(run)
    shutil.rmtree(newest)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(PhiSightError, match="metrics.jsonl.*put back the log"):
        runs.resume(run)


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    run = runs.copy_of(runs.finished_run(), tmp_path)
    before = runs.contents(run)
    capsys.readouterr()
    assert runs.resume(run) == 0
    said = capsys.readouterr().out
    assert said == (
        f"{run}: finished at step {runs.newest_step(run)} (all steps done);"
        f" ask it with: python infer.py --run {run}\n"
    )
    assert runs.contents(run) == before


# -- bad records ----------------------------------------------------------------------------------


def good_and_bad_records(folder: Path) -> Path:
    """A data file with records that cannot be used; the rest is the picture world's."""
    records = json.loads((runs.world() / "train.json").read_text())[:20]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A star."}]
    endless = [turns[0], {"from": "gpt", "value": "star " * 2000}]
    bad = [
        {"id": "gone", "image": "no-such-picture.png", "conversations": turns},
        {"id": "unanswered", "image": records[0]["image"], "conversations": turns[:1]},
        {"id": "outside", "image": "../secret.png", "conversations": turns},
        {"id": "endless", "image": records[0]["image"], "conversations": endless},
        "no record at all",
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(records[:10] + bad + records[10:]))
    return path


def test_bad_records_are_set_aside_with_reasons_and_counted(tmp_path, capsys):
    data, run = good_and_bad_records(tmp_path), tmp_path / "run"
    runs.start(run, **SHORT | {"data": data, "data_fraction": 1.0})
    said = capsys.readouterr().out
    assert "5 records quarantined, 0 shortened" in said
    kinds = "2 malformed, 1 no supervised token, 1 missing or broken picture, 1 too long"
    assert (
        f"warning: 5 records quarantined ({kinds}), reasons in {run / 'quarantine.jsonl'}" in said
    )
    entries = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    reasons = {entry["id"]: entry["reason"] for entry in entries}
    assert len(entries) == 5
    for identity, reason in (
        ("gone", "no-such-picture.png"),
        ("unanswered", "no assistant turn"),
        ("outside", "outside the image folder"),
        ("endless", "text tokens"),
        ("", "not an object"),
    ):
        assert reason in reasons[identity]


def test_strict_stops_at_the_first_bad_record(tmp_path):
    data, run = good_and_bad_records(tmp_path), tmp_path / "run"
    with pytest.raises(PhiSightError, match="data.json record 12: .*no assistant turn"):
        runs.start(run, "--strict", **SHORT | {"data": data})
    assert not checkpoints.checkpoints_in(run)
