"""Data sets of the hub: which files are fetched, that they are the right ones, and that a run keeps
to the commit that it began with."""

from __future__ import annotations

import json
from pathlib import Path

import boxed
import hub_server
import pytest
import runs
from huggingface_hub import constants

import checkpoints
import config_values
from data.containers import read_records
from data.hub_sets import data_set, parse
from data.pictures import PictureFolders
from data.sources import pinned, read_conversations, sources
from errors import PhiSightError

NAME = "them/set"
KEY = hub_server.DATASETS + NAME


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_server.in_place_of_the_hub(monkeypatch, tmp_path / "home") as server:
        yield server


@pytest.fixture(scope="module")
def records(world) -> list[dict]:
    found = json.loads((world / "train.json").read_text())
    return list({record["image"]: record for record in found}.values())


@pytest.fixture(scope="module")
def repository(records, world) -> dict[str, bytes]:
    """An image folder with two splits, and what is no data."""
    files = {"README.md": b"# A set", "code.py": b"raise SystemExit", "model.safetensors": b"x"}
    for split, given in (("train", records), ("test", records[:2])):
        lines = [{"file_name": r["image"], "conversations": r["conversations"]} for r in given]
        files[f"{split}/metadata.jsonl"] = "".join(json.dumps(r) + "\n" for r in lines).encode()
        for record in given:
            content = (world / "images" / record["image"]).read_bytes()
            files[f"{split}/{record['image']}"] = content
    return files


def put(server: hub_server.Hub, files: dict[str, bytes]) -> str:
    return server.put(KEY, files)


def refusal(name: str = f"hf:{NAME}") -> str:
    with pytest.raises(PhiSightError) as error:
        data_set(name)
    assert "\n" not in str(error.value) and ";" in str(error.value)
    return str(error.value)


def test_only_data_for_training_are_fetched_and_pictures_are_where_they_are_named(
    server, repository, records, world, tmp_path
):
    commit = put(server, repository)
    where = PictureFolders((), tmp_path / "u")
    [source] = sources((f"hf:{NAME}:0.5",), where, "")
    assert source.weight == 0.5
    assert set(server.fetched()) == {name for name in repository if name.startswith("train/")}
    found = [conversation for _, conversation in read_conversations(source, [])]
    assert len(found) == len(records)
    for conversation, record in zip(found, records):
        [name] = conversation.images
        assert name == f"#hub/them--set/{commit}/train/{record['image']}"
        content = (world / "images" / record["image"]).read_bytes()
        assert where.path_of(name).read_bytes() == content
    # With a folder of other pictures for all sources, its own are found all the same.
    [beside] = sources((f"hf:{NAME}",), PictureFolders([world / "images"]), "")
    assert next(read_conversations(beside, []))[1].images == found[0].images


def test_a_json_file_of_the_hub_names_pictures_of_the_image_folder(
    server, records, world, tmp_path
):
    put(server, {"a/b.json": json.dumps(records).encode(), "a/other.json": b"[]", "c.json": b"[]"})
    name = f"hf:{NAME}/a/b.json"
    [source] = sources((name,), PictureFolders([world / "images"]), "")
    assert server.fetched() == ["a/b.json"] * 2  # HEAD and GET
    assert next(read_conversations(source, []))[1].images == (records[0]["image"],)
    assert {p.name for p in data_set(f"hf:{NAME}/a").path.iterdir()} == {"b.json", "other.json"}


def test_a_branch_is_followed_once_and_a_commit_needs_no_network(server, repository, monkeypatch):
    first = put(server, repository)
    assert pinned((f"hf:{NAME}:2", "a.json:3")) == [f"hf:{NAME}@{first}:2", "a.json:3"]
    second = put(server, repository | {"train/x.md": b""})
    asked = len(server.asked)
    assert data_set(f"hf:{NAME}@{first}").name == f"hf:{NAME}@{first}"
    assert len(server.asked) == asked
    assert data_set(f"hf:{NAME}").name == f"hf:{NAME}@{second}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert data_set(f"hf:{NAME}").name == f"hf:{NAME}@{second}"
    assert "HF_HUB_OFFLINE is set" in refusal(f"hf:{NAME}@other")


