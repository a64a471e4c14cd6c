"""Checkpoints: exact round trips, every kind of damage found, and no instant at which a kill or a
full disk leaves a run without an intact checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
import manifest
import paths
from errors import PhiSightError, run_main
from reports.compare import compare_configs
from tensors import raw_bytes
from training import rng

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"name": "demo", "rank": 4, "versions": {"torch": torch.__version__}}


def make_state(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "lora_weights": {
            "layers.0.qkv_proj.lora_A": torch.randn(2, 8, generator=generator),
            "layers.0.qkv_proj.lora_B": torch.randn(8, 2, generator=generator),
            "layers.0.qkv_proj.scaling": torch.tensor(2.0),
        },
        "image_projector": {"first.weight": torch.ones(3, 5, dtype=torch.bfloat16)},
        "optimizer": {
            "layers.0.qkv_proj.lora_A.exp_avg": torch.randn(2, 8, generator=generator),
            "layers.0.qkv_proj.lora_A.step": torch.tensor(seed, dtype=torch.int64),
        },
        "rng": {"torch.cpu": generator.get_state()},
    }


def save(run: Path, step: int, seed: int | None = None, **more) -> Path:
    trainer_state = {
        "step": step,
        "position": {"epoch": 0, "row": step},
        "saved_at": "noon",
        "best": float("inf"),
        "recent_losses": [1.5, 1.25],
    }
    return checkpoints.save(
        run,
        step,
        make_state(step if seed is None else seed),
        CONFIG,
        trainer_state | more.pop("trainer_state", {}),
        **more,
    )


def folders(run: Path) -> list[str]:
    """Everything in a run, left-overs too."""
    return sorted(path.name for path in run.iterdir())


def newest(run: Path) -> tuple[Path, list[tuple[Path, str]]]:
    """The path of the newest intact checkpoint, and the damaged ones that are newer."""
    checkpoint, damaged = checkpoints.find_newest(run)
    return checkpoint.path, damaged


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for stem in first:
        assert list(first[stem]) == list(second[stem])
        for name, tensor in first[stem].items():
            other = second[stem][name]
            assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
            assert raw_bytes(tensor).tobytes() == raw_bytes(other).tobytes(), name


class FakeTokenizer:
    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "tokenizer.json").write_text('{"a": 1}')
        (Path(folder) / "deeper").mkdir()
        (Path(folder) / "deeper" / "chat_template.jinja").write_text("{{ messages }}")


# ---- round trips ---------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    state = make_state(7)
    state["image_projector"] |= {
        "a view": torch.arange(12.0).reshape(3, 4).t(),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
        "nan": torch.tensor([float("nan"), -0.0]),
        "expanded": torch.ones(1).expand(4),
        "grown": torch.ones(2, requires_grad=True),
    }
    shared = torch.zeros(4)
    state["image_projector"] |= {"tied.0": shared, "tied.1": shared[:2]}
    path = checkpoints.save(
        tmp_path, 7, state, CONFIG, {"step": 7, "best": float("inf")}, FakeTokenizer()
    )
    loaded = checkpoints.load(path)
    assert path.name == "checkpoint-000007" and checkpoints.verify(path) == []
    assert (loaded.step, loaded.config) == (7, CONFIG)
    assert loaded.trainer_state == {"step": 7, "best": float("inf")}
    assert_same(
        loaded.state,
        {
            stem: {name: tensor.detach() for name, tensor in tensors.items()}
            for stem, tensors in state.items()
        },
    )
    assert torch.equal(loaded.state["rng"]["torch.cpu"], state["rng"]["torch.cpu"])
    assert (path / "tokenizer" / "deeper" / "chat_template.jinja").exists()
    assert folders(tmp_path) == [path.name]
    rows = {row["name"]: row for row in loaded.manifest["tensors"]}
    assert rows["layers.0.qkv_proj.scaling"] | {"sha256": ""} == {
        "file": "lora_weights.safetensors",
        "owner": "lora",
        "name": "layers.0.qkv_proj.scaling",
        "shape": [],
        "dtype": "float32",
        "mean": 2.0,
        "std": 0.0,
        "sha256": "",
    }
    assert rows["nan"]["mean"] is None and rows["empty"]["std"] is None
    assert {row["owner"] for row in rows.values()} == {"lora", "projector", "optimizer", "rng"}
    assert len({path.stat().st_mode for path in path.iterdir() if path.is_file()}) == 1


DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.int8,
    torch.bool,
)


@st.composite
def tensors(draw) -> torch.Tensor:
    """Any bit patterns, NaNs with payloads too, in any small shape."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = torch.empty(shape, dtype=dtype).nbytes
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.tensor(list(data), dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(names, tensors(), max_size=4), st.dictionaries(names, tensors(), max_size=4))
def test_any_tensors_come_back_to_the_bit(first: dict, second: dict) -> None:
    state = {"lora_weights": first, "image_projector": {}, "optimizer": second, "rng": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoints.save(folder, 1, state, {}, {})
        assert_same(checkpoints.load(path).state, state)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda given: given["state"].pop("rng"), "state has"),
        (lambda given: given["state"].update(ears={}), "state has"),
        (lambda given: given.update(step=-1), "not a count"),
        (lambda given: given.update(trainer_state={"step": 4}), "not the step"),
        (lambda given: given.update(trainer_state={"plan": [{1: 2}]}), "key 1 in plan"),
        (lambda given: given.update(config={"a": torch.ones(1)}), "config.json"),
        (lambda given: given.update(keep=0), "at least 1"),
        (
            lambda given: given["state"]["rng"].update(__metadata__=torch.ones(1)),
            "read back|not saved",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path: Path, change: Callable, words: str) -> None:
    given_ = {"state": make_state(), "config": {}, "trainer_state": {}, "step": 3, "keep": 1}
    change(given_)
    with pytest.raises(PhiSightError, match=words):
        checkpoints.save(tmp_path / "run", **given_)
    assert not (tmp_path / "run").exists() or folders(tmp_path / "run") == []


