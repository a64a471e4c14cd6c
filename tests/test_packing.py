"""A run in one archive: it goes on elsewhere to the bit, and nothing gets out of its folder."""

from __future__ import annotations

import errno
import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from test_hostile_run import seal

import archive
import checkpoints
import packing
from archive import CONTENTS, END, Member, extract, header, padding, write_archive
from errors import PhiSightError
from manifest import manifest_bytes
from reports.chain import provenance
from reports.log import read_metrics

TEN = runs.SHORT | {"max_steps": 10, "log_steps": 2, "data_fraction": 1.0}


def pack(run: Path, out: Path, *flags: str) -> Path:
    assert checkpoints.main(["pack", str(run), str(out), *flags]) == 0
    return out


def unpack(packed: Path, folder: Path) -> Path:
    assert checkpoints.main(["unpack", str(packed), str(folder)]) == 0
    return folder


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refusal(run: Path, *flags: str) -> str:
    """Why a resume is refused."""
    with pytest.raises(PhiSightError) as error:
        runs.resume(run, *flags)
    return str(error.value)


# -- a run goes on elsewhere ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> dict[str, Path]:
    """A run of ten steps that never stopped, and one that stopped after five, was packed with all
    that it was made of, and whose machine is gone then."""
    folder = tmp_path_factory.mktemp("packed")
    machine = folder / "machine"
    places = {
        "base": Path(shutil.copytree(runs.BASE, machine / "base")),
        "vision": Path(shutil.copytree(runs.VISION, machine / "vision")),
        "images": Path(shutil.copytree(runs.world() / "images", machine / "images")),
        "data": Path(shutil.copy(runs.world() / "train.json", machine / "train.json")),
        "features": machine / "features",
    }
    fields = TEN | places
    runs.start(folder / "whole", **fields)
    runs.start(machine / "run", "--stop-at-step=5", **fields)
    made = {
        "whole": folder / "whole",
        "all": pack(
            machine / "run", folder / "all.tar", "--with-base", "--with-vision", "--with-data"
        ),
        "again": pack(
            machine / "run", folder / "b.tar", "--with-base", "--with-vision", "--with-data"
        ),
        "alone": pack(machine / "run", folder / "alone.tar"),
        "machine": folder / "gone",
    }
    machine.rename(made["machine"])
    return made


def test_a_packed_run_goes_on_to_the_bit(elsewhere, tmp_path, capsys):
    run = unpack(elsewhere["all"], tmp_path / "there")
    said = capsys.readouterr().out
    assert f"train.py --resume --run {run}\n" in said and "not found here" not in said
    assert (run / "README.md").read_text().startswith("---\n")
    runs.resume(run, f"--features={tmp_path / 'features'}")
    assert "warning" not in capsys.readouterr().out
    whole, gone_on = checkpoints.resolve(elsewhere["whole"]), checkpoints.resolve(run)
    assert provenance(gone_on) == provenance(whole) and gone_on.step == 10
    assert read_metrics(run / "metrics.jsonl")[-1]["chain"] == provenance(whole)["chain"]
    found = checkpoints.diff(elsewhere["whole"], run).differences
    assert {one["name"].removeprefix("config.") for one in found} == {
        "base",
        "vision",
        "images",
        "data",
        "features",
    }
    # Moved again, it is found by where the run lies now, not by where it was when it was saved.
    moved = Path(shutil.move(run, tmp_path / "moved"))
    shutil.rmtree(elsewhere["machine"] / "base", ignore_errors=True)
    assert packing.packed_parts(moved)["base"] == str(moved / "packed/base")
    assert checkpoints.main(["verify", str(moved)]) == 0


def test_without_its_parts_it_says_what_to_give(elsewhere, tmp_path, capsys):
    run = unpack(elsewhere["alone"], tmp_path / "there")
    said = capsys.readouterr().out
    for name in ("base", "vision", "data", "images"):
        assert f"--{name} ..." in said
    assert str(elsewhere["machine"].parent) not in said.replace(str(run), "")
    assert "there is no such folder" in refusal(run)
    gone = elsewhere["machine"]
    other = tmp_path / "other.json"
    flags = [f"--vision={runs.VISION}", f"--images={gone / 'images'}", f"--base={runs.BASE}"]
    assert "no such file; give --data FILE" in refusal(run, *flags)
    records = json.loads((gone / "train.json").read_text())
    other.write_text(json.dumps(records[1:]))
    assert "data_fingerprint" in refusal(run, *flags, f"--data={other}")
    assert runs.newest_step(run) == 5


