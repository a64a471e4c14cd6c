"""Smaller features: pooled patches, int8 tokens, and what keeps a large store whole."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import runs
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from assistant.assistant import Assistant
from config import FEATURE_STORAGES
from data import features, preflight, storage
from data.feature_form import StorageError, as_stored, check_sums, decode, encode
from data.features import BLANK, FeatureStore
from data.images import load_image
from data.storage import StoragePlan, bytes_per_picture, size
from errors import PhiSightError
from files import STALE_SECONDS
from model.vision import VisionTower, read_vision_spec
from model.vision import main as vision_main

CLIP = str(ROOT / "assets/tiny/clip")


@pytest.fixture(scope="module")
def pictures(world) -> list[Path]:
    return sorted((world / "images").glob("train_*.png"))


def tower_store(folder: Path, storage_form: str = "float16", pooling: int = 1) -> FeatureStore:
    spec = read_vision_spec(CLIP, pooling=pooling)
    return FeatureStore(folder, spec.key, spec.shape, storage_form)


def tower(pooling: int = 1) -> VisionTower:
    return VisionTower(read_vision_spec(CLIP, pooling=pooling))


def add(store: FeatureStore, pictures: list[Path], pooling: int = 1, **settings) -> dict:
    names = [path.name for path in pictures]
    return store.add(names, pictures[0].parent, lambda: tower(pooling), **settings)


# -- pooling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", [2, 3, 6])
def test_a_token_is_the_mean_of_its_block_of_patches(pictures, pooling):
    loaded = [load_image(path) for path in pictures[:3]]
    patches, pooled = tower()(loaded), tower(pooling)
    found = pooled(loaded)
    side = 6 // pooling
    assert found.shape == (3, *pooled.spec.shape) == (3, side * side, patches.shape[2])
    grid = patches.reshape(3, 6, 6, -1)
    for row in range(side):
        for column in range(side):
            block = grid[
                :, row * pooling : (row + 1) * pooling, column * pooling : (column + 1) * pooling
            ]
            torch.testing.assert_close(found[:, row * side + column], block.mean((1, 2)))


def test_pooling_tells_what_it_lost(pictures):
    loaded = [load_image(path) for path in pictures[:4]]
    exact, pooled = tower(), tower(2)
    patches, tokens = exact(loaded), pooled(loaded)
    spread = tokens.reshape(4, 3, 1, 3, 1, -1).expand(4, 3, 2, 3, 2, -1).reshape(patches.shape)
    expected = ((spread - patches).square().sum() / patches.square().sum()).sqrt()
    assert f"relative RMS error {100 * expected:.3g} %" in pooled.notes()
    assert "2 x 2 patches a token" in pooled.notes() and exact.notes() == ""


def test_every_way_to_read_and_keep_features_has_a_folder_of_its_own(tmp_path):
    specs = [read_vision_spec(CLIP, pooling=pooling) for pooling in (1, 2, 3)]
    folders = {
        FeatureStore(tmp_path, spec.key, spec.shape, form).folder
        for spec in specs
        for form in FEATURE_STORAGES
    }
    assert len(folders) == 6
    assert read_vision_spec(CLIP).key == specs[0].key


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"pooling": 4},
            "--feature-pooling 4: does not divide this CLIP's 6 x 6 patches; use one of 1, 2, 3, 6",
        ),
        (
            {"pooling": 2, "features": "pooled"},
            "does not divide the one pooled vector; use one of 1",
        ),
    ],
)
def test_a_pooling_that_does_not_fit_is_refused(settings, said):
    with pytest.raises(PhiSightError) as caught:
        read_vision_spec(CLIP, **settings)
    assert said in str(caught.value)


# -- int8 -----------------------------------------------------------------------------------------

numbers = st.floats(-6e4, 6e4, width=32)


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=4))
def test_int8_is_right_to_half_a_step_of_each_token(rows):
    exact = torch.tensor([rows])
    stored = encode(exact, "int8")
    assert stored["features"].dtype == torch.int8 and stored["features"].shape == exact.shape
    assert stored["scales"].dtype == torch.float32 and stored["scales"].shape == exact.shape[:2]
    steps = exact.abs().amax(-1, keepdim=True) / 127
    assert ((decode(stored) - exact).abs() <= steps * 0.50001 + 1e-37).all()
    assert torch.equal(
        as_stored(as_stored(exact, "int8"), "int8").sign(), as_stored(exact, "int8").sign()
    )


def test_a_token_of_zeros_stays_one():
    assert torch.equal(as_stored(torch.zeros(2, 3, 4), "int8"), torch.zeros(2, 3, 4))


@given(st.integers(0, 1000))
def test_the_error_is_measured_right(seed):
    generator = torch.Generator().manual_seed(seed)
    exact = [torch.randn(2, 3, 4, generator=generator) for _ in range(2)]
    error = StorageError()
    for part in exact:
        error.add(part, part + 0.1 * part[..., :1])
    both = torch.cat(exact)
    off = 0.1 * both[..., :1].expand_as(both)
    assert error.relative_rms == pytest.approx((off.norm() / both.norm()).item(), rel=1e-4)
    assert error.worst == pytest.approx(
        (off.norm(dim=-1) / both.norm(dim=-1)).max().item(), rel=1e-4
    )


def test_the_tiny_tower_keeps_its_features_in_int8_to_a_hundredth(pictures, tmp_path, capsys):
    plain, small = tower_store(tmp_path), tower_store(tmp_path, "int8")
    for store in (plain, small):
        assert add(store, pictures) == {}
    assert plain.error.worst < 1e-3 < small.error.relative_rms < 0.01
    assert small.error.worst < 0.02
    said = capsys.readouterr().err
    assert f"{len(pictures) + 1} pictures x 36 tokens x 128 int8" in said
    assert f"stored as int8: {small.error}" in said
    exact, name = tower()([load_image(pictures[0])])[0], pictures[0].name
    assert torch.equal(plain.features_of(name), exact.half().float())
    assert torch.equal(small.features_of(name), as_stored(exact, "int8"))
    again = tower_store(tmp_path, "int8")
    assert add(again, pictures) == {} and torch.equal(again.by_hash(BLANK), small.by_hash(BLANK))
    assert again.error.total == 0  # nothing was computed


@pytest.mark.parametrize("form", FEATURE_STORAGES)
def test_the_plan_is_what_the_disk_holds(pictures, tmp_path, form):
    store = tower_store(tmp_path, form, pooling=2)
    add(store, pictures, pooling=2)
    plan = StoragePlan(store.folder, len(pictures) + 1, store.shape, form)
    stored = sum(path.stat().st_size for path in store.folder.iterdir())
    assert abs(stored - plan.bytes) < 0.05 * plan.bytes
    assert bytes_per_picture((576, 1024), "float16") == 576 * 2048
    assert StoragePlan(tmp_path, 81_000, (576, 1024), "float16").bytes > 95 * 10**9


def test_what_is_no_finite_number_is_not_stored(tmp_path, pictures):
    store = FeatureStore(tmp_path, "key", (2, 3))
    for value in (float("nan"), float("inf"), 1e6):  # 1e6 is over the largest half float
        with pytest.raises(PhiSightError, match="some are not finite as float16"):
            store.add(
                [pictures[0].name],
                pictures[0].parent,
                lambda: lambda batch: torch.full((len(batch), 2, 3), value),
            )
    assert list(store.folder.iterdir()) == []


def test_a_shard_of_the_other_form_is_refused(tmp_path, pictures):
    store = tower_store(tmp_path, "int8")
    add(store, pictures[:2])
    shutil.copytree(store.folder, tower_store(tmp_path).folder, dirs_exist_ok=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(PhiSightError, match=r"shard-00000\.safetensors: holds .*delete it"):
        tower_store(tmp_path)


def test_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(PhiSightError, match="--feature-storage int4: use one of float16, int8"):
        FeatureStore(tmp_path, "key", (1, 1), "int4")


# -- a disk that is too small, or lies ------------------------------------------------------------


def test_a_disk_that_is_too_small_is_told_before_anything_is_computed(
    tmp_path, pictures, monkeypatch
):
    free = storage.RESERVE + 20_000
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    store = tower_store(tmp_path)
    with pytest.raises(PhiSightError) as caught:
        store.add([p.name for p in pictures], pictures[0].parent, lambda: pytest.fail("loaded"))
    message = str(caught.value)
    assert "too little room" in message and "twice the --feature-pooling (" in message
    assert "--feature-storage int8" in message and "\n" not in message
    pooled = tower_store(tmp_path, "int8", pooling=6)
    assert add(pooled, pictures, pooling=6) == {}


@pytest.mark.parametrize("form", FEATURE_STORAGES)
def test_a_damaged_byte_is_found_on_reading(tmp_path, pictures, form):
    store = tower_store(tmp_path, form)
    add(store, pictures)
    path = store.folder / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # of the last tensor's last picture
    path.write_bytes(data)
    store = tower_store(tmp_path, form)
    assert add(store, pictures) == {}
    store.features_of(pictures[0].name)
    with pytest.raises(PhiSightError, match=r"shard-00000\.safetensors: .*check sum.*delete it"):
        store.features_of(pictures[-1].name)


@pytest.mark.parametrize("form", FEATURE_STORAGES)
@pytest.mark.parametrize("harm", [lambda path: os.truncate(path, 2000), Path.unlink])
def test_a_shard_that_is_cut_off_or_removed_while_it_is_used_is_named(
    tmp_path, pictures, form, harm
):
    """A mapped file that became shorter would end the whole program, without a word."""
    store = tower_store(tmp_path, form)
    add(store, pictures)
    harm(store.folder / "shard-00000.safetensors")
    with pytest.raises(PhiSightError, match=r"shard-00000\.safetensors: .*cannot be read.*again"):
        store.features_of(pictures[-1].name)


def test_check_sums_cover_every_tensor():
    stored = encode(torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), "int8")
    before = check_sums(stored)
    for name in stored:
        changed = {key: tensor.clone() for key, tensor in stored.items()}
        changed[name][1] += 1
        after = check_sums(changed)
        assert [a == b for a, b in zip(before, after)] == [True, False, True]


def test_sizes_in_words():
    assert [size(n) for n in (7, 1500, 95_551_488_000)] == ["7 bytes", "1.5 KB", "95.6 GB"]


# -- several processes, and a kill ----------------------------------------------------------------


def shards(store: FeatureStore) -> list[Path]:
    return sorted(store.folder.glob("shard-*.safetensors"))


def test_finished_shards_can_be_read_while_others_are_written(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(features, "SHARD_PICTURES", 4)
    writer, reader = tower_store(tmp_path), tower_store(tmp_path)
    held, computing = [], tower()

    def extract(batch):
        reader.refresh()
        held.append(sum(features.file_hash(path) in reader for path in pictures))
        return computing(batch)

    writer.add([p.name for p in pictures], pictures[0].parent, lambda: extract, batch_size=4)
    assert held == [0, 3, 7, 11]  # the first shard begins with the blank picture
    reader.add([p.name for p in pictures], pictures[0].parent, lambda: pytest.fail("all is there"))
    for path in pictures:
        assert torch.equal(reader.features_of(path.name), writer.features_of(path.name))


@pytest.mark.parametrize("links", [True, False])
def test_two_that_write_at_once_keep_both(tmp_path, pictures, monkeypatch, links):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    first, second = tower_store(tmp_path), tower_store(tmp_path)
    computing = tower()

    def meanwhile(batch):
        if len(shards(first)) == 0:
            add(second, pictures[:5])
        return computing(batch)

    first.add([p.name for p in pictures[5:]], pictures[0].parent, lambda: meanwhile)
    assert len(shards(first)) == 2
    whole = tower_store(tmp_path)
    whole.add([p.name for p in pictures], pictures[0].parent, lambda: pytest.fail("all is there"))


def test_a_slow_tower_writes_before_a_shard_is_full(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(features, "SHARD_SECONDS", -1.0)
    store = tower_store(tmp_path)
    add(store, pictures, batch_size=4)
    assert len(shards(store)) == 4  # 12 pictures and the blank one, four at a time


def test_large_features_make_small_shards(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(features, "SHARD_BYTES", 5 * bytes_per_picture((36, 128), "float16"))
    store = tower_store(tmp_path)
    add(store, pictures, batch_size=1)
    assert len(shards(store)) == 3


def test_what_an_old_kill_left_is_removed(tmp_path, pictures):
    store = tower_store(tmp_path)
    old, new = (store.folder / f"shard-00000.partial-{number}" for number in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 2 * STALE_SECONDS))
    add(store, pictures[:1])
    assert not old.exists() and new.exists()


JOB = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from data import features
from model.vision import VisionTower, read_vision_spec
features.SHARD_PICTURES = 2
spec = read_vision_spec({clip!r})
store = features.FeatureStore({store!r}, spec.key, spec.shape, "int8")
folder = Path({images!r})
store.add(sorted(p.name for p in folder.iterdir()), folder, lambda: VisionTower(spec), 2)
"""


