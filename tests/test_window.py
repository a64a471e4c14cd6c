"""The accumulation window asks no tensor for its value, and the batches come from a thread."""

from __future__ import annotations

import threading

import pytest
import runs
import torch
from asking import nobody_asks
from random_model import NO_PICTURES, PLACEHOLDER, phi, tokens

import ops
import train
from data.collate import IGNORED, batch_of, collate
from data.features import FeatureStore
from errors import PhiSightError
from model.recompute import LAYERS, NOTHING, PRODUCTS
from training import batches
from training.batches import BatchesAhead, make_batches
from training.loss_scaler import LossScaler
from training.ranks import Ranks
from training.run import prepare_run
from training.step import add_gradients


def window_of(parts, prepared, store) -> list:
    """Two micro-batches with pictures, padding and dropout keys."""
    chat_format = parts.chat_format
    samples = list(prepared.train)[:6]
    return [
        collate(
            rows, store.features_of, chat_format.padding_id, chat_format.image_id, store.shape,
            row_keys=range(len(rows)),
        )
        for rows in ([samples[:2], samples[2:3]], [samples[3:6]])
    ]  # fmt: skip


def test_the_window_asks_no_tensor_for_its_value(parts, model, prepared, store, monkeypatch):
    """By the operations that a GPU has, but for its attention kernel; those for a CPU may ask."""
    window = window_of(parts, prepared, store)
    supervised = sum(batch.supervised_tokens for batch in window)
    monkeypatch.setattr(ops, "choose", lambda *_: (ops.plain, ""))
    model.train()
    found = []
    for recomputing in (NOTHING, PRODUCTS, LAYERS):
        monkeypatch.setattr(model.language_model.model, "recomputing", recomputing)
        with nobody_asks():
            loss_sum = add_gradients(model, LossScaler(enabled=True), window, supervised)
        assert loss_sum.dtype == torch.float64 and loss_sum > 0
        found.append({name: p.grad.clone() for name, p in model.trainable()})
        assert all(gradient.any() for gradient in found[-1].values())
        model.zero_grad(set_to_none=True)
    for other in found[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in found[0].items())


def test_nor_does_longrope_which_chooses_by_conversation():
    model = phi(16)
    conversations = [tokens(9, 1), tokens(20, 2), tokens(17, 3)]
    ids = torch.tensor([sum(conversations, [])])
    labels = ids.clone()
    labels[:, :5] = IGNORED
    places = torch.cat([torch.arange(len(part)) for part in conversations])[None]
    numbers = torch.cat([torch.full((len(p),), n) for n, p in enumerate(conversations, 1)])[None]
    batch = batch_of(ids, labels, places, numbers, NO_PICTURES, PLACEHOLDER)
    assert batch.lengths == [9, 20, 17] and batch.tokens == 46 and batch.supervised_tokens == 41
    with nobody_asks(), torch.no_grad():
        loss, count = model(batch)
    assert loss > 0 and count == 41


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.clone().__setitem__(x > 0, 1.0),
        lambda x: (x > 0).nonzero(),
        lambda x: torch.unique_consecutive(x),
        lambda x: torch.equal(x, x),
    ],
)
def test_who_asks_is_found(ask):
    with pytest.raises(AssertionError, match="waits for the device"), nobody_asks():
        ask(torch.ones(3))


# -- batches made ahead ---------------------------------------------------------------------------


def prepared_run(run, **fields):
    config, options = train.parse(runs.flags(run, **runs.SHORT | {"max_steps": 9} | fields))
    return prepare_run(config, None, options, Ranks())


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("batches")}


def same(one, other) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("input_ids", "labels", "position_ids", "segment_ids", "image_features")
    ) and (one.row_keys, one.lengths) == (other.row_keys, other.lengths)


def test_what_is_made_ahead_is_what_the_place_of_the_run_asks_for(tmp_path):
    run = prepared_run(tmp_path / "run", data_fraction=0.2, accumulation=2)
    progress, epochs = run.progress, set()
    with BatchesAhead(run) as ahead:
        while progress.step < run.total_steps:
            rows = run.next_rows()
            made = ahead.take(rows)
            expected = list(make_batches(run, progress.epoch, rows))
            assert len(made) == len(expected) == len(rows) and all(map(same, made, expected))
            epochs.add(progress.epoch)
            progress.step += 1
            progress.epoch, progress.row = run.rows.place(progress.epoch, rows.stop)
        assert len(epochs) > 2, "the end of an epoch is gone over"
        progress.epoch, progress.step = 0, 1  # what is ahead is of another place now
        assert same(ahead.take(range(1))[0], next(make_batches(run, 0, range(1))))
        assert threads()
    assert not threads()


def test_batches_are_made_while_the_step_runs(tmp_path, monkeypatch):
    made, steps = [threading.Event() for _ in range(3)], []
    collated, train_step = iter(made), train.train_step

    def counting(*arguments):
        next(collated).set()
        return collate(*arguments)

    def waiting(*arguments, **named):
        steps.append(len(steps) + 1)
        assert made[min(len(steps), 2)].wait(60), "the next step's batch is there within this one"
        return train_step(*arguments, **named)

    monkeypatch.setattr(batches, "collate", counting)
    monkeypatch.setattr(train, "train_step", waiting)
    runs.start(tmp_path / "run", **runs.SHORT | {"max_steps": 3})
    assert steps == [1, 2, 3] and next(collated, None) is None, "none is made in vain"
    assert not threads()


def test_a_fault_beside_a_step_is_told_by_the_next_one(tmp_path, monkeypatch):
    features_of = FeatureStore.features_of
    steps = []
    train_step = train.train_step

    def damaged(self, name):
        if threading.current_thread().name.startswith("batches") and steps:
            raise PhiSightError("shard-00000.safetensors: the file was damaged; delete it")
        return features_of(self, name)

    def noting(*arguments, **named):
        steps.append(train_step(*arguments, **named))
        return steps[-1]

    monkeypatch.setattr(FeatureStore, "features_of", damaged)
    monkeypatch.setattr(train, "train_step", noting)
    with pytest.raises(PhiSightError, match="shard-00000.*damaged; delete it"):
        runs.start(tmp_path / "run", **runs.SHORT | {"max_steps": 40, "save_steps": 1})
    assert steps and runs.newest_step(tmp_path / "run") == len(steps)
    assert not threads()
    monkeypatch.undo()
    assert runs.resume(tmp_path / "run", f"--stop-at-step={len(steps) + 1}") == 0
    assert not threads()