# ---- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), 5, tokenizer=FakeTokenizer())


@pytest.fixture
def damaged(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "run" / intact.name))


FILES = (
    "MANIFEST.json",
    "config.json",
    "trainer_state.json",
    "lora_weights.safetensors",
    "image_projector.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/deeper/chat_template.jinja",
)


def assert_refused(path: Path, *words: str) -> None:
    problems = checkpoints.verify(path)
    assert problems
    for word in words:
        assert any(word in problem for problem in problems), problems
    with pytest.raises(PhiSightError) as caught:
        checkpoints.load(path)
    assert problems[0] in str(caught.value) and ";" in str(caught.value)
    with pytest.raises(PhiSightError, match="no checkpoint is intact"):
        checkpoints.find_newest(path.parent)


def test_the_list_of_files_is_complete(intact: Path) -> None:
    assert sorted(FILES) == manifest.files_below(intact)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere(damaged: Path, name: str) -> None:
    path = damaged / name
    good = path.read_bytes()
    chooser = random.Random(name)
    for place in {0, len(good) - 1, *(chooser.randrange(len(good)) for _ in range(40))}:
        bad = bytearray(good)
        bad[place] ^= 1 << chooser.randrange(8)
        path.write_bytes(bad)
        problems = checkpoints.verify(damaged)
        assert problems and name in problems[0], (place, problems)
    assert_refused(damaged, name)


