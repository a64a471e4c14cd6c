"""Runs that go back, for the tests of it: one made once, and how two are compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import poisoned
import pytest
import runs
import torch

import checkpoints
from reports.log import deterministic_part, read_metrics
from training import alerts, step

FIELDS = runs.SHORT | {
    "data_fraction": 1.0,
    "max_steps": 14,
    "save_steps": 4,
    "log_steps": 2,
    "evaluate_steps": 5,
    "keep_best": True,
    "on_spike": "rollback",
}
POISON = {"0/10": 1e6}  # a row of the 11th step; the checkpoint before it is of the 8th
SAVED, JUMPED, SKIPPED = 8, 11, 3


@contextmanager
def poison(factors: dict[str, float]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "add_gradients", poisoned.poisoned(factors))
        patch.setattr(alerts, "SPIKE_AFTER", poisoned.SPIKE_AFTER)
        yield


@functools.cache
def went_back() -> Path:
    """A run that went back once and was never stopped. Tests only read it."""
    run = runs.shared() / "went_back"
    with poison(POISON):
        runs.start(run, **FIELDS)
    return run


def log_of(run: Path) -> list[dict]:
    return [deterministic_part(record) for record in read_metrics(run / "metrics.jsonl")]


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = checkpoints.resolve(first), checkpoints.resolve(second)
    for stem in checkpoints.OWNERS:
        assert a.state[stem] and a.state[stem].keys() == b.state[stem].keys()
        for name, tensor in a.state[stem].items():
            assert torch.equal(tensor, b.state[stem][name]), f"{stem}: {name}"


def assert_same_run(first: Path, second: Path) -> None:
    """To the bit: tensors, place, log, and which checkpoints are left."""
    assert checkpoints.diff(first, second).identical
    assert_same_weights(first, second)
    assert log_of(first) == log_of(second)
    assert [p.name for p in checkpoints.checkpoints_in(first)] == [
        p.name for p in checkpoints.checkpoints_in(second)
    ]
    assert not any(checkpoints.verify_run(second).values())
