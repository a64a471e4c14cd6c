"""What the processes of a run share: the feature store and evaluations, the same for any number."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from teams import together

from data import features
from data.features import BLANK, FeatureStore
from data.team import ALONE, in_order
from errors import PhiSightError
from evaluation import meter
from model.vision import VisionTower

BAD = {"broken.png", "missing.png"}


def contents(store: FeatureStore) -> dict[str, tuple[dict[str, str], dict[str, bytes]]]:
    """Each shard: its header, and the bytes of its tensors. (The order of the header's entries in
    the file is by chance, so that files of the same contents may differ.)"""
    found = {}
    for path in sorted(store.folder.iterdir()):
        with safe_open(path, framework="pt") as shard:
            tensors = {name: shard.get_tensor(name).numpy().tobytes() for name in shard.keys()}
            found[path.name] = shard.metadata(), tensors
    return found


@pytest.fixture(scope="module")
def pictures(world, tmp_path_factory) -> tuple[Path, list[str]]:
    """The world's pictures, one of them twice, and broken ones."""
    folder = tmp_path_factory.mktemp("shared") / "images"
    folder.mkdir()
    for path in sorted((world / "images").glob("*.png")):
        (folder / path.name).write_bytes(path.read_bytes())
    names = sorted(path.name for path in folder.iterdir())
    (folder / "copy.png").write_bytes((folder / names[0]).read_bytes())
    (folder / "broken.png").write_bytes((folder / names[1]).read_bytes()[:100])
    return folder, [*names[:4], "broken.png", "missing.png", *names[4:], "copy.png"]


def extract_of(tower: VisionTower, seed: int, ends_after: int = 10**9):
    """`tower` at a pace of its own; a process that is killed ends at the `ends_after`-th batch."""
    pace, left = random.Random(seed), ends_after

    def extract(batch):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        time.sleep(pace.random() * 0.01)
        return tower(batch)

    return lambda: extract


def filled(folder: Path, parts, pictures, size: int, ends_after: int = 10**9) -> FeatureStore:
    images, names = pictures
    tower = VisionTower(parts.vision)
    stores = [FeatureStore(folder, parts.vision.key, parts.vision.shape) for _ in range(size)]

    def fill(member):
        extract = extract_of(tower, member.rank, ends_after)
        return stores[member.rank].add(names, images, extract, batch_size=2, team=member)

    bad = together(size, fill)
    for store, told in zip(stores, bad, strict=True):
        assert told == bad[0] and told.keys() == BAD & set(names)
        for name in set(names) - told.keys():
            assert torch.equal(store.features_of(name), stores[0].features_of(name))
        assert BLANK in store
    return stores[0]


@pytest.fixture
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(features, "SHARD_PICTURES", 4)


def test_a_store_is_the_same_however_many_processes_fill_it(
    parts, pictures, tmp_path, small_shards, capsys
):
    found, told = {}, set()
    for size in (1, 2, 4):
        found[size] = contents(filled(tmp_path / str(size), parts, pictures, size))
        told.add(capsys.readouterr().err.split("picture features stored as")[1])
    assert len(found[1]) == 5 and len(told) == 1
    assert found[2] == found[1] and found[4] == found[1]


def test_a_kill_loses_at_most_the_shard_that_each_process_is_making(
    parts, pictures, tmp_path, small_shards
):
    images, names = pictures
    pictures = images, [name for name in names if name not in BAD]
    whole = contents(filled(tmp_path / "whole", parts, pictures, 1))
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "killed", parts, pictures, 2, ends_after=3)
    store = FeatureStore(tmp_path / "killed", parts.vision.key, parts.vision.shape)
    left = contents(store)
    assert list(left) == list(whole)[:2] and all(left[name] == whole[name] for name in left)
    assert contents(filled(tmp_path / "killed", parts, pictures, 4)) == whole


def test_processes_whose_towers_are_slow_write_early_and_not_over_each_other(
    parts, pictures, tmp_path, small_shards, monkeypatch
):
    monkeypatch.setattr(features, "SHARD_SECONDS", -1.0)
    store = filled(tmp_path / "slow", parts, pictures, 4)
    stored = [json.loads(header["hashes"]) for header, _ in contents(store).values()]
    assert max(map(len, stored)) == 2 and len(stored) > 8
    every = {store.hash_of(name) for name in set(pictures[1]) - BAD} | {BLANK}
    assert sorted(sum(stored, [])) == sorted(every)


def test_what_other_processes_stored_and_this_one_cannot_see_is_an_error(
    parts, pictures, tmp_path, small_shards
):
    images, names = pictures

    def fill(member):
        own = FeatureStore(tmp_path / str(member.rank), parts.vision.key, parts.vision.shape)
        tower = VisionTower(parts.vision)
        return own.add(names, images, lambda: tower, batch_size=2, team=member)

    with pytest.raises(PhiSightError, match="another process has stored.*--features"):
        together(2, fill)


def test_an_evaluation_has_the_same_figures_on_any_number_of_processes(
    model, prepared, store, monkeypatch
):
    monkeypatch.setattr(meter, "ROWS", 1)
    batches: list[int] = []
    packed = meter.packed_batch
    monkeypatch.setattr(meter, "packed_batch", lambda *given: batches.append(1) or packed(*given))

    def evaluate(member):
        return meter.evaluate(
            model, prepared.validation, prepared.first_exchanges, store, 256, 0,
            torch.device("cpu"), member,
        )  # fmt: skip

    alone = evaluate(ALONE)
    count = len(batches)
    assert count > 8 and set(alone["alignment"]) == set(meter.CONDITIONS)
    for size in (2, 3):
        assert together(size, evaluate) == [alone] * size
        assert len(batches) == 2 * count, "each batch is computed once, by one of them"
        del batches[count:]


def test_shares_are_put_back_in_order():
    for size in (1, 2, 3, 9):
        items = list(range(7))
        assert in_order([items[rank::size] for rank in range(size)]) == items
    assert in_order([[], []]) == [] and json.dumps(ALONE.exchange(1.5)) == "[1.5]"
