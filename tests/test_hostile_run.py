"""A run's folder whose sums are right and whose content is not; files that are no files; edited
logs. Every command ends in one line or gives an equal result, and none of them waits for ever."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import files
import manifest
from errors import PhiSightError
from model import base
from reports.curves import draw_curves
from reports.log import read_metrics


@functools.cache
def stopped() -> Path:
    """A short run that stopped after its first step, which it has logged. Tests only copy it."""
    run = runs.shared() / "stopped_and_logged"
    runs.start(run, "--stop-at-step=1", **runs.SHORT | {"log_steps": 1})
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return runs.copy_of(stopped(), tmp_path)


def newest(run: Path) -> Path:
    return checkpoints.checkpoints_in(run)[-1]


def seal(folder: Path) -> None:
    """Make the sums of a checkpoint right again, as someone does who knows how."""
    body = json.loads((folder / "MANIFEST.json").read_bytes())
    for row in body["files"]:
        row |= manifest.file_row(folder, row["file"])
    for stem in checkpoints.OWNERS:
        for name, tensor in load_file(folder / f"{stem}.safetensors").items():
            own = [r for r in body["tensors"] if r["name"] == name and stem in r["file"]]
            own[0] |= manifest.tensor_row(own[0]["file"], own[0]["owner"], name, tensor)
    (folder / "MANIFEST.json").write_bytes(manifest.manifest_bytes(body))


def edit(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    seal(folder)


def change_tensor(folder: Path, stem: str, ending: str, change: Callable) -> str:
    path = folder / f"{stem}.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith(ending))
    change(tensors[name])
    save_file(tensors, path)
    seal(folder)
    return name


def refusal(run: Path) -> str:
    """The one line in which `--resume` ends, with the run as it was."""
    before = runs.contents(run)
    with pytest.raises(PhiSightError) as caught:
        runs.resume(run)
    after = runs.contents(run)
    assert {name: after.get(name) for name in before if name != ".lock"} == {
        name: data for name, data in before.items() if name != ".lock"
    }
    return str(caught.value)


# -- sealed, and not what it should be ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("trainer_state.json", lambda s: s.clear(), "step is missing"),
        ("trainer_state.json", lambda s: s.update(step="1"), "step is '1'"),
        ("trainer_state.json", lambda s: s.update(step=2), "step is 2, the manifest says 1"),
        ("trainer_state.json", lambda s: s.update(epoch=-1), "epoch is -1"),
        ("trainer_state.json", lambda s: s.update(row=10**30), "more than 64 bits"),
        ("trainer_state.json", lambda s: s.update(finished=[1]), "finished is [1]"),
        ("trainer_state.json", lambda s: s.update(metrics_offset=None), "metrics_offset is None"),
        ("trainer_state.json", lambda s: s.pop("metrics_offset"), "metrics_offset is missing"),
        ("trainer_state.json", lambda s: s.pop("loss_scaler"), "loss_scaler is missing"),
        ("trainer_state.json", lambda s: s["loss_scaler"].update(scale=0), "loss_scaler.scale"),
        ("trainer_state.json", lambda s: s.update(window={"tokens": "a"}), "window.tokens"),
        ("trainer_state.json", lambda s: s.update(recent_losses=[None]), "recent_losses[0]"),
        ("trainer_state.json", lambda s: s.update(chain="\ud800"), "is not Unicode"),
        ("trainer_state.json", lambda s: s.update(repacked=[[0, 1]]), "repacked[0] is [0, 1]"),
        ("trainer_state.json", lambda s: s.update(schedule={"step": 1}), "schedule is {'step': 1}"),
        (
            "trainer_state.json",
            lambda s: s.update(schedule={"step": 2, "position": 1.0, "total": 9}),
            "schedule begins at step 2",
        ),
        ("config.json", lambda c: c.update(started_from={"step": "x"}), "started_from is {'step'"),
        ("config.json", lambda c: c["config"].update(features="a\0b"), "null character"),
        ("config.json", lambda c: c.clear(), "config"),
        ("config.json", lambda c: c.update(config=[]), "config is []"),
        ("config.json", lambda c: c.update(base_fingerprint=3), "base_fingerprint is 3"),
        ("config.json", lambda c: c["config"].update(seed="a"), "seed"),
        ("config.json", lambda c: c.update(world_size=0.5), "world_size is 0.5"),
        ("config.json", lambda c: c.update(deep=json.loads("[" * 99 + "]" * 99)), "deeper"),
    ],
)
def test_what_a_sealed_document_must_not_say(run, name, change, said):
    edit(newest(run), name, change)
    assert said in refusal(run)


def test_a_name_that_stands_twice(run):
    path = newest(run) / "trainer_state.json"
    path.write_text(path.read_text().replace('"epoch": 0', '"epoch": 7, "epoch": 0'))
    seal(newest(run))
    assert "'epoch' stands in an object twice" in refusal(run)


@pytest.mark.parametrize(
    ("stem", "ending", "change", "said"),
    [
        ("optimizer", ".exp_avg", lambda t: t.view(-1)[0].fill_(float("nan")), "not finite"),
        ("optimizer", ".exp_avg_sq", lambda t: t.view(-1)[0].fill_(float("inf")), "not finite"),
        ("optimizer", ".exp_avg_sq", lambda t: t.view(-1)[0].fill_(-1e-9), "negative"),
        ("optimizer", "step", lambda t: t.fill_(-1), "step is -1"),
        ("optimizer", "step", lambda t: t.fill_(99), "step is 99, of a run of 1 steps"),
        ("lora_weights", "lora_B", lambda t: t.view(-1)[0].fill_(float("nan")), "not finite"),
        ("image_projector", "bias", lambda t: t[0].fill_(float("-inf")), "not finite"),
        ("rng", "numpy.position", lambda t: t[0].fill_(10**6), "out of range"),
        ("rng", "numpy.keys", lambda t: t[0].fill_(-1), "out of range"),
        ("rng", "numpy.cached_gaussian", lambda t: t.fill_(float("nan")), "not finite"),
    ],
)
def test_values_that_would_spoil_the_next_step(run, stem, ending, change, said):
    folder = newest(run)
    change_tensor(folder, stem, ending, change)
    if stem in ("lora_weights", "image_projector"):  # else the log tells before they are loaded
        log = read_metrics(run / "metrics.jsonl")
        assert log and "weights" in refusal(run)
        with pytest.raises(PhiSightError, match=said):
            runs.Assistant.load(folder)
    else:
        assert said in refusal(run)


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, each in inner:
        found.append((*path, key))
        if isinstance(each, dict | list):
            found += leaves(each, (*path, key))
    return found


ODD = (None, True, -1, 10**400, 1e308, float("nan"), "", "\ud800", "x" * 300, [], {}, [[]])


@pytest.mark.parametrize("name", ["MANIFEST.json", "trainer_state.json", "config.json"])
def test_any_field_may_hold_anything(run, name, capsys):
    """Reading, showing, verifying and comparing: a right result, or the reason. Drawn, from a seed
    of its own."""
    drawn = random.Random(name)
    good = newest(run)
    content = json.loads((good / name).read_text())
    places = leaves(content)
    for number in range(60):
        folder = Path(shutil.copytree(good, run.parent / str(number) / good.name))
        changed = json.loads(json.dumps(content))
        *path, last = drawn.choice(places)
        node = changed
        for key in path:
            node = node[key]
        if drawn.random() < 0.2:
            node.pop(last)
        else:
            node[last] = drawn.choice(ODD)
        if name == "MANIFEST.json":
            (folder / name).write_bytes(manifest.manifest_bytes(changed))
        else:
            (folder / name).write_text(json.dumps(changed))
            seal(folder)
        for command in (["show"], ["verify"], ["diff", str(good)]):
            try:
                assert checkpoints.main([*command, str(folder), "--json"]) in (0, 1)
                assert checkpoints.main([*command, str(folder)]) in (0, 1)
            except PhiSightError as error:
                assert str(error).encode() and "\n" not in str(error)
        capsys.readouterr()
        shutil.rmtree(folder.parent)


# -- no regular file ------------------------------------------------------------------------------


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_pipe, make_socket, link_to_device, Path.mkdir])
def test_what_is_no_file_is_told_and_not_waited_for(run, tmp_path, make):
    """In a process that is ended if it waits."""
    folder = newest(run)
    places = [
        run / "metrics.jsonl",
        run / ".lock",
        folder / "MANIFEST.json",
        folder / "config.json",
        folder / "rng.safetensors",
        folder / "tokenizer" / "tokenizer.json",
    ]
    program = (
        "import sys, runs, checkpoints\n"
        "from errors import PhiSightError\n"
        "from pathlib import Path\n"
        "for run in map(Path, sys.argv[1:]):\n"
        "    for act in (lambda: runs.resume(run), lambda: checkpoints.verify_run(run)):\n"
        "        try:\n"
        "            print('gave', act())\n"
        "        except PhiSightError as error:\n"
        "            print('refused', error)\n"
    )
    copies = []
    for number, place in enumerate(places):
        copied = Path(shutil.copytree(run, tmp_path / f"copy{number}"))
        here = copied / place.relative_to(run)
        here.unlink(missing_ok=True)
        make(here)
        copies.append(copied)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, copies)],
        cwd=runs.ROOT,
        env=runs.environment() | {"PYTHONPATH": f"{runs.ROOT}:{runs.ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    resumed = done.stdout.splitlines()[::2]
    assert len(resumed) == len(places)
    for place, said in zip(places, resumed, strict=True):
        assert said.startswith("refused") and place.name in said, (place, said)


def test_a_checkpoint_that_is_a_link_gives_way(run, tmp_path):
    folder = newest(run)
    elsewhere = folder.rename(tmp_path / folder.name)
    folder.symlink_to(elsewhere)
    assert "is a link" in refusal(run)
    assert checkpoints.verify(folder) and checkpoints.verify(elsewhere) == []
    named = tmp_path / "my-favourite"
    named.symlink_to(elsewhere)  # a person's own name for it is followed
    assert checkpoints.resolve(named).step == 1


@pytest.mark.parametrize("make", [make_pipe, Path.mkdir])
def test_a_base_whose_config_is_no_file(tmp_path, make):
    make(tmp_path / "config.json")
    with pytest.raises(PhiSightError, match="config.json: is a .*, not a regular file"):
        base.read_config(tmp_path)


# -- logs -----------------------------------------------------------------------------------------


def test_a_digit_of_the_log_that_was_changed_stops_a_resume(run):
    log = run / "metrics.jsonl"
    text = log.read_text()
    loss = json.loads(text.splitlines()[0])["loss"]
    digit = str(loss)[-1]
    log.write_text(text.replace(str(loss), str(loss)[:-1] + ("1" if digit != "1" else "2")))
    assert "line 1 (step 1): does not follow from the lines before it" in refusal(run)


@pytest.mark.parametrize("kind", ["a later step", "the same step", "half a line", "no JSON"])
def test_what_stands_behind_the_saved_place_is_cut_off(kind, run, tmp_path, capsys):
    whole = runs.copy_of(stopped(), tmp_path / "whole")
    log = run / "metrics.jsonl"
    line = log.read_bytes().splitlines(keepends=True)[-1]
    added = {
        "a later step": line.replace(b'"step":1', b'"step":2'),
        "the same step": line,
        "half a line": line[:20],
        "no JSON": b"\0" * 9 + b"\n",
    }[kind]
    with log.open("ab") as file:
        file.write(added)
    capsys.readouterr()
    assert runs.resume(run) == 0 and runs.resume(whole) == 0
    out = capsys.readouterr().out
    assert out.count("are cut off") == 1
    assert f"metrics.jsonl: {len(added):,} bytes that were logged after step 1" in out
    found = checkpoints.diff(run, whole)
    assert found.identical and found.parted is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind":"train","step":' + b"9" * 400 + b',"loss":1}',
        b'{"kind":"train","step":1,"loss":' + b"9" * 400 + b"}",
        b'{"kind":"train","step":"x"}',
        b'{"kind":"train","step":1,"step":2}',
        b'{"kind":[],"step":1}',
        b'{"kind":"train","step":1,"gradient_norms":3}',
        b'{"kind":"evaluation","step":1,"alignment":[1]}',
        b'{"step":1,"chain":7}',
        b'{"step":1,"non_finite":[3]}',
        b"[" * 9000,
        b'{"a":"' + b"x" * 2**20 + b'"}',
    ],
)
def test_a_record_that_is_none_is_named_by_its_line(tmp_path, line):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"kind":"train","step":1,"loss":2.0}\n' + line + b"\n")
    with pytest.raises(PhiSightError, match="metrics.jsonl: line 2 is "):
        draw_curves(log, tmp_path / "curves.png")


def test_numbers_at_the_edge_are_drawn_or_left_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    losses = (1e308, -1e308, 1)
    records = [{"kind": "train", "step": s, "loss": x} for s, x in enumerate(losses)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_curves(log, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


# -- what killed processes left -------------------------------------------------------------------


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_every_start_tidies_up(tmp_path):
    """A run that was killed at its last save is finished: it is only looked at."""
    run = runs.copy_of(runs.finished_run(), tmp_path)
    expected = {name: hashlib.sha256(d).digest() for name, d in runs.contents(run).items()}
    older, last = checkpoints.checkpoints_in(run)
    dead = dead_process()
    unpruned = json.loads((older / "MANIFEST.json").read_bytes())["step"] - 1
    state = checkpoints.load(older)
    checkpoints.save(
        run,
        unpruned,
        state.state,
        state.config,
        state.trainer_state | {"step": unpruned},
        keep=9,
    )
    (run / "LATEST").write_text(last.name)
    (run / ".tmp-LATEST").write_text(last.name)
    (run / f".tmp-LATEST-{dead}").write_text(last.name)
    (run / f".tmp-checkpoint-000005-{dead}").write_text("a plain file")
    (run / f".old-checkpoint-000007-{dead}").write_text("a plain file")
    (run / f".tmp-curves.png-{dead}.0123456789abcdef").write_bytes(b"half")
    make_pipe(run / f".tmp-checkpoint-000006-{dead}")
    (run / f".tmp-checkpoint-000008-{dead}").mkdir()
    mine = [".tmp-mine-1", f".tmp-checkpoint-000009-{os.getppid()}", "notes.txt"]
    for name in mine:
        (run / name).write_text("mine")
    assert runs.resume(run) == 0
    found = {name: hashlib.sha256(d).digest() for name, d in runs.contents(run).items()}
    found = {name: digest for name, digest in found.items() if name not in mine}
    assert found.keys() == expected.keys()
    assert {n: d for n, d in found.items() if "checkpoint-" in n} == {
        n: d for n, d in expected.items() if "checkpoint-" in n
    }
    assert all((run / name).exists() for name in mine)


def test_a_start_sweeps_the_feature_store_and_what_is_remembered(tmp_path):
    from data.features import FeatureStore

    store = FeatureStore(tmp_path, "key", (2, 3))
    dead = files.writer().replace(str(os.getpid()), str(dead_process()))
    (tmp_path / "pictures").mkdir(exist_ok=True)
    left = [store.folder / f"shard-00000.partial-{dead}", tmp_path / f"pictures/.tmp-a-{dead}"]
    for path in left:
        path.write_bytes(b"half")
    FeatureStore(tmp_path, "key", (2, 3))
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(
    ("hashes", "checks"),
    [([["a"]], [1]), ({"a": 1}, [1]), (["a"], ["1"]), (3, 3), (["a"], [-1]), (None, None)],
)
def test_a_shard_whose_header_is_none_is_named(tmp_path, hashes, checks):
    from data.features import FeatureStore

    store = FeatureStore(tmp_path, "key", (2, 3))
    header = {"hashes": json.dumps(hashes), "checks": json.dumps(checks)}
    path = store.folder / "shard-00000.safetensors"
    save_file({"features": torch.zeros(1, 2, 3, dtype=torch.float16)}, path, header)
    with pytest.raises(PhiSightError, match="shard-00000.*not a readable feature shard"):
        FeatureStore(tmp_path, "key", (2, 3))
    path.unlink()
    make_pipe(path)
    with pytest.raises(PhiSightError, match="is a pipe, not a regular file"):
        FeatureStore(tmp_path, "key", (2, 3))