def test_an_embedding_job_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(600):  # enough to be caught in the middle
        Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(folder / f"{number}.png")
    (folder / "500.png").write_bytes(b"\x89PNG broken")
    job = tmp_path / "job.py"
    job.write_text(
        JOB.format(root=str(ROOT), clip=CLIP, store=str(tmp_path / "store"), images=str(folder))
    )
    store = tower_store(tmp_path / "store", "int8")
    process = runs.started(job)
    runs.wait_until(lambda: len(shards(store)) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    store = tower_store(tmp_path / "store", "int8")
    kept = len(store._where)
    assert 6 <= kept < 600
    computing, seen = tower(), []

    def extract(batch):
        seen.append(len(batch))
        return computing(batch)

    names = sorted(p.name for p in folder.iterdir())
    assert list(store.add(names, folder, lambda: extract)) == ["500.png"]
    assert sum(seen) == 600 - kept  # 599 good pictures and the blank one
    for name in (names[0], names[-1]):
        exact = computing([load_image(folder / name)])[0]
        torch.testing.assert_close(
            store.features_of(name), as_stored(exact, "int8"), atol=0.05, rtol=0.05
        )


# -- from end to end ------------------------------------------------------------------------------


def test_a_run_with_small_features_trains_and_answers(tmp_path):
    small = {"feature_pooling": 2, "feature_storage": "int8"}
    runs.start(
        tmp_path / "run",
        "--stop-at-step=1",
        **(runs.SHORT | small | {"features": tmp_path / "features"}),
    )
    assistant = Assistant.load(tmp_path / "run")
    assert assistant.parts.chat_format.tokens_per_image == 9
    store = FeatureStore(
        tmp_path / "features", assistant.parts.vision.key, assistant.parts.vision.shape, "int8"
    )
    path = next(iter(sorted((runs.world() / "images").glob("train_*"))))
    picture_hash = features.file_hash(path)
    found = assistant.features([load_image(path)])
    assert found.shape == (1, 9, 128)
    if picture_hash in store:
        torch.testing.assert_close(found[0], store.by_hash(picture_hash), atol=0.05, rtol=0.05)
    with pytest.raises(PhiSightError, match="config.feature_storage"):
        runs.resume(tmp_path / "run", "--feature-storage", "float16")


# -- the tower's own command, and the report that asks it -----------------------------------------


def test_the_command_tells_size_and_speed(capsys):
    assert (
        vision_main(["--vision", CLIP, "--feature-pooling", "3", "--json", "--seconds", "0.1"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["dim"]) == (4, 128) and found["pictures_per_second"] > 0
    with pytest.raises(PhiSightError, match="--feature-pooling: must be at least 1"):
        vision_main(["--vision", CLIP, "--feature-pooling", "0"])


def test_the_report_measures_the_tower(world, capsys, tmp_path):
    code = preflight.main(
        [
            "--data",
            str(world / "train.json"),
            "--images",
            str(world / "images"),
            "--tokenizer",
            str(ROOT / "assets/tiny/phi3"),
            "--vision",
            CLIP,
            "--feature-pooling",
            "2",
            "--features",
            str(tmp_path),
        ]
    )
    said = capsys.readouterr().out
    assert code == 0 and "12 pictures x 9 tokens x 128 float16" in said
    assert "pictures a second (measured on " in said and "time: about " in said
