"""Models by their hub id: offline, with a hub that does not answer, and from its cache."""

import os
import subprocess
import sys

import huggingface_hub
import pytest
import runs
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from data.chat import load_tokenizer
from errors import PhiSightError
from model.base import find_folder, load_base
from model.vision import find_encoder, read_vision_spec

TINY = runs.ROOT / "assets/tiny"
# The three commands that look for a base, a CLIP and a tokenizer, in one process: imports are slow.
SCRIPT = """
import data.preflight, model.vision, train
from errors import run_main
for main, flags in ((train.main, ["--base=microsoft/Phi-3.5-mini-instruct", "--run=RUN"]),
                    (model.vision.main, ["--vision=openai/clip-vit-large-patch14-336"]),
                    (data.preflight.main, ["--data=DATA", "--tokenizer=microsoft/Phi-3-mini"])):
    try:
        run_main(lambda: main(flags))
    except SystemExit as end:
        print(end.code)
"""


@pytest.mark.parametrize("mode", ["offline", "unreachable"])
def test_without_a_hub_each_command_ends_with_one_line_that_says_what_would_do(tmp_path, mode):
    data = tmp_path / "data.json"
    data.write_text("[]")
    script = SCRIPT.replace("RUN", str(tmp_path / "run")).replace("DATA", str(data))
    given = (
        {"HF_HUB_OFFLINE": "1"}
        if mode == "offline"
        else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    )  # where nobody listens
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub")} | given,
    )
    assert done.returncode == 0 and done.stdout.split() == ["2", "2", "2"], done
    lines = done.stderr.splitlines()
    assert len(lines) == 3, done.stderr  # and so none that tells of another try
    reason = "HF_HUB_OFFLINE is set" if mode == "offline" else "Connection refused"
    for line, what, layout in zip(
        lines,
        (
            "base model microsoft/Phi-3.5-mini-instruct",
            "picture encoder openai/clip-vit-large-patch14-336",
            "tokenizer microsoft/Phi-3-mini",
        ),
        (
            "config.json, model.safetensors (or",
            "preprocessor_config.json and model.safetensors",
            "tokenizer.json and tokenizer_config.json",
        ),
        strict=True,
    ):
        assert line.startswith(f"error: {what}: it is not a folder and the hub did not give it")
        assert reason in line and layout in line and "give a folder with" in line


@pytest.fixture
def snapshots(tmp_path, monkeypatch):
    """A hub's cache, offline; returns how to put a snapshot into it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def put(repository: str, source, revision: str = "main", without: tuple[str, ...] = ()):
        place = tmp_path / f"models--{repository.replace('/', '--')}"
        commit = revision.encode().hex().ljust(40, "0")[:40]
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        snapshot = place / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in source.iterdir():
            if file.name not in without:
                (snapshot / file.name).symlink_to(file)  # as the hub links its blobs
        return snapshot

    return put


def test_a_model_in_the_hubs_cache_is_found_by_id_and_revision(snapshots):
    main = snapshots("some/phi", TINY / "phi3")
    tag = snapshots("some/phi", TINY / "phi3", "v2", without=("build_report.json",))
    clip = snapshots("some/clip", TINY / "clip")
    assert find_folder("some/phi", None) == main and find_folder("some/phi", "v2") == tag
    base = load_base("some/phi", "v2", torch.float32, "cpu")
    assert base.name == "some/phi"
    assert base.fingerprint == load_base(TINY / "phi3", None, torch.float32, "cpu").fingerprint
    assert read_vision_spec("some/clip").key == read_vision_spec(str(TINY / "clip")).key
    assert find_encoder("some/clip", None) == clip
    text = "What is red?"
    named, local = load_tokenizer("some/phi", "v2"), load_tokenizer(TINY / "phi3")
    assert named.full(text) == local.full(text)
    with pytest.raises(PhiSightError, match="HF_HUB_OFFLINE is set"):
        find_folder("some/phi", "v3")


def test_a_snapshot_that_lacks_a_file_names_it(snapshots):
    snapshots("some/phi", TINY / "phi3", without=("model.safetensors",))
    snapshots("some/clip", TINY / "clip", without=("model.safetensors",))
    with pytest.raises(PhiSightError, match=r"model\.safetensors is missing"):
        load_base("some/phi", None, torch.float32, "cpu")
    with pytest.raises(PhiSightError, match=r"model\.safetensors is missing"):
        read_vision_spec("some/clip")


def test_of_a_clip_the_pickle_is_fetched_only_where_there_is_nothing_else(tmp_path, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((revision, "pytorch_model.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_encoder("some/clip", "v1") == tmp_path
    assert asked == [("v1", False), ("v1", True)]
    (tmp_path / "model.safetensors").touch()
    asked.clear()
    find_encoder("some/clip", None)
    assert asked == [(None, False)]


@pytest.mark.parametrize("error", [OSError("no\nroute"), ValueError(), HTTPError("timed out")])
def test_whatever_the_hub_raises_is_one_error(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(PhiSightError, match="some/phi: it is not a folder and the hub did not"):
        find_folder("some/phi", None)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c"])
def test_what_can_only_be_a_folder_is_not_asked_of_the_hub(monkeypatch, name):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", None
    )  # calling it would be a TypeError
    with pytest.raises(PhiSightError, match="there is no such folder"):
        load_tokenizer(name)