def test_what_would_be_other_data_there_is_not_packed(elsewhere, tmp_path):
    gone = elsewhere["machine"]
    saved, images = checkpoints.resolve(gone / "run"), (str(gone / "images"),)
    as_it_is = runs.configs.replace(runs.configs.default_config("tiny"), images=images)

    def packed(data: str) -> list[Member]:
        return list(packing._data(runs.configs.replace(as_it_is, data=(data,)), saved))

    records = json.loads((gone / "train.json").read_text())
    assert len(packed(str(gone / "train.json"))) > 1
    with pytest.raises(PhiSightError, match="how often .*train.json is taken is not packed"):
        packed(f"{gone / 'train.json'}:2")
    records[0]["image"] = str(gone / "images" / records[0]["image"])
    (tmp_path / "absolute.json").write_text(json.dumps(records))
    with pytest.raises(
        PhiSightError, match="absolute.json record 1 names a picture by an absolute"
    ):
        packed(str(tmp_path / "absolute.json"))


def test_a_weight_is_not_taken_for_a_missing_file(elsewhere, tmp_path):
    run = unpack(elsewhere["alone"], tmp_path / "there")
    config = runs.configs.replace(
        runs.configs.default_config("tiny"), data=(f"{runs.world() / 'train.json'}:0.5",)
    )
    assert "--data" not in packing._what_next(run, checkpoints.resolve(run), config)


def test_the_same_run_gives_the_same_bytes(elsewhere, tmp_path):
    assert elsewhere["all"].read_bytes() == elsewhere["again"].read_bytes()
    with tarfile.open(elsewhere["all"]) as usual:  # other programs read it too
        members = usual.getmembers()
        assert all(one.isreg() and not one.mtime and not one.uid for one in members)
        names = [one.name for one in members]
    assert names[0] == CONTENTS and not any("lock" in name or ".bin" in name for name in names)
    assert {"examples/example_1.png", "examples/example_1.txt"} <= set(names)  # with the pictures
    with tarfile.open(elsewhere["alone"]) as alone:
        assert not any(name.startswith("examples") for name in alone.getnames())


def test_an_archive_is_never_written_over(elsewhere, tmp_path):
    taken = tmp_path / "taken.tar"
    taken.write_bytes(b"mine")
    with pytest.raises(PhiSightError, match="is there already"):
        pack(runs.stopped_run(), taken)
    assert taken.read_bytes() == b"mine"
    with pytest.raises(PhiSightError, match="is there already"):
        unpack(elsewhere["alone"], tmp_path)
    assert left(tmp_path) == {"taken.tar"}


def test_what_is_not_the_runs_is_not_packed(tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    other = Path(shutil.copytree(runs.BASE, run / "packed/base"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    with pytest.raises(PhiSightError, match="is not the one that the run was trained with"):
        pack(run, tmp_path / "out.tar", "--with-base")
    (checkpoints.checkpoints_in(run)[-1] / "config.json").write_text("{}")
    with pytest.raises(PhiSightError, match="config.json"):
        pack(run, tmp_path / "out.tar")
    with pytest.raises(PhiSightError, match="no checkpoint in"):
        pack(tmp_path / "nothing", tmp_path / "out.tar")
    assert left(tmp_path) == {"run"}


# -- archives of strangers ------------------------------------------------------------------------


def small(folder: Path) -> bytes:
    """An archive of three files."""
    members = [Member("a.json", b"{}"), Member("b/c", b"x" * 700), Member("d" * 120, b"")]
    write_archive(folder / "small.tar", members)
    return (folder / "small.tar").read_bytes()


def refused(data: bytes, folder: Path) -> str:
    """Why `extract` refuses these bytes."""
    (folder / "given.tar").write_bytes(data)
    (folder / "into").mkdir(exist_ok=True)
    with pytest.raises(PhiSightError) as error:
        extract(folder / "given.tar", folder / "into", lambda name: "")
    shutil.rmtree(folder / "into")
    assert left(folder) <= {"given.tar", "small.tar"}, "nothing lies outside"
    assert "\n" not in str(error.value)
    return str(error.value)


@given(st.data())
def test_no_changed_byte_passes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    whole = small(folder)
    place = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.integers(1, 255))
    refused(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :], folder)
    refused(whole[:place], folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole + whole,
        lambda whole: whole + b"\0",
        lambda whole: whole + bytes(10240),
        gzip.compress,
        lambda whole: b"",
        lambda whole: b"PK\3\4" + whole,
        lambda whole: whole[512:],
        lambda whole: whole[:-1] + b"\1",
        lambda whole: whole.replace(b'"size": 2', b'"size":2 ', 1),
    ],
    ids=[
        "twice",
        "a byte more",
        "blocks more",
        "compressed",
        "empty",
        "zip",
        "without a head",
        "another end",
        "a manifest that is not sealed",
    ],
)
def test_an_archive_is_all_of_the_file(tmp_path, change: Callable[[bytes], bytes]):
    assert "no archive of checkpoints.py pack" in refused(change(small(tmp_path)), tmp_path)


