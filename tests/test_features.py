"""The feature store: what is computed once, what again, and what a kill or a bad file leaves."""

import os
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

import files as file_hashes
from data import features
from data.feature_form import STORED_DTYPE
from data.features import BLANK, FeatureStore, blank_picture, file_hash
from errors import PhiSightError

SHAPE = (2, 3)


class FakeTower:
    """Features that say what the picture was; `seen` counts, and `fail_after` breaks it off."""

    def __init__(self, fail_after: int = 10**9) -> None:
        self.loaded, self.seen, self.fail_after = 0, 0, fail_after

    def __call__(self) -> "FakeTower.extract":
        self.loaded += 1
        return self.extract

    def extract(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        if self.seen + len(pictures) > self.fail_after:
            raise KeyboardInterrupt
        self.seen += len(pictures)
        return torch.stack([expected(picture) for picture in pictures])


def expected(picture: Image.Image) -> torch.Tensor:
    red, green, blue = picture.getpixel((0, 0))
    return torch.tensor([[red, green, blue], [*picture.size, 0.1]])


@pytest.fixture
def pictures(tmp_path):
    """Ten different pictures by name."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder, [paint(folder / f"{index}.png", index) for index in range(10)]


def paint(path, red: int) -> str:
    Image.new("RGB", (4, 5), (red, 7, 9)).save(path)
    return path.name


@pytest.fixture
def new_store(tmp_path):
    """Opens the store anew, as another process would."""
    return lambda key="key", shape=SHAPE: FeatureStore(tmp_path / "store", key, shape)


def shards(store: FeatureStore) -> list[str]:
    return sorted(path.name for path in store.folder.glob("shard-*.safetensors"))


def small_shards(monkeypatch, pictures: int) -> None:
    monkeypatch.setattr(features, "SHARD_PICTURES", pictures)


def check_all(store: FeatureStore, folder, names) -> None:
    for name in names:
        with Image.open(folder / name) as picture:
            assert torch.equal(store.features_of(name), expected(picture).half().float())


# -- what is stored -------------------------------------------------------------------------------


def test_round_trip_within_a_process_and_into_the_next(pictures, new_store):
    folder, names = pictures
    store, tower = new_store(), FakeTower()
    assert store.add(names, folder, tower, batch_size=4) == {}
    assert tower.seen == len(names) + 1  # and the blank picture
    check_all(store, folder, names)
    assert store.features_of(names[0]).dtype == torch.float32
    again, other_tower = new_store(), FakeTower()
    assert again.add(names, folder, other_tower) == {}
    assert other_tower.loaded == 0  # nothing is missing, so no tower is loaded
    check_all(again, folder, names)


def test_the_blank_picture_is_there_even_without_pictures(new_store, tmp_path):
    store, tower = new_store(), FakeTower()
    assert store.add([], tmp_path, tower) == {}
    assert torch.equal(store.by_hash(BLANK), expected(blank_picture()).half().float())
    assert new_store().add([], tmp_path, tower) == {} and tower.loaded == 1


def test_the_same_picture_under_two_names_is_stored_once(pictures, new_store):
    folder, names = pictures
    (folder / "copy.png").write_bytes((folder / names[0]).read_bytes())
    store, tower = new_store(), FakeTower()
    store.add([names[0], "copy.png", names[0]], folder, tower)
    assert tower.seen == 2  # the picture and the blank one
    assert store.hash_of("copy.png") == store.hash_of(names[0]) == file_hash(folder / names[0])
    check_all(store, folder, [names[0], "copy.png"])


def test_a_changed_picture_is_computed_again(pictures, new_store):
    folder, names = pictures
    new_store().add(names, folder, FakeTower())
    paint(folder / names[3], 200)
    store, tower = new_store(), FakeTower()
    store.add(names, folder, tower)
    assert tower.seen == 1
    check_all(store, folder, names)


def test_keys_do_not_share_features(pictures, new_store):
    folder, names = pictures
    new_store("one").add(names, folder, FakeTower())
    tower = FakeTower()
    new_store("other").add(names, folder, tower)
    assert tower.seen == len(names) + 1


def test_stored_as_half_floats_with_the_hashes_in_the_header(pictures, new_store):
    folder, names = pictures
    store = new_store()
    store.add(names, folder, FakeTower())
    with features.safe_open(store.folder / "shard-00000.safetensors", framework="pt") as shard:
        assert shard.get_tensor("features").dtype == STORED_DTYPE
        stored = features.json.loads(shard.metadata()["hashes"])
    assert stored == [BLANK, *(store.hash_of(name) for name in names)]


# -- kills and deletions --------------------------------------------------------------------------


@pytest.mark.parametrize(("shard_size", "batch_size"), [(4, 2), (4, 4), (3, 2), (1, 4)])
def test_a_shard_is_written_as_soon_as_it_is_full(
    pictures, new_store, monkeypatch, shard_size, batch_size
):
    small_shards(monkeypatch, shard_size)
    folder, names = pictures
    store = new_store()
    store.add(names, folder, FakeTower(), batch_size=batch_size)
    in_a_shard = -(-shard_size // batch_size) * batch_size  # whole batches
    assert len(shards(store)) == -(-(len(names) + 1) // in_a_shard)
    check_all(store, folder, names)
    check_all_after_reopening(new_store, folder, names)


def check_all_after_reopening(new_store, folder, names) -> None:
    store, tower = new_store(), FakeTower()
    store.add(names, folder, tower)
    assert tower.loaded == 0
    check_all(store, folder, names)


def test_after_a_kill_only_the_shard_in_the_making_is_computed_again(
    pictures, new_store, monkeypatch
):
    small_shards(monkeypatch, 4)
    folder, names = pictures
    store, tower = new_store(), FakeTower(fail_after=10)
    with pytest.raises(KeyboardInterrupt):
        store.add(names, folder, tower, batch_size=2)
    assert len(shards(store)) == 2
    (store.folder / "shard-00002.partial-4711").write_bytes(b"half a shard")

    store, tower = new_store(), FakeTower()
    assert store.add(names, folder, tower, batch_size=2) == {}
    assert tower.seen == len(names) + 1 - 8
    check_all(store, folder, names)
    check_all_after_reopening(new_store, folder, names)


def test_a_deleted_shard_is_computed_again_and_the_others_are_kept(
    pictures, new_store, monkeypatch
):
    small_shards(monkeypatch, 4)
    folder, names = pictures
    new_store().add(names, folder, FakeTower(), batch_size=2)
    store = new_store()
    (store.folder / "shard-00000.safetensors").unlink()
    store, tower = new_store(), FakeTower()
    store.add(names, folder, tower, batch_size=2)
    assert tower.seen == 4
    check_all(store, folder, names)
    check_all_after_reopening(new_store, folder, names)


def test_a_shard_that_cannot_be_written_says_so_and_leaves_nothing(
    pictures, new_store, monkeypatch
):
    folder, names = pictures
    store = new_store()
    for failure in (SafetensorError("I/O error: No space left"), OSError(28, "No space left")):

        def full_disk(tensors, path, metadata):
            path.write_bytes(b"half")
            raise failure

        monkeypatch.setattr(features, "save_file", full_disk)
        with pytest.raises(PhiSightError, match="cannot be written.*No space left"):
            store.add(names, folder, FakeTower())
        assert list(store.folder.iterdir()) == []


# -- bad pictures and bad shards ------------------------------------------------------------------


def test_bad_pictures_are_told_with_their_reason_and_the_rest_is_used(pictures, new_store):
    folder, names = pictures
    whole = (folder / names[0]).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    bad_names = ["missing.png", "cut.png", "text.png", "empty.png", "folder.png"]
    store, tower = new_store(), FakeTower()
    bad = store.add([*bad_names, *names], folder, tower, batch_size=3)
    assert sorted(bad) == sorted(bad_names)
    assert tower.seen == len(names) + 1
    check_all(store, folder, names)
    for name, words in (
        ("missing.png", "No such file"),
        ("cut.png", "broken"),
        ("text.png", "not a picture"),
        ("empty.png", "empty"),
        ("folder.png", "not a regular file"),
    ):
        assert name in bad[name] and words in bad[name]
        assert "\n" not in bad[name]


def test_equal_broken_files_are_both_told(pictures, new_store):
    folder, names = pictures
    for name in ("first.png", "second.png"):
        (folder / name).write_bytes(b"")  # what an interrupted download leaves
    store = new_store()
    for _ in range(2):
        assert sorted(store.add(["first.png", names[0], "second.png"], folder, FakeTower())) == [
            "first.png",
            "second.png",
        ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_before_it_is_read(pictures, new_store):
    folder, names = pictures
    os.mkfifo(folder / "pipe.png")
    bad = new_store().add(["pipe.png", names[0]], folder, FakeTower())
    assert bad.keys() == {"pipe.png"}


def cut_in_half(path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def without_hashes(path) -> None:
    save_file({"features": torch.zeros(3, *SHAPE, dtype=STORED_DTYPE)}, path)


def with_hashes_that_are_no_json(path) -> None:
    save_file({"features": torch.zeros(3, *SHAPE, dtype=STORED_DTYPE)}, path, {"hashes": "[oh"})


def without_features(path) -> None:
    save_file({"other": torch.zeros(1)}, path, {"hashes": "[]"})


def with_too_few_rows(path) -> None:
    save_file(
        {"features": torch.zeros(1, *SHAPE, dtype=STORED_DTYPE)}, path, {"hashes": '["a", "b"]'}
    )


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_half,
        without_hashes,
        with_hashes_that_are_no_json,
        without_features,
        with_too_few_rows,
    ],
)
def test_a_corrupt_shard_is_an_error_that_names_it(pictures, new_store, damage):
    folder, names = pictures
    store = new_store()
    store.add(names, folder, FakeTower())
    path = store.folder / "shard-00000.safetensors"
    damage(path)
    with pytest.raises(PhiSightError, match=r"shard-00000\.safetensors.*delete it"):
        new_store()
    path.unlink()  # the remedy
    check = new_store()
    check.add(names, folder, FakeTower())
    check_all(check, folder, names)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PhiSightError, match="cannot be made.*--features"):
        FeatureStore(tmp_path / "file", "key", SHAPE)


def test_a_header_without_a_list_of_hashes_is_an_error(new_store):
    store = new_store()
    save_file(
        {"features": torch.zeros(1, *SHAPE, dtype=STORED_DTYPE)},
        store.folder / "shard-00000.safetensors",
        {"hashes": "1"},
    )
    with pytest.raises(PhiSightError, match="not a readable feature shard"):
        new_store()


def test_a_shard_of_another_shape_is_an_error(pictures, new_store):
    folder, names = pictures
    new_store().add(names, folder, FakeTower())
    with pytest.raises(PhiSightError, match=r"11, 2, 3.*11, 2, 4"):
        new_store(shape=(2, 4))


# -- pictures that were hashed before -------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch):
    """Names the pictures that are read for their hash; files of a moment ago are remembered."""
    monkeypatch.setattr(file_hashes, "YOUNG_SECONDS", 0.0)
    names = []
    real = features.file_hash
    monkeypatch.setattr(features, "file_hash", lambda path: names.append(path.name) or real(path))
    return names


def test_pictures_that_stayed_as_they_were_are_not_read_again(pictures, new_store, hashed):
    folder, names = pictures
    new_store().add(names, folder, FakeTower())
    assert sorted(hashed) == sorted(names)
    hashed.clear()
    for key in ("key", "another"):  # the hash of a file is that for every tower
        store = new_store(key)
        assert store.add(names, folder, FakeTower()) == {}
        check_all(store, folder, names)
    assert hashed == []


def test_a_picture_that_changed_is_read_again(pictures, new_store, hashed):
    folder, names = pictures
    new_store().add(names, folder, FakeTower())
    hashed.clear()
    status = (folder / names[0]).stat()
    paint(folder / names[0], 99)
    os.utime(folder / names[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(folder / names[2], folder / names[1])
    store = new_store()
    bad = store.add(names, folder, FakeTower())
    assert sorted(hashed) == names[:2] and list(bad) == [names[2]]
    check_all(store, folder, [*names[:2], *names[3:]])


def test_the_same_names_in_another_folder_are_other_pictures(pictures, new_store, hashed, tmp_path):
    folder, names = pictures
    new_store().add(names, folder, FakeTower())
    other = tmp_path / "other"
    other.mkdir()
    for number, name in enumerate(names):
        paint(other / name, 100 + number)
    hashed.clear()
    store = new_store()
    store.add(names, other, FakeTower())
    assert sorted(hashed) == sorted(names)
    check_all(store, other, names)


@pytest.mark.parametrize("content", [None, "", "[]", '{"files": {"0.png": ["x"]}}'])
def test_hashes_that_were_damaged_or_cannot_be_written_are_made_anew(
    pictures, new_store, hashed, tmp_path, content
):
    folder, names = pictures
    new_store().add(names, folder, FakeTower())
    [place] = (tmp_path / "store/pictures").iterdir()
    if content is None:  # a bit
        place.write_text(place.read_text().replace('"0.png": ["', '"0.png": ["f', 1))
    else:
        place.write_text(content)
    hashed.clear()
    store = new_store()
    store.add(names, folder, FakeTower())
    assert sorted(hashed) == sorted(names)
    check_all(store, folder, names)
    place.unlink()
    place.mkdir()  # nothing can be written there
    store = new_store()
    assert store.add(names, folder, FakeTower()) == {}
    check_all(store, folder, names)
