"""What disks and people do to a run: full, failing and read-only disks, files that are cut,
flipped, lost, edited or copied from elsewhere. Whatever happens is found and named, the newest
intact checkpoint is used with a warning, and nothing intact is ever lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import manifest
import train
from errors import PhiSightError
from reports.log import deterministic_part, read_metrics
from training.ranks import Ranks

CONFIG = {
    "config": {"lora_rank": 4, "seed": 0},
    "base_fingerprint": "0",
    "vision_fingerprint": "0",
    "versions": {"torch": "2"},
}
TENSOR_FILES = tuple(f"{stem}.safetensors" for stem in checkpoints.OWNERS)
FILES = (
    *TENSOR_FILES,
    "config.json",
    "trainer_state.json",
    "MANIFEST.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
)


class Tokenizer:
    """Two files, as the real one writes them."""

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / name).write_text(json.dumps({"made for": name}))


def save(run: Path, step: int, keep: int = 9) -> Path:
    generator = torch.Generator().manual_seed(step)
    state = {
        stem: {"a": torch.randn(3, 4, generator=generator), "b": torch.tensor(step)}
        for stem in checkpoints.OWNERS
    }
    trainer_state = {"step": step, "epoch": 0, "row": 2 * step, "finished": ""}
    return checkpoints.save(run, step, state, CONFIG, trainer_state, Tokenizer(), keep)


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder, by the sha256 of its bytes."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in runs.contents(folder).items()}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1, 2 and 3. Tests only copy it."""
    run = tmp_path_factory.mktemp("three")
    for step in (1, 2, 3):
        save(run, step)
    return run


@pytest.fixture
def run(three: Path, tmp_path: Path) -> Path:
    return runs.copy_of(three, tmp_path)


def newest_in(run: Path) -> tuple[Path, list[tuple[Path, str]]]:
    """The path of the newest intact checkpoint, and the damaged ones that are newer."""
    checkpoint, damaged = checkpoints.find_newest(run)
    return checkpoint.path, damaged


def steps_of(run: Path) -> list[int]:
    return [int(path.name[-6:]) for path in checkpoints.checkpoints_in(run)]


def assert_gives_way(run: Path, culprit: str, capsys: pytest.CaptureFixture) -> None:
    """The newest checkpoint is damaged: found, named with the file, and the one before is used."""
    older, newest = (run / f"checkpoint-{step:06d}" for step in (2, 3))
    before = [hashes(run / f"checkpoint-{step:06d}") for step in (1, 2)]
    assert culprit in checkpoints.verify(newest)[0]
    with pytest.raises(PhiSightError, match="use an earlier checkpoint") as error:
        checkpoints.load(newest)
    assert str(newest) in str(error.value) and culprit in str(error.value)

    found, damaged = newest_in(run)
    assert found == older and [path for path, _ in damaged] == [newest]
    assert culprit in damaged[0][1]
    capsys.readouterr()
    assert checkpoints.resolve(run).step == 2
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {newest} is not used: ") and warning.count("\n") == 1
    assert culprit in warning and warning.endswith(f"using {older.name}\n")

    assert steps_of(run) == [1, 2, 3]  # looking removes nothing, not even what is damaged
    save(run, 3)  # what a run resumed from step 2 does
    assert checkpoints.verify(newest) == [] and steps_of(run) == [1, 2, 3]
    assert [hashes(run / f"checkpoint-{step:06d}") for step in (1, 2)] == before


