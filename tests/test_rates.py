"""Rates by owner: against groups of parameters of torch's AdamW and PEFT's LoRA+, and in a run."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import peft
import peft.optimizers
import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_optim import parameters, set_gradients
from torch import nn

import checkpoints
import config as configs
import config_values
from checkpoint_state import OWNERS
from config import Config
from errors import PhiSightError
from lora.layer import LoRALinear
from reports.log import read_metrics
from reports.show import console_line, summarise
from training.optimizer import AdamW
from training.rates import group_of, rate_of, rates
from training.schedule import lr_at

OWN = Config(learning_rate=2e-3, lora_plus_ratio=16.0, projector_learning_rate=3e-4)
NAMES = {"a.lora_A": 1.0, "a.lora_B": 16.0, "projector.bias": 0.15, "scalar": 1.0}


def test_twenty_steps_equal_torchs_groups_to_the_bit():
    """Warm-up, schedule and weight decay, each group at its own rate."""
    mine, theirs, start = parameters(), parameters(), parameters()
    ours = AdamW(mine.items(), (0.9, 0.95), 1e-8, 0.1, partial(rate_of, OWN))
    reference = torch.optim.AdamW(
        [{"params": [p]} for p in theirs.values()], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
        foreach=True,
    )  # fmt: skip
    for step in range(20):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        rate = lr_at(step, 20, 0.1, OWN.learning_rate, "cosine")
        for group, name in zip(reference.param_groups, theirs, strict=True):
            group["lr"] = rate_of(OWN, rate, name)
        reference.step()
        ours.step(rate)
    for name in mine:
        assert torch.equal(mine[name], theirs[name]) and not torch.equal(mine[name], start[name])
        assert torch.equal(ours.exp_avg_sq[name], reference.state[theirs[name]]["exp_avg_sq"])


@given(st.floats(1e-7, 1e-1), st.sampled_from([*NAMES]))
def test_warm_up_and_schedule_scale_all_rates_alike(rate, name):
    assert rate_of(OWN, rate, name) == pytest.approx(rate * NAMES[name], rel=1e-12)
    assert rate_of(OWN, 0.0, name) == 0
    assert rate_of(Config(), rate, name) == rate  # to the bit, without fields of its own


def test_at_the_peak_a_rate_is_what_was_typed():
    for typed in (3e-4, 0.1, 7e-5):
        config = dataclasses.replace(OWN, projector_learning_rate=typed)
        assert rate_of(config, config.learning_rate, "projector.linear_1.weight") == typed


def test_groups_and_rates_are_those_of_loraplus_in_peft():
    """Of every parameter that PEFT trains, by what `create_loraplus_optimizer` makes of it."""
    model = nn.Sequential()
    for name in ("q_proj", "o_proj"):
        model.add_module(name, nn.Linear(8, 8))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    optimizer = peft.optimizers.create_loraplus_optimizer(
        adapted, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=16.0
    )
    theirs = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    found = {
        name.removesuffix(".default.weight"): theirs[id(parameter)]
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert len(found) == 4 and set(found.values()) == {2e-3, 2e-3 * 16.0}
    for name, rate in found.items():
        assert rate_of(OWN, 2e-3, f"language_model.{name}") == rate


def test_a_part_of_a_fused_layer_is_of_the_group_of_its_factor():
    place = "language_model.model.layers.0.self_attn.qkv_proj"
    assert group_of(f"{place}.q_proj.lora_B") == group_of(f"{place}.lora_B") == "lora_B"
    assert group_of(f"{place}.q_proj.lora_A") == group_of(f"{place}.lora_A") == "lora"
    assert group_of("projector.linear_1.weight") == "projector"


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({}, {}),
        ({"projector_learning_rate": 2e-3}, {}),
        ({"lora_plus_ratio": 2.0}, {"lora": 1e-3, "lora_B": 2e-3, "projector": 1e-3}),
        ({"projector_learning_rate": 1e-3}, {"lora": 1e-3, "lora_B": 1e-3, "projector": 5e-4}),
    ],
)
def test_rates_are_told_where_they_differ(fields, own):
    config = Config(learning_rate=2e-3, **fields)
    assert rates(config, 1e-3, ["a.lora_A", "a.lora_B", "projector.bias"]) == own
    assert rates(config, 1e-3, ["projector.bias"]).keys() == own.keys() & {"projector"}


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_a_rank_stabilised_layer_is_scaled_by_the_root(rank):
    base = nn.Linear(64, 64)
    layer = LoRALinear(base, rank, 16.0, rank_stabilized=True)
    reference = peft.LoraConfig(r=rank, lora_alpha=16, use_rslora=True, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(reference, nn.Sequential(nn.Linear(64, 64)))[0]
    assert layer.scaling == torch.tensor(theirs.scaling["default"])
    assert LoRALinear(base, rank, 16.0).scaling == torch.tensor(16.0 / rank)


# -- a run ----------------------------------------------------------------------------------------

FIELDS = runs.SHORT | {
    "lora_plus_ratio": 4,
    "projector_learning_rate": 2e-4,
    "rank_stabilized": "true",
    "max_steps": 4,
    "log_steps": 1,
    "save_steps": 2,
    "weight_decay": 0.1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with all three set that was never stopped. Tests only read it."""
    run = tmp_path_factory.mktemp("rates") / "run"
    runs.start(run, **FIELDS)
    return run