def sealed(files: list[dict[str, Any]], rest: bytes) -> bytes:
    """An archive whose manifest is right in itself."""
    contents = manifest_bytes({"format": 1, "files": files})
    return header(CONTENTS, len(contents)) + contents + padding(len(contents)) + rest


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "./a",
        "a/",
        "",
        "a\0b",
        "a\nb",
        "x" * 256,
        "a/" * 2100 + "b",
        "a/" * 32 + "b",
        CONTENTS,
    ],
)
def test_a_name_that_leaves_the_folder_or_is_none(tmp_path, name):
    row = {"name": name, "size": 0, "sha256": EMPTY}
    said = refused(sealed([row], header("a", 0) + END), tmp_path)
    assert "the name " in said or "stands another header" in said
    with pytest.raises(PhiSightError, match="the name"):
        write_archive(tmp_path / "out.tar", [Member(name, b"")])
    assert "out.tar" not in left(tmp_path)


def test_a_row_says_nothing_else(tmp_path):
    row = {"name": "a", "size": 0, "sha256": EMPTY, "mode": 0o4755}
    assert CONTENTS in refused(sealed([row], header("a", 0) + END), tmp_path)


@pytest.mark.parametrize("names", [["a", "a"], ["a", "a/b"], ["b", "a"]])
def test_names_that_are_in_each_others_way(tmp_path, names):
    rows = [{"name": name, "size": 0, "sha256": EMPTY} for name in names]
    refused(sealed(rows, b"".join(header(name, 0) for name in names) + END), tmp_path)


def member_of(kind: bytes, **fields: Any) -> bytes:
    made = tarfile.TarInfo("a")
    made.type, made.mode = kind, 0o644
    for name, value in fields.items():
        setattr(made, name, value)
    return made.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "given_header",
    [
        member_of(tarfile.SYMTYPE, linkname="/etc/passwd"),
        member_of(tarfile.LNKTYPE, linkname="PACK.json"),
        member_of(tarfile.CHRTYPE, devmajor=1, devminor=5),
        member_of(tarfile.BLKTYPE),
        member_of(tarfile.FIFOTYPE),
        member_of(tarfile.DIRTYPE),
        member_of(tarfile.CONTTYPE),
        member_of(tarfile.GNUTYPE_SPARSE),
        member_of(tarfile.XHDTYPE),
        member_of(tarfile.XGLTYPE),
        member_of(tarfile.REGTYPE, mode=0o4755),
        member_of(tarfile.REGTYPE, uid=1000),
        member_of(tarfile.REGTYPE, mtime=1),
        member_of(tarfile.REGTYPE, name="../a"),
        member_of(tarfile.REGTYPE, name="a" * 200),
        member_of(tarfile.REGTYPE, size=2**40),
    ],
)
def test_every_kind_of_member_but_a_plain_file(tmp_path, given_header):
    row = {"name": "a", "size": 0, "sha256": EMPTY}
    body = given_header.ljust(512, b"\0")
    said = refused(sealed([row], body + END), tmp_path)
    assert "another header" in said or "and should have" in said