def test_a_run_keeps_the_commit_that_it_began_with(server, repository, tmp_path, capsys):
    commit = put(server, repository)
    fields = runs.SHORT | {"data": f"hf:{NAME}", "images": "", "validation_fraction": 0}
    fields["features"] = tmp_path / "features"
    runs.start(tmp_path / "run", "--stop-at-step=1", **fields)
    saved = checkpoints.load_newest(str(tmp_path / "run")).config["config"]
    assert config_values.from_dict(saved, "here").data == (f"hf:{NAME}@{commit}",)
    changed = repository["train/metadata.jsonl"].replace(b"red", b"blue")
    put(server, repository | {"train/metadata.jsonl": changed})
    asked = len(server.asked)
    runs.resume(tmp_path / "run")
    assert len(server.asked) == asked and "step 2" in capsys.readouterr().out


@pytest.mark.parametrize("large", [False, True])
def test_wrong_bytes_are_not_kept(server, repository, large, tmp_path):
    name = "train-0.tar" if large else "train/metadata.jsonl"
    content = boxed.tar(tmp_path / "a.tar", [("a.json", b"{}")]).read_bytes()
    put(server, {name: content} if large else repository)
    server.served[name] = b"\1" + (content if large else repository[name])[1:]
    said = refusal()
    assert f"its file {name} has other bytes than the hub says, and was not kept" in said
    assert not any(p.is_file() for p in (tmp_path / "home/phisight/datasets").rglob("*.*l"))
    server.served.clear()
    assert data_set(f"hf:{NAME}").path.is_dir()


def test_what_cannot_be_fetched_is_told_in_one_line(server, repository, monkeypatch):
    assert "has no such repository" in refusal("hf:no/such")
    put(server, repository)
    assert "no such file or folder" in refusal(f"hf:{NAME}/none.json")
    assert "no such revision" in refusal(f"hf:{NAME}@none")
    server.sizes["train/metadata.jsonl"] = 10**12
    assert "at most 65,536 are fetched" in refusal()
    server.sizes.clear()
    put(server, {"README.md": b"x"})
    assert "holds no data that is read" in refusal()
    put(server, {"a.json": b"[]", "b.parquet": b"x"})
    assert "holds JSON and Parquet files; name one" in refusal()
    put(server, {"../../evil.json": b"[]"})
    assert "leaves the folder" in refusal()
    server.repositories[KEY].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "log in with `hf auth login`" in refusal()
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    put(server, {"a.json": b"[]"})
    assert data_set(f"hf:{NAME}").path.is_dir()
    server.status_of = lambda method, path: 0
    assert "set HF_HUB_OFFLINE=1 for what was fetched" in refusal()


@pytest.mark.parametrize(
    "name", ["a", "a/", "/b", "a/b/", "a/b/../c", "a/b//c", "a/b@", "a/b@ c", ""]
)
def test_a_name_that_cannot_be_is_refused_before_anything(name, server):
    assert refusal(f"hf:{name}") and server.asked == []


def test_the_parts_of_a_name():
    found = parse("hf:a/b/c/d.json@refs/convert/parquet")
    assert (found.repository, found.path) == ("a/b", "c/d.json")
    assert found.revision == "refs/convert/parquet" and str(found) == (
        "hf:a/b/c/d.json@refs/convert/parquet"
    )


def test_a_parquet_data_set_is_read_from_the_hub(server, records, world, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow, of requirements-extras.txt, is not installed")
    content = boxed.parquet(tmp_path / "p", records, world / "images").read_bytes()
    names = ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet")
    put(server, dict.fromkeys(names, content))
    [source] = sources((f"hf:{NAME}",), PictureFolders((), Path(tmp_path / "u")), "")
    assert len([*read_records(source.path, source.pictures)]) == len(records)
    assert set(server.fetched()) == {names[0]}