@pytest.mark.parametrize("name", FILES)
def test_truncated_or_missing_or_linked(damaged: Path, name: str) -> None:
    path = damaged / name
    good = path.read_bytes()
    for length in (0, 7, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert_refused(damaged, name)
    path.write_bytes(good + b"\0")
    assert_refused(damaged, name)
    path.unlink()
    assert_refused(damaged, name, "missing")


def test_links_and_extra_files(damaged: Path) -> None:
    elsewhere = damaged.parent / "elsewhere"
    (damaged / "config.json").rename(elsewhere)
    (damaged / "config.json").symlink_to(elsewhere)
    assert_refused(damaged, "config.json: a link")
    (damaged / "config.json").unlink()
    elsewhere.rename(damaged / "config.json")
    assert checkpoints.verify(damaged) == []
    (damaged / "notes.txt").write_text("mine")
    assert_refused(damaged, "notes.txt is unexpected")


def test_edited_trainer_state(damaged: Path) -> None:
    path = damaged / "trainer_state.json"
    path.write_text(path.read_text().replace('"row": 5', '"row": 6'))
    assert_refused(damaged, "trainer_state.json: damaged or edited")


def test_another_folder_name(damaged: Path) -> None:
    other = damaged.rename(damaged.with_name("checkpoint-000900"))
    assert_refused(other, "it is of step 5, the folder's name says 900")


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    """A manifest that was changed by someone who knows how to seal it again."""
    body = json.loads((folder / "MANIFEST.json").read_bytes())
    change(body)
    (folder / "MANIFEST.json").write_bytes(manifest.manifest_bytes(body))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda manifest: manifest["tensors"].pop(0), "lora_A is unexpected"),
        (
            lambda manifest: manifest["tensors"].append(manifest["tensors"][0] | {"name": "new"}),
            "tensor new is missing",
        ),
        (lambda manifest: manifest["tensors"][0].update(dtype="int32"), "another dtype"),
        (lambda manifest: manifest["tensors"][0].update(shape=[8, 2]), "another shape"),
        (lambda manifest: manifest["tensors"][0].update(sha256="0"), "lora_A has another sha256"),
        (lambda manifest: manifest["tensors"][0].update(mean="x"), "not a manifest"),
        (lambda manifest: manifest["files"].pop(0), "row for config.json is missing"),
        (
            lambda manifest: manifest["files"].append({"file": "../a", "size": 1}),
            "../a is unexpected",
        ),
        (lambda manifest: manifest.update(format=1), "not a manifest of format 2"),
        (lambda manifest: manifest.update(tensors=[3]), "not a manifest"),
        (lambda manifest: manifest.update(step="5"), "not a manifest"),
    ],
)
def test_a_sealed_manifest_that_lies(damaged: Path, change: Callable, words: str) -> None:
    rewrite(damaged, change)
    assert_refused(damaged, words)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"null", b"{}"])
def test_a_manifest_that_is_none(damaged: Path, data: bytes) -> None:
    (damaged / "MANIFEST.json").write_bytes(data)
    assert_refused(damaged, "MANIFEST.json")


def test_an_absurd_header_length(damaged: Path) -> None:
    path = damaged / "optimizer.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    assert_refused(damaged, "optimizer.safetensors: its safetensors header")


# ---- which one, and which go ---------------------------------------------------------------------


def test_newest_valid_tells_of_damaged_newer_ones(tmp_path: Path) -> None:
    paths = [save(tmp_path, step, keep=9) for step in (1, 20, 3)]
    assert newest(tmp_path) == (paths[1], [])
    (paths[1] / "config.json").write_text("{}")
    found, damaged = newest(tmp_path)
    assert found == paths[2] and damaged[0][0] == paths[1] and "config.json" in damaged[0][1]
    with pytest.raises(PhiSightError, match="start one with python train.py"):
        checkpoints.find_newest(tmp_path / "nothing")
    with pytest.raises(PhiSightError, match="is a checkpoint itself; name its run: "):
        checkpoints.find_newest(tmp_path / "checkpoint-000001")


@pytest.mark.parametrize(
    "file, said",
    [
        ("space.json", "which is a Space; name the run in it: .*/run"),
        ("generation_config.json", "a model for other programs; name the run it was made of"),
        ("adapter_config.json", "--import-peft"),
        ("Modelfile", "a model for other programs"),
    ],
)
def test_an_export_that_is_taken_for_a_run_is_told(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(PhiSightError, match=said):
        checkpoints.resolve(tmp_path)


def test_a_name_of_the_hub_without_its_prefix_is_told() -> None:
    with pytest.raises(PhiSightError, match="or write hf:owner/name if it is on the hub"):
        checkpoints.resolve("owner/name")


def test_the_newest_is_read_and_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1, tokenizer=FakeTokenizer())
    opened: Counter[str] = Counter()
    hashed = [0]
    open_, safe_open, sha256 = Path.open, manifest.safe_open, hashlib.sha256
    file_digest = hashlib.file_digest

    def counting_open(self: Path, *arguments, **named):
        opened[self.relative_to(path).as_posix()] += 1
        return open_(self, *arguments, **named)

    def counting_safe_open(file: Path, **named):
        opened[f"tensors of {file.name}"] += 1
        return safe_open(file, **named)

    def counting_sha256(data: bytes = b""):
        hashed[0] += memoryview(data).nbytes
        return sha256(data)

    def counting_file_digest(file, name: str):
        hashed[0] += os.fstat(file.fileno()).st_size
        return file_digest(file, name)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", counting_open)
        patch.setattr(manifest, "safe_open", counting_safe_open)
        patch.setattr(hashlib, "sha256", counting_sha256)
        patch.setattr(hashlib, "file_digest", counting_file_digest)
        loaded = checkpoints.load_newest(tmp_path)
    assert_same(loaded.state, make_state(1))
    tensor_files = [f"tensors of {stem}.safetensors" for stem in checkpoints.OWNERS]
    assert opened == dict.fromkeys([*FILES, *tensor_files], 1)  # of those, the header by itself
    seal = (path / "MANIFEST.json").read_bytes().splitlines(keepends=True)[-2:]
    assert hashed[0] == sum((path / name).stat().st_size for name in FILES) - len(b"".join(seal))