def test_archives_of_other_programs(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x").write_bytes(b"y")
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w", format=form, pax_headers={"a": "ä"}) as usual:
            usual.add(tmp_path / "in/x", CONTENTS)
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        assert "does not begin with" in refused(made.getvalue(), tmp_path)
        (tmp_path / "in").mkdir()
        (tmp_path / "in/x").write_bytes(b"y")


def test_an_archive_that_is_larger_than_the_disk_is_not_begun(tmp_path, monkeypatch):
    (tmp_path / "small.tar").write_bytes(small(tmp_path))
    usage = shutil.disk_usage(tmp_path)._replace(free=699)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    (tmp_path / "into").mkdir()
    with pytest.raises(PhiSightError, match="takes 24,576 bytes, and the disk has 699; make room"):
        extract(tmp_path / "small.tar", tmp_path / "into", lambda name: "")
    assert not left(tmp_path / "into")
    with pytest.raises(PhiSightError, match="make room"):
        pack(runs.stopped_run(), tmp_path / "deep/out.tar")
    assert left(tmp_path) == {"small.tar", "into"}
    # What its manifest claims counts, not what the file has.
    claimed = {"name": "a", "size": 2**60, "sha256": EMPTY}
    assert "and should have" in refused(sealed([claimed], header("a", 2**60) + END), tmp_path)


NAMES = st.lists(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1, max_size=4
)


@given(NAMES, st.binary(max_size=1500))
def test_whatever_is_packed_comes_back_below_the_folder(tmp_path_factory, names, content):
    folder = tmp_path_factory.mktemp("names")
    try:
        write_archive(folder / "out.tar", [Member(name, content) for name in names])
    except PhiSightError:
        assert left(folder) == set()
        return
    (folder / "into").mkdir()
    extract(folder / "out.tar", folder / "into", lambda name: "")
    assert runs.contents(folder / "into") == dict.fromkeys(names, content)
    assert left(folder) == {"out.tar", "into"}


# -- runs of strangers ----------------------------------------------------------------------------


def strange(folder: Path, packed: Path, change: Callable[[dict[str, bytes]], None]) -> str:
    """Why a run is refused whose archive is right in itself and whose files were changed."""
    (folder / "plain").mkdir()
    extract(packed, folder / "plain", lambda name: "")
    content = runs.contents(folder / "plain")
    shutil.rmtree(folder / "plain")
    change(content)
    write_archive(folder / "strange.tar", [Member(*each) for each in content.items()])
    with pytest.raises(PhiSightError) as error:
        unpack(folder / "strange.tar", folder / "there")
    assert left(folder) == {"strange.tar"}, "nothing is left of it"
    assert ".tmp" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-0000001/config.json",
        "train.py",
        "checkpoint-000005/code.py/x",
        "checkpoint-5/config.json",
        "packed/base/model.py",
        "packed/base/pytorch_model.bin",
        "packed/base/sub/config.json",
        "packed/vision/x.pt",
        ".lock",
        "checkpoint-000005/.hidden",
        "packed/other",
        "examples/a.py",
        "examples/a/b.png",
    ],
)
def test_a_run_has_files_of_known_names_alone(elsewhere, tmp_path, name):
    said = strange(tmp_path, elsewhere["alone"], lambda content: content.update({name: b""}))
    assert "is of no file of a run" in said