def test_a_run_that_was_killed_ends_as_one_that_was_not(whole, tmp_path):
    """Killed in the step behind its first save, without a word."""
    killed = runs.command("-c", KILLED, *runs.flags(tmp_path / "run", **FIELDS))
    assert killed.returncode == 9, killed.stderr
    runs.resume(tmp_path / "run")
    assert checkpoints.diff(whole, tmp_path / "run").identical
    logs = [
        [{k: v for k, v in record.items() if k != "timing"} for record in read_metrics(run)]
        for run in (whole / "metrics.jsonl", tmp_path / "run/metrics.jsonl")
    ]
    assert logs[0] == logs[1]


KILLED = """
import os, sys
import threads
import train
from training.optimizer import AdamW

step = AdamW.step

def dying(self, learning_rate):
    if self.step_count == 3:
        os._exit(9)
    step(self, learning_rate)

AdamW.step = dying
train.main(sys.argv[1:])
"""


def test_the_log_and_the_start_say_the_rates(whole, tmp_path, capsys):
    records = [r for r in read_metrics(whole / "metrics.jsonl") if r["kind"] == "train"]
    assert len(records) == 4
    for record in records:
        rate = record["lr"]
        assert record["rates"] == {
            "lora": rate, "lora_B": 4 * rate, "projector": pytest.approx(rate / 5),
        }  # fmt: skip
    assert "lr 0.001  (lora 0.001, lora_B 0.004, projector 0.0002)" in console_line(records[1])
    runs.start(tmp_path / "run", "--stop-at-step=1", **FIELDS)
    told = "learning rates at the peak: lora 0.001, lora_B 0.004, projector 0.0002"
    assert told in capsys.readouterr().out
    shown = str(summarise(checkpoints.resolve(tmp_path / "run"), OWNERS))
    assert '"lora_plus_ratio": 4.0, "projector_learning_rate": 0.0002' in shown


def test_without_them_nothing_is_said():
    record = read_metrics(runs.finished_run() / "metrics.jsonl")[0]
    assert "rates" not in record and "(lora 0.001" not in console_line(record)


def test_each_owner_moves_at_its_own_rate(whole, tmp_path):
    """The first step of AdamW moves each weight by its rate, whatever the gradient."""
    fields = FIELDS | {
        "max_steps": 1,
        "warmup_fraction": 0,
        "weight_decay": 0,
        "schedule": "constant",
    }
    runs.start(tmp_path / "run", **fields)
    [record] = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if r["kind"] == "train"]
    state = checkpoints.resolve(tmp_path / "run").state
    ups = torch.cat([t.flatten() for n, t in state["lora_weights"].items() if n.endswith("lora_B")])
    moved = ups[ups != 0].abs()
    assert moved.median().item() == pytest.approx(4e-3, rel=0.01)
    numbers = sum(t.numel() for t in state["image_projector"].values())
    assert record["update_norms"]["projector"] == pytest.approx(2e-4 * numbers**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("lora_plus_ratio", "8", "4.0 in"),
        ("projector_learning_rate", "0.001", "0.0002 in"),
        ("rank_stabilized", "false", "true in"),
    ],
)
def test_a_resume_with_others_is_refused(whole, field, value, shown):
    with pytest.raises(PhiSightError, match=rf"not be exact.*config\.{field}: {shown}"):
        runs.resume(whole, f"--{field.replace('_', '-')}={value}", "--max-steps=5")


def test_checkpoints_from_before_these_fields_are_without_them():
    saved = config_values.to_dict(configs.default_config())
    names = ("lora_plus_ratio", "projector_learning_rate", "rank_stabilized")
    assert [saved.pop(name) for name in names] == [1.0, 0.0, False]
    assert config_values.from_dict(saved, "here") == configs.default_config()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"lora_plus_ratio": 0.0}, "--lora-plus-ratio must be a positive number, not 0.0"),
        (
            {"projector_learning_rate": -1.0},
            "--projector-learning-rate must be 0 or more, and finite, not -1.0",
        ),
    ],
)
def test_bad_rates_are_one_line(typed, message):
    with pytest.raises(PhiSightError) as error:
        configs.replace(configs.default_config(), **typed)
    assert str(error.value) == f"config: {message}"
