"""A gradient that jumps: told of, undone on request, and the same run however it was stopped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from rollbacks import (
    FIELDS,
    JUMPED,
    POISON,
    SAVED,
    SKIPPED,
    assert_same_run,
    assert_same_weights,
    log_of,
    poison,
    went_back,
)
from test_hostile_run import edit, newest

import checkpoints
from errors import PhiSightError
from reports.alerts import alerts_of
from reports.compare import parting
from reports.curves import points
from reports.log import without_abandoned
from reports.watching import run_status
from training import rollback

# -- what a rollback is ---------------------------------------------------------------------------


def test_a_rollback_is_the_checkpoint_gone_on_with_behind_the_rows_that_it_skips(tmp_path):
    [record] = [r for r in log_of(went_back()) if r["kind"] == "rollback"]
    assert (record["from_step"], record["to_step"]) == (JUMPED, SAVED)
    assert record["skipped"] == {
        "from": {"epoch": 0, "row": SAVED},
        "to": {"epoch": 0, "row": JUMPED},
        "rows": SKIPPED,
    }
    state = checkpoints.resolve(went_back()).trainer_state
    assert (state["step"], state["row"]) == (14, 14 + SKIPPED)
    assert (state["rollbacks"], state["rollback_step"]) == (1, None)

    # The reference never meets the poison: it is told to go on behind it.
    told = tmp_path / "told"
    with poison({}):
        runs.start(told, f"--stop-at-step={SAVED}", **FIELDS)
        edit(newest(told), "trainer_state.json", lambda s: s.update(row=JUMPED, rollbacks=1))
        runs.resume(told)
    assert_same_weights(went_back(), told)
    assert without_alerts(log_of(went_back())) == without_alerts(log_of(told))


def without_alerts(records: list[dict]) -> list[dict]:
    kept = [r for r in without_abandoned(records) if r["kind"] not in ("alert", "rollback")]
    return [{k: v for k, v in record.items() if k != "chain"} for record in kept]


def test_without_max_steps_the_run_is_shorter_and_its_rate_ends_where_it_would(tmp_path):
    fields = FIELDS | {"max_steps": 0, "epochs": 1}
    with poison({}):
        runs.start(tmp_path / "whole", **fields)
    with poison(POISON):
        runs.start(tmp_path / "back", **fields)
    whole, back = (checkpoints.resolve(tmp_path / name) for name in ("whole", "back"))
    assert whole.step > JUMPED + 2 and back.step == whole.step - SKIPPED
    assert back.config["total_steps"] == back.trainer_state["total_steps"] == back.step
    assert (back.trainer_state["epoch"], back.trainer_state["row"]) == (1, 0)
    rates = [
        [r["lr"] for r in without_abandoned(log_of(tmp_path / name)) if r["kind"] == "train"]
        for name in ("whole", "back")
    ]
    assert rates[1][:4] == rates[0][:4] and rates[1][1:] == sorted(rates[1][1:], reverse=True)
    assert 0 < rates[1][-1] < 2 * rates[0][-1] < rates[0][3]

    with poison(POISON):  # the schedule and the number of steps are found again
        runs.start(tmp_path / "run", f"--stop-at-step={SAVED + 1}", **fields)
        runs.resume(tmp_path / "run")
    assert_same_run(tmp_path / "back", tmp_path / "run")


def test_a_jump_in_the_last_step_ends_the_run_at_its_checkpoint(tmp_path):
    fields = FIELDS | {"max_steps": 0, "epochs": 1, "save_steps": 3, "log_steps": 50}
    with poison({}):
        runs.start(tmp_path / "whole", **fields)
    last = checkpoints.resolve(tmp_path / "whole").step - 1
    step = last // 3 * 3
    for every in (50, step):
        run = tmp_path / f"every-{every}"
        with poison({f"0/{last}": 1e6}):
            runs.start(run, **fields | {"evaluate_steps": every})
        ended = checkpoints.resolve(run)
        assert ended.step == step and ended.trainer_state["finished"] == "all steps done"
        assert not any(checkpoints.verify_run(run).values())
        # What it ends with is evaluated, as that of every run, and once.
        kept = without_abandoned(log_of(run))
        assert [r["step"] for r in kept if r["kind"] == "evaluation"] == [step]
        assert ended.trainer_state["best_step"] == step
        assert (run_status(run).step, run_status(run).total_steps) == (step, step)


# -- the same run, however it was stopped ---------------------------------------------------------


@pytest.mark.parametrize("stop", [SAVED + 2, JUMPED + 1])
def test_a_run_that_was_stopped_goes_back_as_one_that_was_not(stop, tmp_path):
    run = tmp_path / "run"
    with poison(POISON):
        runs.start(run, f"--stop-at-step={stop}", **FIELDS)
        assert runs.newest_step(run) == stop
        runs.resume(run)
    assert_same_run(went_back(), run)


def test_saves_by_the_clock_change_nothing_and_those_that_were_undone_go(tmp_path):
    run = tmp_path / "run"
    with poison(POISON):
        runs.start(run, "--stop-at-step=9", **FIELDS, save_every_minutes=1e-9, keep_checkpoints=3)
        assert runs.newest_step(run) == 9
        runs.resume(run)
    assert_same_weights(went_back(), run)
    assert log_of(went_back()) == log_of(run)
    assert not any(checkpoints.verify_run(run).values())


# -- a warning, a limit, and what cannot be undone ------------------------------------------------


def alerts_in(run: Path) -> list[tuple]:
    return [(entry["step"], entry["alert"]) for entry in alerts_of(log_of(run))]


def test_a_spike_is_told_of_once_until_it_ceases(tmp_path, capsys):
    with poison({"0/5": 1e6, "0/6": 1e6, "0/8": 1e6}):
        runs.start(tmp_path / "run", **FIELDS | {"on_spike": "warn", "max_steps": 10})
    assert alerts_in(tmp_path / "run") == [(6, "gradient_spike"), (9, "gradient_spike")]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert [line[:16] for line in said] == ["warning: step 6:", "warning: step 9:"]


def test_nothing_is_looked_at_unless_asked(tmp_path, capsys):
    with poison({"0/5": 1e6}):
        runs.start(tmp_path / "run", **FIELDS | {"on_spike": "none", "max_steps": 7})
    assert alerts_in(tmp_path / "run") == [] and "warning" not in capsys.readouterr().out
    assert checkpoints.resolve(tmp_path / "run").trainer_state["recent_norms"] == []


def test_before_the_first_checkpoint_a_spike_is_told_of_and_the_run_goes_on(tmp_path, capsys):
    with poison({"0/4": 1e6}):
        runs.start(tmp_path / "run", **FIELDS | {"save_steps": 50, "max_steps": 6})
    assert alerts_in(tmp_path / "run") == [(5, "gradient_spike")]
    assert "no checkpoint of --save-steps to go back to yet" in capsys.readouterr().out
    assert runs.newest_step(tmp_path / "run") == 6


def test_a_run_does_not_go_back_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(rollback, "MOST_ROLLBACKS", 2)
    with poison({f"0/{row}": 1e6 for row in range(9, 40)}):
        with pytest.raises(PhiSightError, match="after the run went back 2 times .* --on-spike"):
            runs.start(tmp_path / "run", **FIELDS)
    told = [alert for _, alert in alerts_in(tmp_path / "run")]
    assert told == ["gradient_spike", "rollback"] * 2 + ["gradient_spike"]
    assert runs.newest_step(tmp_path / "run") == SAVED


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_logged_and_stops_or_goes_back(factor, tmp_path):
    with poison({"0/10": factor}):
        with pytest.raises(PhiSightError, match="training has diverged"):
            runs.start(tmp_path / "run", **FIELDS | {"on_spike": "warn"})
        runs.start(tmp_path / "back", **FIELDS)
    assert alerts_in(tmp_path / "run") == [(JUMPED, "loss_not_finite")]
    assert runs.newest_step(tmp_path / "run") in (SAVED, 10)
    assert alerts_in(tmp_path / "back") == [(JUMPED, "loss_not_finite"), (JUMPED, "rollback")]
    assert_same_weights(went_back(), tmp_path / "back")


def test_a_damaged_checkpoint_to_go_back_to_is_named(tmp_path):
    run = tmp_path / "run"
    with poison(POISON):
        runs.start(run, f"--stop-at-step={SAVED + 2}", **FIELDS)
        saved = run / f"checkpoint-{SAVED:06d}"
        (saved / "rng.safetensors").write_bytes(b"")
        with pytest.raises(PhiSightError, match=f"checkpoint-{SAVED:06d}"):
            runs.resume(run)


def test_save_steps_may_change_unless_a_rollback_depends_on_them(tmp_path):
    with poison({}):
        for on_spike in ("warn", "rollback"):
            run = tmp_path / on_spike
            fields = FIELDS | {"on_spike": on_spike, "max_steps": 3}
            runs.start(run, "--stop-at-step=2", **fields)
        assert runs.resume(tmp_path / "warn", "--save-steps=3") == 0
        with pytest.raises(PhiSightError, match="save_steps: 4 in the checkpoint, 3 now"):
            runs.resume(run, "--save-steps=3")


def test_a_run_of_before_goes_on_as_it_would_have(tmp_path, capsys):
    """Its checkpoint knows nothing of samples, spikes and alerts: its log gets none."""
    fields = FIELDS | {"on_spike": "none", "evaluation_samples": 0}
    new = ("recent_norms", "standing_alerts", "rollback_step", "rollback_best", "rollbacks")

    def make_old(state: dict) -> None:
        for name in new:
            del state[name]

    def without_new_fields(config: dict) -> None:
        for name in ("on_spike", "evaluation_samples"):
            del config["config"][name]

    with poison(POISON):
        runs.start(tmp_path / "whole", **fields)
        runs.start(tmp_path / "old", "--stop-at-step=6", **fields)
        edit(newest(tmp_path / "old"), "trainer_state.json", make_old)
        edit(newest(tmp_path / "old"), "config.json", without_new_fields)
        capsys.readouterr()
        assert runs.resume(tmp_path / "old") == 0
    assert "warning" not in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "old")
    assert {record["kind"] for record in log_of(tmp_path / "old")} == {"train", "evaluation"}


# -- who reads the log ----------------------------------------------------------------------------


def test_readers_take_the_steps_that_were_kept():
    records = log_of(went_back())
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert len(steps) > len(set(steps)), "the log tells what was undone too"
    kept = without_abandoned(records)
    steps = [r["step"] for r in kept if r["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 14
    assert {r["kind"] for r in kept} == {"train", "evaluation", "samples", "alert", "rollback"}
    drawn = [step for step, _ in points([r for r in kept if r["kind"] == "train"], "loss")]
    assert drawn == steps
    assert not any(checkpoints.verify_run(went_back()).values())
    assert parting(records, records) is None
    other = [r | {"chain": "x"} if r["kind"] == "alert" else r for r in records]
    parted = parting(records, other)
    assert parted is not None and parted.part_by == JUMPED


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=6))
def test_what_was_abandoned_is_left_out_whatever_happened(tries):
    """Against a list that is cut where the run goes back."""
    records: list[dict] = []
    kept: list[int] = []
    step = 0
    for steps, back in tries:
        made = [*range(step + 1, step + steps + 1)]
        records += [{"kind": "train", "step": number} for number in made]
        kept, step = kept + made, made[-1]
        back = min(back, step)
        records.append({"kind": "rollback", "step": step, "to_step": back})
        kept, step = [s for s in kept if s <= back], back
    found = [r["step"] for r in without_abandoned(records) if r["kind"] == "train"]
    assert found == kept and found == sorted(set(found))