def test_pruning(tmp_path: Path) -> None:
    others = ["checkpoint-7", "checkpoint-000001-mine", "checkpoint-000002", "checkpoints", "best"]
    for name in others:  # none is a checkpoint of this run: the third holds no manifest
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "kept").touch()
    outside = save(tmp_path / "outside", 4)
    (tmp_path / "checkpoint-000004").symlink_to(outside)
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    rest = {*others, "checkpoint-000004", "outside"}
    assert set(folders(tmp_path)) - rest == {"checkpoint-000020", "checkpoint-000030"}
    save(tmp_path, 25, keep=1)  # resumed from an older one: what is newer stays
    assert set(folders(tmp_path)) - rest == {"checkpoint-000025", "checkpoint-000030"}
    assert rest <= set(folders(tmp_path)) and checkpoints.verify(outside) == []


def test_remove_all(tmp_path: Path) -> None:
    outside = save(tmp_path / "outside", 4)
    run = tmp_path / "run"
    paths = [save(run, step, keep=9) for step in (3, 1, 20)]
    assert checkpoints.checkpoints_in(run) == [paths[1], paths[0], paths[2]]
    (paths[0] / "config.json").unlink()
    (run / "checkpoint-000004").symlink_to(outside)
    (run / "metrics.jsonl").touch()
    checkpoints.remove_all(run)
    assert folders(run) == ["checkpoint-000004", "metrics.jsonl"]
    assert checkpoints.verify(outside) == []
    with pytest.raises(PhiSightError, match="cannot remove"):
        checkpoints.remove_all(tmp_path / "none")


def test_older_ones_stay_until_the_new_one_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, 1)
    seen = []

    def check(path: Path) -> list[str]:
        seen.append((path.name, first.exists()))
        return ["optimizer.safetensors: a bit is wrong"]

    monkeypatch.setattr(checkpoints, "verify", check)
    with pytest.raises(PhiSightError, match="read back different.*a bit is wrong.*check the disk"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert seen == [(f".tmp-checkpoint-000002-{os.getpid()}", True)]
    assert folders(tmp_path) == ["checkpoint-000001"]
    assert checkpoints.verify(first) == []


def test_saving_a_step_twice(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    place = path.stat().st_ino
    assert save(tmp_path, 1) == path and path.stat().st_ino == place  # the same: kept
    save(tmp_path, 1, seed=2)
    assert path.stat().st_ino != place
    assert_same(checkpoints.load(path).state, make_state(2))
    (path / "config.json").write_text("{}")
    save(tmp_path, 1, seed=2)  # the same, but damaged since
    assert checkpoints.verify(path) == [] and folders(tmp_path) == [path.name]


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_left_overs(tmp_path: Path) -> None:
    newer = save(tmp_path, 6)
    dead, live = dead_process(), os.getppid()
    gone = [
        f".tmp-checkpoint-000001-{dead}",
        f".tmp-checkpoint-000003-{os.getpid()}",
        f".old-{newer.name}-{dead}",
    ]
    stay = [f".tmp-checkpoint-000001-{live}", ".tmp-checkpoint-000001", ".tmp-mine-1"]
    for name in gone + stay:
        (tmp_path / name).mkdir()
    with tempfile.TemporaryDirectory(dir=tmp_path.parent) as elsewhere:
        aside = save(Path(elsewhere), 8).rename(tmp_path / f".old-checkpoint-000008-{dead}")
    assert newest(tmp_path) == (aside, [])
    save(tmp_path, 2)
    rest = ["checkpoint-000002", "checkpoint-000006", "checkpoint-000008"]
    assert folders(tmp_path) == sorted([*stay, *rest])


# ---- kills and failing disks ---------------------------------------------------------------------

TARGETS = (
    (os, "fsync"),
    (os, "replace"),
    (shutil, "rmtree"),
    (os, "unlink"),
    (os, "mkdir"),
    (manifest, "save_file"),
    (manifest, "file_row"),
)


def on_call(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    act: Callable[[], None],
    after: bool,
    forever: bool = False,
) -> list[int]:
    """`act` at the `number`-th call of any TARGETS, before or after the call does its work."""
    count = [0]

    def wrap(function: Callable) -> Callable:
        def wrapped(*arguments, **named):
            count[0] += 1
            now = count[0] >= number if forever else count[0] == number
            try:
                if now and not after:
                    act()
                return function(*arguments, **named)
            except OSError:
                if not named.get("ignore_errors"):
                    raise
            finally:
                if now and after:
                    act()

        return wrapped

    for module, name in TARGETS:
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))
    return count