# -- files that are not what was written ----------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def header_length(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_the_list_of_files_is_complete(three: Path):
    assert set(hashes(three / "checkpoint-000003")) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_makes_a_checkpoint_give_way(name, run, capsys):
    path = run / "checkpoint-000003" / name
    flip(path, path.stat().st_size // 3)
    assert_gives_way(run, name, capsys)


@pytest.mark.parametrize("name", TENSOR_FILES)
@pytest.mark.parametrize("part", ["length", "header", "first tensor", "last tensor"])
def test_a_flipped_bit_in_every_part_of_a_tensor_file(name, part, run, capsys):
    path = run / "checkpoint-000003" / name
    end = header_length(path)
    flip(path, {"length": 0, "header": 12, "first tensor": end, "last tensor": -1}[part])
    assert_gives_way(run, name, capsys)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", ["nothing", "half", "one byte less"])
def test_a_file_that_was_cut_makes_a_checkpoint_give_way(name, length, run, capsys):
    path = run / "checkpoint-000003" / name
    size = path.stat().st_size
    os.truncate(path, {"nothing": 0, "half": size // 2, "one byte less": size - 1}[length])
    assert_gives_way(run, name, capsys)


@pytest.mark.parametrize("name", FILES)
def test_a_lost_file_makes_a_checkpoint_give_way(name, run, capsys):
    (run / "checkpoint-000003" / name).unlink()
    assert_gives_way(run, name, capsys)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_a_file_makes_a_checkpoint_give_way(name, run, capsys):
    path = run / "checkpoint-000003" / name
    path.unlink()
    path.mkdir()
    assert_gives_way(run, name, capsys)


@pytest.mark.parametrize("name", [*TENSOR_FILES, "trainer_state.json", "MANIFEST.json"])
def test_a_file_of_an_earlier_checkpoint_makes_a_checkpoint_give_way(name, run, capsys):
    """All of it is sound in itself, and of the very same size."""
    shutil.copy(run / "checkpoint-000002" / name, run / "checkpoint-000003" / name)
    assert_gives_way(run, name, capsys)


def test_a_trainer_state_that_was_edited_makes_a_checkpoint_give_way(run, capsys):
    path = run / "checkpoint-000003" / "trainer_state.json"
    text = path.read_text()
    state = json.loads(text)
    assert json.dumps(state, indent=2) + "\n" == text, "so only the step will differ"
    path.write_text(json.dumps(state | {"step": 4}, indent=2) + "\n")
    assert_gives_way(run, "trainer_state.json: damaged or edited", capsys)


@pytest.mark.parametrize("content", [b"", b"checkpoint-000009\n", b"\xff\xfe", b"../../etc\n"])
def test_the_name_of_the_latest_that_former_versions_wrote_decides_nothing(content, run):
    latest = run / "LATEST"
    latest.write_bytes(content)
    assert newest_in(run) == (run / "checkpoint-000003", [])
    save(run, 4, keep=2)  # it would name another one than the newest from here on
    assert not latest.exists() and steps_of(run) == [3, 4]
    latest.write_bytes(content)
    checkpoints.remove_all(run)
    assert not list(run.iterdir())


@pytest.mark.parametrize("steps, newest", [((3,), 2), ((2, 3), 1), ((2,), 3), ((1,), 3)])
def test_each_newer_one_that_is_damaged_is_told(steps, newest, run, capsys):
    for step in steps:
        flip(run / f"checkpoint-{step:06d}" / "rng.safetensors", -1)
    assert checkpoints.resolve(run).step == newest
    told = capsys.readouterr().err.splitlines()
    assert len(told) == sum(step > newest for step in steps)
    assert all("rng.safetensors" in line for line in told)


def test_a_damaged_checkpoint_is_not_kept_at_the_cost_of_an_intact_one(run):
    shutil.rmtree(run / "checkpoint-000003")
    flip(run / "checkpoint-000002" / "optimizer.safetensors", -1)
    before = hashes(run / "checkpoint-000001")
    save(run, 4, keep=2)
    assert hashes(run / "checkpoint-000001") == before


# -- disks that fail ------------------------------------------------------------------------------


class FailingFile:
    """A file whose `write` fails as a dying disk does; nothing, or a half, is written."""

    def __init__(self, file, half: bool) -> None:
        self._file, self._half = file, half

    def write(self, data: bytes) -> int:
        if self._half:
            self._file.write(data[: len(data) // 2])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def fail_at(number: int, function: Callable, instead: Callable, counts: Callable) -> Callable:
    """`function`, but for the `number`-th of the calls that count."""
    left = [number]

    def wrapped(*arguments, **named):
        left[0] -= bool(counts(*arguments, **named))
        if left[0] == 0 and counts(*arguments, **named):
            return instead(*arguments, **named)
        return function(*arguments, **named)

    return wrapped


def broken(*_arguments: object, **_named: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def always(*_arguments: object, **_named: object) -> bool:
    return True


def for_writing(_path: Path, mode: str = "r", *_: object, **__: object) -> bool:
    return "w" in mode


def failing(what: str, number: int, patch: pytest.MonkeyPatch) -> None:
    """Let the `number`-th call of that kind fail with an input/output error."""
    if what.startswith("write"):
        open_ = pathlib.Path.open

        def instead(*arguments, **named):
            return FailingFile(open_(*arguments, **named), half=what == "write half")

        patch.setattr(pathlib.Path, "open", fail_at(number, open_, instead, for_writing))
    elif what == "tensors":
        patch.setattr(manifest, "save_file", fail_at(number, manifest.save_file, broken, always))
    else:
        patch.setattr(os, what, fail_at(number, getattr(os, what), broken, always))


@pytest.mark.parametrize(
    "what, numbers",
    [
        ("write", (1, 2, 3, 4, 5)),
        ("write half", (1, 2, 3, 4, 5)),
        ("tensors", (1, 2, 3, 4)),
        ("fsync", (1, 2, 3, 6, 9, 11)),
        ("replace", (1, 2)),
    ],
)
def test_an_input_output_error_loses_nothing(what, numbers, three, tmp_path):
    """`write` counts two files of the tokenizer, config.json, trainer_state.json, the manifest."""
    for number in numbers:
        run = Path(shutil.copytree(three, tmp_path / str(number)))
        before = hashes(run)
        with pytest.MonkeyPatch.context() as patch:
            failing(what, number, patch)
            with pytest.raises(PhiSightError, match="Input/output error") as error:
                save(run, 4, keep=2)
        assert str(run / "checkpoint-000004") in str(error.value)
        after = hashes(run)
        # With the new checkpoint in its place, or without, the old ones are as they were.
        assert {name: after.get(name) for name in before} == before
        newest, damaged = newest_in(run)
        assert newest.name in ("checkpoint-000003", "checkpoint-000004") and damaged == []
        save(run, 4, keep=2)  # the disk is mended
        assert steps_of(run) == [3, 4]
        assert sorted(path.name for path in run.iterdir()) == [
            "checkpoint-000003",
            "checkpoint-000004",
        ]


def test_an_error_while_reading_is_named_and_removes_nothing(run, capsys):
    """A tensor file that can be listed and measured but not read; the disk recovers later."""
    before = hashes(run)

    def unreadable(path: Path, mode: str = "r", *_: object, **__: object) -> bool:
        return path == run / "checkpoint-000003" / "optimizer.safetensors"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pathlib.Path, "open", fail_at(1, pathlib.Path.open, broken, unreadable))
        assert checkpoints.resolve(run).step == 2
    warning = capsys.readouterr().err
    assert "optimizer.safetensors: " in warning and "Input/output error" in warning
    assert hashes(run) == before and checkpoints.resolve(run).step == 3


# -- real small disks -----------------------------------------------------------------------------


class Disk:
    """A file system in memory, of a size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)],
            capture_output=True,
            text=True,
            check=False,
        )

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def leave_free(self, size: int) -> None:
        """Fill it up, but for `size` bytes."""
        with (self.folder / "filler").open("wb") as file:
            file.write(b"\0" * max(0, self.free() - size))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """16 MiB, empty."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = Disk(folder)
    mounted = disk.mount("size=16m")
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full_at_any_page(disk, three):
    """The same save with one page more of room each time, from none to enough."""
    page = os.statvfs(disk.folder).f_frsize
    run = Path(shutil.copytree(three, disk.folder / "run"))
    before = {step: hashes(run / f"checkpoint-{step:06d}") for step in (1, 2, 3)}
    failures = 0
    for pages in range(40):
        disk.leave_free(pages * page)
        try:
            save(run, 4)
        except PhiSightError as error:
            assert "No space left on device" in str(error) and "make room" in str(error)
            assert str(run / "checkpoint-000004") in str(error)
            failures += 1
        newest, damaged = newest_in(run)
        assert damaged == [] and newest.name in ("checkpoint-000003", "checkpoint-000004")
        assert before == {step: hashes(run / f"checkpoint-{step:06d}") for step in (1, 2, 3)}
        assert all(
            path in checkpoints.checkpoints_in(run) for path in run.iterdir() if path.is_dir()
        ), "nothing half is left behind"
        if failures == pages:  # there was room enough
            break
        # It may be in its place, and only the tidying up had no room: that is to be tried again.
        shutil.rmtree(run / "checkpoint-000004", ignore_errors=True)
        (disk.folder / "filler").unlink()
    assert 5 < failures < 39


def test_a_disk_without_room_for_another_file(disk, three):
    run = Path(shutil.copytree(three, disk.folder / "run"))
    before = hashes(run)
    used = sum(1 for _ in disk.folder.rglob("*")) + 1
    for more in range(1, 6):
        disk.remount(f"nr_inodes={used + more}")
        with pytest.raises(PhiSightError, match="No space left on device"):
            save(run, 4)
        assert hashes(run) == before
    disk.remount("nr_inodes=1000")
    assert checkpoints.verify(save(run, 4)) == []


def test_a_read_only_disk(disk, three, capsys):
    run = Path(shutil.copytree(three, disk.folder / "run"))
    flip(run / "checkpoint-000003" / "config.json", 5)
    before = hashes(run)
    disk.remount("ro")
    for act in (lambda: save(run, 4), lambda: checkpoints.remove_all(run)):
        with pytest.raises(PhiSightError, match=f"{run}.*Read-only file system"):
            act()
    assert checkpoints.resolve(run).step == 2  # reading needs nothing to be written
    assert "config.json" in capsys.readouterr().err
    assert hashes(run) == before
    disk.remount("rw")
    assert checkpoints.verify(save(run, 4)) == []


# -- whole runs -----------------------------------------------------------------------------------

FEW = runs.SHORT | {"max_steps": 3, "save_steps": 1, "log_steps": 1, "keep_checkpoints": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, each saved, that nothing befell. Tests only read it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    runs.start(run, **FEW)
    return run


def assert_ends_like(whole: Path, run: Path) -> None:
    found = checkpoints.diff(whole, run)
    assert found.identical, str(found)
    logs = [
        [deterministic_part(record) for record in read_metrics(each / "metrics.jsonl")]
        for each in (whole, run)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == FEW["max_steps"]


def assert_one_intact(run: Path, step: int) -> dict[str, str]:
    """The files of the newest checkpoint; there is no damaged one."""
    path, damaged = newest_in(run)
    assert damaged == [] and checkpoints.load(path).step == step
    return hashes(path)


def test_training_on_a_disk_that_fills_up_is_resumed_when_there_is_room(disk, whole, capsys):
    run = disk.folder / "run"
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    disk.leave_free(size * 3 // 2)  # for one checkpoint, and not for a second beside it
    with pytest.raises(PhiSightError, match="No space left on device.*make room") as error:
        runs.start(run, **FEW)
    assert str(run / "checkpoint-000002") in str(error.value)
    kept = assert_one_intact(run, 1)
    with pytest.raises(PhiSightError, match="No space left on device"):  # still no room
        runs.resume(run)
    assert assert_one_intact(run, 1) == kept
    (disk.folder / "filler").unlink()
    capsys.readouterr()
    assert runs.resume(run) == 0
    assert "resumed at step 1 of 3" in capsys.readouterr().out
    assert_ends_like(whole, run)


def test_training_under_a_limit_on_the_size_of_files_is_resumed_without_it(whole, tmp_path):
    """Needs no rights: the system lets no file grow beyond the size of all but the largest."""
    run = tmp_path / "run"
    runs.start(run, "--stop-at-step=1", **FEW)
    kept = assert_one_intact(run, 1)
    largest = max(path.stat().st_size for path in whole.rglob("*.safetensors"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))
    try:
        with pytest.raises(PhiSightError, match="File too large") as error:
            runs.resume(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(run / "checkpoint-000002") in str(error.value)
    assert assert_one_intact(run, 1) == kept
    assert runs.resume(run) == 0
    assert_ends_like(whole, run)


@pytest.mark.parametrize("what", ["fsync", "tensors"])
def test_training_on_a_disk_that_fails_once_is_resumed(what, whole, tmp_path):
    run = tmp_path / "run"
    runs.start(run, "--stop-at-step=1", **FEW)
    with pytest.MonkeyPatch.context() as patch:
        failing(what, 3, patch)
        with pytest.raises(PhiSightError, match="Input/output error"):
            runs.resume(run)
    assert assert_one_intact(run, 1)
    assert runs.resume(run) == 0
    assert_ends_like(whole, run)


def test_a_run_on_a_read_only_disk_is_refused_and_can_still_be_asked(disk, whole):
    run = disk.folder / "run"
    runs.start(run, "--stop-at-step=1", **FEW)
    before = hashes(run)
    disk.remount("ro")
    with pytest.raises(PhiSightError, match=f"{run}.*Read-only file system"):
        runs.resume(run)
    assert checkpoints.resolve(run).step == 1 and hashes(run) == before
    disk.remount("rw")
    assert runs.resume(run) == 0
    assert_ends_like(whole, run)


# -- checkpoints of other runs --------------------------------------------------------------------


def other_base(folder: Path) -> dict[str, object]:
    base = Path(shutil.copytree(runs.BASE, folder / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return {"base": base}


@pytest.mark.parametrize(
    "other, fields",
    [
        (other_base, ["config.base: ", "base_fingerprint: "]),
        (lambda _: {"learning_rate": 0.5}, ["config.learning_rate: 0.5 in"]),
        (lambda _: {"data_fraction": 0.5}, ["config.data_fraction: 0.5 in", "data_fingerprint: "]),
    ],
    ids=["another base", "another config", "other data"],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(other, fields, tmp_path):
    """It is whole, and newer than the run's own, so it is the one that a resume takes."""
    run, stranger = tmp_path / "run", tmp_path / "stranger"
    runs.start(run, "--stop-at-step=1", **FEW)
    runs.start(stranger, "--stop-at-step=2", **FEW | other(tmp_path))
    shutil.copytree(stranger / "checkpoint-000002", run / "checkpoint-000002")
    before = hashes(run)
    assert checkpoints.verify(run / "checkpoint-000002") == []
    with pytest.raises(PhiSightError, match="--resume: would not be exact") as error:
        runs.start(run, "--resume", **FEW)
    for field in fields:
        assert field in str(error.value)
    # Without flags the config is the checkpoint's own, and the log tells that it is not the run's.
    with pytest.raises(PhiSightError, match="metrics.jsonl.*put back the log that belongs to this"):
        runs.resume(run)
    assert hashes(run) == before
    shutil.rmtree(run / "checkpoint-000002")
    assert runs.start(run, "--resume", **FEW) == 0 and runs.newest_step(run) == 3


def test_a_checkpoint_of_another_run_is_refused_without_flags_too(tmp_path):
    run, stranger = tmp_path / "run", tmp_path / "stranger"
    runs.start(run, "--stop-at-step=1", **FEW)
    runs.start(stranger, "--stop-at-step=2", **FEW | {"learning_rate": 0.5, "log_steps": 50})
    shutil.copytree(stranger / "checkpoint-000002", run / "checkpoint-000002")
    before = hashes(run)
    with pytest.raises(PhiSightError, match="one of them belongs to another run"):
        runs.resume(run)
    assert hashes(run) == before, "the run's own checkpoint was lost to the stranger's"


def test_a_resume_reads_a_checkpoint_once(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    runs.start(run, "--stop-at-step=2", **FEW | {"keep_checkpoints": 2})
    older, newest = checkpoints.checkpoints_in(run)
    read_folder, read = manifest.read_folder, []
    monkeypatch.setattr(
        manifest,
        "read_folder",
        lambda folder, *rest: read.append(folder) or read_folder(folder, *rest),
    )
    options = train.parse(["--resume", "--run", str(run)])
    assert train.starting_point(*options, Ranks())[1].path == newest and read == [newest]
    flip(newest / "optimizer.safetensors", -1)
    read.clear()
    assert train.starting_point(*options, Ranks())[1].path == older and read == [newest, older]


def test_a_damaged_checkpoint_of_a_real_run_of_every_kind_of_file(whole, tmp_path, capsys):
    """The files that a real run writes; the one before is used, with a warning."""
    run = tmp_path / "run"
    runs.start(run, "--stop-at-step=2", **FEW | {"keep_checkpoints": 2})
    older, newest = checkpoints.checkpoints_in(run)
    kept = hashes(older)
    for name in sorted(hashes(newest)):
        path = newest / name
        whole_file = path.read_bytes()
        flip(path, len(whole_file) // 2)
        capsys.readouterr()
        config, checkpoint = train.starting_point(
            *train.parse(["--resume", "--run", str(run)]), Ranks()
        )
        assert checkpoint.path == older and checkpoint.step == 1 and config.run == str(run)
        assert f"warning: {newest} is not used: {name}: " in capsys.readouterr().err
        path.write_bytes(whole_file)
    flip(newest / "optimizer.safetensors", -1)
    assert hashes(older) == kept
    assert runs.resume(run) == 0
    assert f"warning: {newest} is not used: optimizer.safetensors: " in capsys.readouterr().err
    (difference,) = checkpoints.diff(whole, run).differences
    assert difference["name"] == "config.keep_checkpoints"
