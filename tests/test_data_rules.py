"""Whole runs over data that are split, cut and validated in an unusual way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import runs

import checkpoints
import config as configs
import config_values
from assistant.assistant import Assistant
from errors import PhiSightError
from exports.measure import make_probe
from reports.log import read_metrics

WITHOUT_VALIDATION = runs.SHORT | {"validation_fraction": 0, "evaluate_steps": 1, "max_steps": 2}


@pytest.fixture
def copied_world(tmp_path) -> dict[str, Path]:
    """Every picture under two names, each with records of its own."""
    records = json.loads((runs.world() / "train.json").read_text("utf-8"))
    images = tmp_path / "images"
    shutil.copytree(runs.world() / "images", images)
    for name in {record["image"] for record in records}:
        shutil.copy(images / name, images / f"copy-{name}")
    records += [record | {"image": f"copy-{record['image']}"} for record in records]
    (tmp_path / "d.json").write_text(json.dumps(records))
    return {"data": tmp_path / "d.json", "images": images}


def test_a_run_from_before_the_field_goes_on_with_its_own_split(
    copied_world, tmp_path, monkeypatch, capsys
):
    """Its checkpoint does not say how it was split; its data are split by name all the same."""
    fields = runs.SHORT | copied_world | {"save_steps": 1, "keep_checkpoints": 9}
    whole, old = tmp_path / "whole", tmp_path / "old"
    runs.start(whole, split_by="name", **fields)

    to_dict = config_values.to_dict
    with monkeypatch.context() as before:
        before.setattr(
            config_values,
            "to_dict",
            lambda config: {n: v for n, v in to_dict(config).items() if n != "split_by"},
        )
        runs.start(old, "--stop-at-step=1", split_by="name", **fields)
    assert "split_by" not in checkpoints.resolve(old).config["config"]
    with pytest.raises(PhiSightError, match='split_by: "name" in the checkpoint, "content" now'):
        runs.resume(old, "--split-by=content")
    runs.resume(old)
    assert checkpoints.diff(whole, old).identical
    assert checkpoints.resolve(old).config["config"]["split_by"] == "name"
    capsys.readouterr()


def test_a_run_without_validation_trains_stops_and_goes_on(tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    runs.start(whole, **WITHOUT_VALIDATION)
    assert ", 0 to validate;" in capsys.readouterr().out
    assert {record["kind"] for record in read_metrics(whole / "metrics.jsonl")} == {"train"}
    state = checkpoints.resolve(whole).trainer_state
    assert state["finished"] == "all steps done" and state["best_loss"] is None
    runs.start(part, "--stop-at-step=1", **WITHOUT_VALIDATION)
    runs.resume(part)
    assert checkpoints.diff(whole, part).identical

    assistant = Assistant.load(whole)
    with pytest.raises(PhiSightError, match="the run has none: .* with --validation-fraction"):
        make_probe(assistant, greedy_answers=1)
    assistant.config = configs.replace(assistant.config, validation_fraction=0.2)
    assert make_probe(assistant, greedy_answers=1).facts["conversations"]


def test_a_run_about_one_picture(tmp_path, capsys):
    records = json.loads((runs.world() / "train.json").read_text("utf-8"))
    about_one = [record for record in records if record["image"] == records[0]["image"]]
    (tmp_path / "d.json").write_text(json.dumps(about_one))
    fields = WITHOUT_VALIDATION | {"data": tmp_path / "d.json", "data_fraction": 1.0}
    with pytest.raises(PhiSightError, match="--validation-fraction 0"):
        runs.start(tmp_path / "run", **fields | {"validation_fraction": 0.1})
    runs.start(tmp_path / "run", **fields)
    assert checkpoints.resolve(tmp_path / "run").trainer_state["finished"]


def test_one_record_of_too_many_pictures_does_not_stop_a_run(tmp_path, capsys):
    records = json.loads((runs.world() / "train.json").read_text("utf-8"))
    names = sorted({record["image"] for record in records})[:10]
    turns = [
        {"from": "human", "value": "<image>" * 10 + "What?"},
        {"from": "gpt", "value": "Ten pictures."},
    ]
    many = {"id": "many", "image": names, "conversations": turns}
    (tmp_path / "d.json").write_text(json.dumps([*records, many]))
    runs.start(tmp_path / "run", data=tmp_path / "d.json", **runs.SHORT | {"data_fraction": 1.0})
    (entry,) = map(json.loads, (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines())
    assert entry["id"] == "many" and "of 10 pictures, and --row-tokens 352" in entry["reason"]
    assert checkpoints.resolve(tmp_path / "run").trainer_state["finished"]