def full_disk() -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def one_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one")
    save(run, 1, seed=1)
    return run


def assert_alive(run: Path, before: dict, step: int) -> None:
    """The run goes on from the old content or the new one, and the next save tidies up."""
    path = newest(run)[0]
    assert [checkpoints.verify(each) for each in checkpoints.checkpoints_in(run)] in (
        [[]],
        [[], []],
    )  # one or two, without a problem
    loaded = checkpoints.load(path)
    expected = (
        before
        if torch.equal(
            loaded.state["optimizer"]["layers.0.qkv_proj.lora_A.step"],
            before["optimizer"]["layers.0.qkv_proj.lora_A.step"],
        )
        else make_state(22)
    )
    assert_same(loaded.state, expected)
    final = save(run, step, seed=22)
    assert checkpoints.verify(final) == []
    assert folders(run) == [final.name]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("forever", [False, True])
def test_a_disk_that_fails_at_any_call(
    tmp_path: Path, one_saved: Path, again: bool, forever: bool
) -> None:
    step = 1 if again else 2  # other content at the same step, or the next one
    for number in range(1, 200):
        run = Path(shutil.copytree(one_saved, tmp_path / str(number)))
        with pytest.MonkeyPatch.context() as patch:
            count = on_call(patch, number, full_disk, after=False, forever=forever)
            try:
                save(run, step, seed=22)
            except PhiSightError as error:
                assert "No space left" in str(error) and str(run) in str(error)
                assert "make room" in str(error) or "check the disk" in str(error)
        if count[0] < number:
            break
        left = [name for name in folders(run) if name.startswith(f".tmp-checkpoint-{step:06d}")]
        assert forever or not left, (number, left)
        if again and not forever:  # under its own name, not set aside
            assert (run / "checkpoint-000001").is_dir()
        assert_alive(run, make_state(1), step)
    assert 20 < number < 199  # the loop reached every call, and ended


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_call(tmp_path: Path, one_saved: Path, again: bool, after: bool) -> None:
    step = 1 if again else 2
    for number in range(1, 200):
        run = Path(shutil.copytree(one_saved, tmp_path / str(number)))
        child = os.fork()
        if child == 0:  # no clean-up runs in a process that ends like this
            on_call(pytest.MonkeyPatch(), number, lambda: os._exit(9), after)
            save(run, step, seed=22)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        if status == 0:
            break
        assert_alive(run, make_state(1), step)
    assert 20 < number < 199


def test_a_really_full_disk(tmp_path: Path) -> None:
    """The kernel refuses to let any file grow beyond 8 KiB, in the middle of a tensor file."""
    save(tmp_path, 1)
    program = (
        "import resource, signal, torch, checkpoints\n"
        "from errors import run_main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "state = {stem: {'a': torch.zeros(9999)} for stem in checkpoints.OWNERS}\n"
        f"run_main(lambda: checkpoints.save({str(tmp_path)!r}, 2, state, {{}}, {{}}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "File too large" in done.stderr and "resume" in done.stderr
    assert folders(tmp_path) == ["checkpoint-000001"]
    assert checkpoints.verify(tmp_path / "checkpoint-000001") == []


def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    on_call(monkeypatch, 6, interrupt, after=False)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)
    assert folders(tmp_path) == []


