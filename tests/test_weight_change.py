"""How far the weights have moved: computed at each save, told, and kept in manifest and log."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy
import pytest
import runs
import torch

import checkpoints
import config_values
from checkpoint_state import OWNERS, take_snapshot
from errors import PhiSightError
from manifest import WEIGHTS
from model.build import assemble, model_state
from reports import show
from reports.log import read_metrics
from training.weight_change import change_line, change_of

FIELDS = runs.SHORT | {"max_steps": 4, "save_steps": 1, "log_steps": 1, "keep_checkpoints": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saves") / "run"
    runs.start(folder, **FIELDS)
    return folder


def change_in(run: Path, step: int) -> dict:
    return checkpoints.load(run / f"checkpoint-{step:06d}").manifest["change"]


def values_of(state: dict, stem: str) -> numpy.ndarray:
    """All elements of an owner's weights, in the order of their names."""
    parts = [
        state[stem][name].numpy().astype(numpy.float64).ravel() for name in sorted(state[stem])
    ]
    return numpy.concatenate(parts)


def test_what_a_manifest_says_is_what_the_tensors_say(run):
    saved = {step: checkpoints.load(run / f"checkpoint-{step:06d}").state for step in (1, 3, 4)}
    drawn = model_state(assemble(config_values.from_dict(config_of(run), "")).model)
    for before, step in ((None, 1), (3, 4)):
        change = change_in(run, step)
        assert (change["step"], change["since_step"]) == (step, before)
        for stem in WEIGHTS:
            told, now = change[OWNERS[stem]], values_of(saved[step], stem)
            start = values_of({stem: {n: t.detach() for n, t in drawn[stem].items()}}, stem)
            assert told["norm"] == pytest.approx(numpy.linalg.norm(now))
            assert told["moved_since_start"] == pytest.approx(numpy.linalg.norm(now - start))
            if before is None:
                assert told["moved"] is told["mean_change"] is None
                continue
            moved = now - values_of(saved[before], stem)
            assert told["moved"] == pytest.approx(numpy.linalg.norm(moved)) and told["moved"] > 0
            assert told["mean_change"] == pytest.approx(numpy.abs(moved).mean())


def config_of(run: Path) -> dict:
    return checkpoints.resolve(run).config["config"]


def test_every_save_but_the_last_is_in_the_log_and_no_digest_depends_on_it(run):
    records = read_metrics(run / "metrics.jsonl")
    logged = [save for record in records for save in record["timing"].get("saves", ())]
    assert logged == [change_in(run, step) for step in range(1, len(logged) + 1)]
    assert 2 <= len(logged) < 4  # the last is saved after the last record
    assert not any(checkpoints.verify_run(run).values())


def test_a_resumed_run_says_the_same(run, tmp_path, capsys):
    stopped = tmp_path / "run"
    runs.start(stopped, "--stop-at-step=2", **FIELDS)
    runs.resume(stopped)
    assert change_in(stopped, 4) == change_in(run, 4)
    assert change_in(stopped, 3) == change_in(run, 3)
    [third] = [r for r in read_metrics(stopped / "metrics.jsonl") if r["step"] == 3]
    assert third["timing"]["saves"] == [change_in(run, 2)]  # of before the stop
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("saved step")]
    assert [int(line.split()[2]) for line in lines] == [1, 2, 3, 4]
    assert checkpoints.diff(run, stopped).identical
    # Weights of another run, or drawn with another seed, are not what it began with.
    runs.start(tmp_path / "next", "--stop-at-step=1", f"--start-from={run}", **FIELDS)
    runs.resume(tmp_path / "next", "--stop-at-step=2")
    since = [change_in(tmp_path / "next", step)["lora"]["moved_since_start"] for step in (1, 2)]
    assert since == [0.0, None]  # the first rate of a warm-up is 0
    changed = runs.copy_of(stopped, tmp_path / "changed")
    runs.resume(changed, "--allow-changes", "--seed=1", "--max-steps=5")
    assert change_in(changed, 5)["lora"]["moved_since_start"] is None


def test_a_line_for_people(run, capsys):
    change = change_in(run, 4)
    line = change_line(change, {"lora", "projector"})
    number = r"[0-9.e-]+"
    assert re.fullmatch(
        rf"saved step +4  lora norm {number}: moved {number} \({number}%\) since step 3,"
        rf" {number} \({number}%\) since the start, mean change {number};"
        rf" projector norm .*",
        line,
    )
    assert "projector" not in change_line(change, {"lora"})  # frozen: it could not move
    unmoved = {**change, "projector": {**change["projector"], "moved": 0.0, "mean_change": 0.0}}
    assert "did not move since step 3" in change_line(unmoved, {"projector"})
    assert change_line(change_in(run, 1), {"lora"}).count("since") == 1
    checkpoints.main(["show", str(run)])
    assert "change since the start of the run: lora " in capsys.readouterr().out
    checkpoints.main(["show", str(run), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["owners"]["lora"]["change"] == change["lora"]["moved"]
    assert shown["owners"]["lora"]["norm"] == change["lora"]["norm"]


def test_what_cannot_be_compared_is_not(run):
    newest = checkpoints.resolve(run)
    snapshot = take_snapshot(4, newest.state, {}, {})
    other = dataclasses.replace(
        snapshot, state=snapshot.state | {"lora_weights": {"x": torch.zeros(1)}}
    )
    change = change_of(snapshot, other, None)
    assert change["lora"]["moved"] is None and change["projector"]["moved"] == 0
    broken = {stem: {n: t.clone() for n, t in newest.state[stem].items()} for stem in WEIGHTS}
    next(iter(broken["lora_weights"].values())).fill_(math.inf)
    change = change_of(dataclasses.replace(snapshot, state=snapshot.state | broken), newest, None)
    assert change["lora"]["norm"] is change["lora"]["moved"] is None
    assert "lora norm not finite" in change_line(change, {"lora"})


def test_a_former_versions_checkpoint_is_read(run, tmp_path):
    newest = checkpoints.resolve(run)
    snapshot = take_snapshot(4, newest.state, newest.config, newest.trainer_state)
    former = {"since_step": 3, "lora": 0.5, "projector": None}
    path = checkpoints.commit(tmp_path, dataclasses.replace(snapshot, change=former))
    summary = show.summarise(checkpoints.load(path), OWNERS)
    owners = summary.as_json()["owners"]
    assert [owners[owner]["change"] for owner in ("lora", "projector")] == [0.5, None]
    out = str(summary)
    assert "L2 norm since the save of step 3" in out and "since the start" not in out
    for wrong in ({"lora": 0.5}, {"since_step": 3, "lora": "far"}, {"since_step": 3, "lora": [1]}):
        with pytest.raises(PhiSightError, match="change is "):  # as it is read back
            checkpoints.commit(tmp_path, dataclasses.replace(snapshot, change=wrong))