def test_a_run_that_does_not_verify_is_not_unpacked(elsewhere, tmp_path):
    def no_checkpoint(content: dict[str, bytes]) -> None:
        for name in [name for name in content if name.startswith("checkpoint")]:
            del content[name]

    def damaged(content: dict[str, bytes]) -> None:
        content["checkpoint-000005/lora_weights.safetensors"] += b"\0"

    def edited_log(content: dict[str, bytes]) -> None:
        content["metrics.jsonl"] = content["metrics.jsonl"].replace(b'"step":2', b'"step":1', 1)

    for number, (change, reason) in enumerate(
        ((no_checkpoint, "no checkpoint"), (damaged, "lora_weights"), (edited_log, "line 1"))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert reason in strange(folder, elsewhere["alone"], change)


def test_a_checkpoint_that_is_none_of_a_run_is_told(tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    newest = checkpoints.checkpoints_in(run)[-1]
    config = json.loads((newest / "config.json").read_text())
    del config["base_fingerprint"]
    (newest / "config.json").write_text(json.dumps(config))
    seal(newest)
    with pytest.raises(PhiSightError, match="base_fingerprint"):
        pack(run, tmp_path / "out.tar")


# -- the disk -------------------------------------------------------------------------------------


class Full(io.FileIO):
    """A file on a disk that takes a few thousand bytes more."""

    room = 5000

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_a_full_disk_is_one_line_and_leaves_nothing(elsewhere, tmp_path, monkeypatch, command):
    usual = Path.open

    def opened(path: Path, mode: str = "r", *more: Any, **settings: Any) -> Any:
        full = mode in ("wb", "xb") and tmp_path in path.parents
        return Full(path, mode) if full else usual(path, mode, *more, **settings)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(PhiSightError, match="No space left on device.*; make room") as error:
        if command == "pack":
            pack(runs.stopped_run(), tmp_path / "deep/out.tar")
        else:
            unpack(elsewhere["alone"], tmp_path / "deep/there")
    assert "\n" not in str(error.value) and not left(tmp_path)


def test_a_file_that_changes_while_it_is_packed(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    hashed = archive._row_of

    def then_changed(member: Member) -> archive.Row:
        row = hashed(member)
        file.write_bytes(b"two")
        return row

    monkeypatch.setattr(archive, "_row_of", then_changed)
    with pytest.raises(PhiSightError, match="was changed while it was packed"):
        write_archive(tmp_path / "out.tar", [Member("file", file)])
    assert left(tmp_path) == {"file"}


def test_a_file_that_is_removed_while_it_is_packed(tmp_path, monkeypatch):
    """By the training that it is of, which keeps one checkpoint."""
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    hashed, read = archive._row_of, checkpoints.records_of

    def then_gone(member: Member) -> archive.Row:
        if member.name.endswith("rng.safetensors"):
            shutil.rmtree(run / "checkpoint-000001")
        return hashed(member)

    def gone_before(checkpoint: checkpoints.Checkpoint) -> list[dict]:
        shutil.rmtree(checkpoint.path)
        return read(checkpoint)

    for module, name, removing in (
        (archive, "_row_of", then_gone),
        (checkpoints, "records_of", gone_before),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, removing)
            with pytest.raises(PhiSightError, match="was changed while it was packed"):
                pack(run, tmp_path / "out.tar")
        assert left(tmp_path) == {"run"}
        shutil.copytree(runs.stopped_run(), run, dirs_exist_ok=True)


def test_what_a_training_saves_while_it_is_packed_stays_out(tmp_path, monkeypatch):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    verified = checkpoints._verified

    def then_trained(folder: Path) -> checkpoints.Checkpoint:
        found = verified(folder)
        runs.resume(run, "--keep-checkpoints=2")
        return found

    monkeypatch.setattr(checkpoints, "_verified", then_trained)
    packed = pack(run, tmp_path / "out.tar")
    assert len(checkpoints.checkpoints_in(run)) == 2
    monkeypatch.undo()
    assert runs.newest_step(unpack(packed, tmp_path / "there")) == 1


@pytest.mark.parametrize("name", ["checkpoint-000001", "best"])
def test_a_checkpoint_alone_is_not_packed(tmp_path, name):
    with pytest.raises(PhiSightError, match="is a checkpoint; pack its run"):
        pack(runs.stopped_run() / name, tmp_path / "out.tar")


def test_folders_are_room_too():
    """A manifest of some bytes may name a great many of them, and files of no size."""
    rows = [archive.Row(name, size, "") for name, size in (("a/b/c", 0), ("a/b/d", 1), ("a/e", 1))]
    assert archive.room_of(rows) == archive.PAGE * (2 + 3 + 2), "a and a/b; c, d and e; two pages"


def test_a_path_that_is_none_is_refused_with_the_run(elsewhere, tmp_path):
    for number, path in enumerate(("x" * 5000, "x/" * 2500, "x" * 256)):
        folder = tmp_path / str(number)
        folder.mkdir()

        def changed(content: dict[str, bytes], path: str = path) -> None:
            name = max(name for name in content if name.endswith("/config.json"))
            (folder / "c").mkdir()
            for file, data in content.items():
                if file.startswith(name[:18]):
                    (folder / "c" / file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / "c" / file).write_bytes(data)
            config = json.loads(content[name])
            config["config"]["base"] = path
            (folder / "c" / name).write_text(json.dumps(config))
            seal((folder / "c" / name).parent)
            content |= runs.contents(folder / "c")
            shutil.rmtree(folder / "c")

        said = strange(folder, elsewhere["alone"], changed)
        assert "config field base is longer than a path can be" in said