# ---- random state --------------------------------------------------------------------------------


def draw() -> list:
    return [
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(3).tolist(),
        numpy.random.randn(3).tolist(),
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 700))
def test_draws_after_a_restore_are_equal(seed: int, odd: int, many: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    for _ in range(odd):  # an odd count leaves a second Gaussian waiting in python and numpy
        random.gauss(0, 1)
        numpy.random.randn()
        torch.randn(1)
    numpy.random.rand(many)
    with tempfile.TemporaryDirectory() as folder:
        state = {
            "lora_weights": {},
            "image_projector": {},
            "optimizer": {},
            "rng": rng.rng_state(),
        }
        path = checkpoints.save(folder, 0, state, {}, {})
        expected = draw()
        rng.set_rng_state(checkpoints.load(path).state["rng"])
        assert draw() == expected


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state.pop("numpy.keys"), "numpy.keys is missing"),
        (lambda state: state.update({"torch.other": state["torch.cpu"]}), "other is unexpected"),
        (
            lambda state: state.update({"torch.cpu": state["torch.cpu"][:9]}),
            r"torch.cpu is .*\(9,\)",
        ),
        (lambda state: state.update({"python.words": state["python.words"].int()}), "int32"),
        (lambda state: state.update({"python.words": -state["python.words"]}), "is not one"),
    ],
)
def test_random_state_is_strict(change: Callable, words: str) -> None:
    state = rng.rng_state()
    change(state)
    with pytest.raises(PhiSightError, match=words):
        rng.set_rng_state(state)


# ---- comparing, and the command ------------------------------------------------------------------


def process(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "checkpoints.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Callable[..., subprocess.CompletedProcess]:
    """What `process` does, without starting one."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        with pytest.raises(SystemExit) as done:
            run_main(lambda: checkpoints.main([str(argument) for argument in arguments]))
        return subprocess.CompletedProcess(arguments, done.value.code, *capsys.readouterr())

    return run


def test_exit_codes_of_a_process(tmp_path: Path) -> None:
    path, other = save(tmp_path, 3, keep=2), save(tmp_path, 4, keep=2)
    assert process("diff", path, path).returncode == 0
    assert process("diff", path, other).returncode == 1
    failed = process("diff", path, tmp_path / "none")
    assert failed.returncode == 2 and failed.stderr.startswith("error: no checkpoint in ")
    assert failed.stdout == "" and failed.stderr.count("\n") == 1


def test_diff_command(tmp_path: Path, command: Callable) -> None:
    run_a, run_b = tmp_path / "a", tmp_path / "b"
    save(run_a, 3)
    first = save(run_b, 3, trainer_state={"saved_at": "evening", "timing": {"seconds": 3}})
    same = command("diff", run_a, first)
    assert same.returncode == 0, same.stderr
    assert same.stdout == (
        "identical: 7 tensors (lora 3, projector 1, optimizer 2, rng 1), RNG, position, step 3\n"
    )
    answer = json.loads(command("diff", run_a, run_b, "--json").stdout)
    assert (answer["identical"], answer["tensors"], answer["differences"]) == (True, 7, [])
    save(run_b, 3, seed=4)
    other = command("diff", run_a, run_b)
    assert other.returncode == 1
    assert other.stdout.splitlines()[0].startswith("different: 5 differences")
    assert "lora layers.0.qkv_proj.lora_A: 16 of 16 elements differ, at most by " in other.stdout
    assert (
        "optimizer layers.0.qkv_proj.lora_A.step: 1 of 1 elements differ, at most by 1\n"
        in other.stdout
    )
    assert command("diff", run_a, tmp_path / "none").returncode == 2
    assert command("compare", run_a).returncode == 2


def test_diff_sees_what_equality_does_not(tmp_path: Path) -> None:
    def one(name: str, tensor: torch.Tensor, config: dict | None = None, **fields) -> Path:
        state = make_state() | {"image_projector": {"w": tensor}}
        return checkpoints.save(tmp_path / name, 1, state, config or CONFIG, {"step": 1, **fields})

    zero = one("zero", torch.zeros(2))
    for name, tensor, words in (
        ("minus", torch.tensor([0.0, -0.0]), "1 of 2 elements differ"),
        ("half", torch.zeros(2).half(), "against float16 (2,)"),
        ("row", torch.zeros(1, 2), "float32 (2,) against float32 (1, 2)"),
    ):
        (row,) = checkpoints.diff(zero, one(name, tensor)).differences
        assert row["owner"] == "projector" and words in row["message"]
    nan = torch.tensor([float("nan"), 1.0])
    assert checkpoints.diff(one("nan", nan), one("nan2", nan.clone())).identical
    (row,) = checkpoints.diff(zero, one("nan3", nan)).differences
    assert row["max_abs_difference"] is None
    renamed = one("renamed", torch.zeros(2), CONFIG | {"name": "other"})
    assert checkpoints.diff(zero, renamed).identical
    (row,) = checkpoints.diff(zero, one("rank", torch.zeros(2), CONFIG | {"rank": 8})).differences
    assert row == {"owner": "config", "name": "rank", "message": "4 against 8"}
    (row,) = checkpoints.diff(zero, one("place", torch.zeros(2), position={"row": 1})).differences
    assert row == {
        "owner": "trainer_state",
        "name": "position",
        "message": 'absent against {"row": 1}',
    }


def test_show_and_verify_commands(tmp_path: Path, command: Callable) -> None:
    path = save(tmp_path, 3, keep=2)
    shown = command("show", path)
    assert shown.returncode == 0, shown.stderr
    assert "step 3, verified" in shown.stdout and "last losses: [1.5, 1.25]" in shown.stdout
    assert '"torch"' in shown.stdout and "position: " in shown.stdout
    answer = json.loads(command("show", tmp_path, "--json").stdout)
    assert answer["owners"]["projector"] == {
        "tensors": 1,
        "parameters": 15,
        "bytes": 30,
        "mean": 1.0,
        "std": 0.0,
        "change": None,
    }
    values = torch.cat([tensor.flatten() for tensor in make_state(3)["lora_weights"].values()])
    assert answer["owners"]["lora"]["mean"] == pytest.approx(values.mean().item())
    assert answer["owners"]["lora"]["std"] == pytest.approx(values.std(correction=0).item())
    newer = save(tmp_path, 4, keep=2)
    (newer / "config.json").write_text("{}")
    checked = command("verify", tmp_path)
    assert checked.returncode == 1
    assert f"{newer}: damaged\n  config.json: " in checked.stdout
    assert f"{path}: intact" in checked.stdout
    assert command("verify", path).returncode == 0
    assert command("verify", tmp_path / "none").returncode == 2
    fallen_back = command("show", tmp_path)
    assert "step 3" in fallen_back.stdout and "warning: " in fallen_back.stderr


def test_show_takes_the_newest_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(paths, "PROJECT", tmp_path)  # its runs/, wherever this is typed
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PhiSightError, match="no checkpoint in runs"):
        checkpoints.main(["show"])
    for name, when in (("a", 2e9), ("b", 1e9)):
        os.utime(save(tmp_path / "runs" / name, 1), (when, when))
    assert checkpoints.main(["show"]) == 0
    assert capsys.readouterr().out.startswith("runs/a/checkpoint-000001: step 1")


def test_compare_configs() -> None:
    saved = {
        "batch_size": 8,
        "lora": {"rank": 4, "targets": ["a"]},
        "name": "x",
        "old": 1,
        "limit": float("nan"),
    }
    now = {
        "batch_size": 4,
        "lora": {"rank": 4, "targets": ("a",)},
        "name": "y",
        "new": None,
        "limit": float("nan"),
    }
    assert compare_configs(saved, now, ("name",)) == [
        "batch_size: 8 in the checkpoint, 4 now",
        "old: 1 in the checkpoint, absent now",
        "new: absent in the checkpoint, null now",
    ]
    now["lora"]["rank"] = 2
    ignored = ("name", "batch_size", "old", "new", "lora")
    assert compare_configs(saved, now, ignored) == []
    assert compare_configs(saved, now, ("rank",))[1] == "lora.rank: 4 in the checkpoint, 2 now"
