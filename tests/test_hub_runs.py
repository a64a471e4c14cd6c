"""A run onto the hub and from it, by real huggingface_hub against a hub on this machine."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hub_server
import pytest
import runs
from huggingface_hub import constants
from safetensors.torch import load_file

import checkpoints
import config as configs
import config_values
import evaluate
import export
import hub
import hub_runs
import infer
import paths
import train
from api.api import Api
from assistant.assistant import Assistant
from errors import PhiSightError
from exports import upload
from exports.published import CERTIFICATE, public_fields, without_paths, write_published

NAME = "me/tiny"
NEWEST = "checkpoint-{:06d}"


@functools.cache
def published() -> Path:
    """What `--push` would send, as a folder. Tests only read it."""
    out = runs.shared() / "published"
    push = [f"--push={NAME}", f"--run={runs.finished_run()}", f"--out={out}", "--greedy-answers=4"]
    assert export.main(push) == 0
    return out


@functools.cache
def files() -> dict[str, bytes]:
    return runs.contents(published())


def checkpoint_name() -> str:
    return NEWEST.format(runs.newest_step(published()))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub that this process and its children speak with, in an empty home."""
    with hub_server.in_place_of_the_hub(monkeypatch, tmp_path / "home") as server:
        yield server


def home() -> Path:
    """Where runs of the hub are kept on this machine."""
    return Path(constants.HF_HOME) / "phisight" / NAME.replace("/", "--")


def kept() -> list[str]:
    found = home().iterdir() if home().is_dir() else ()
    return sorted(path.name for path in found if path.is_dir() and path.name != "refs")


def push(*more: str) -> int:
    run = ["--run", str(runs.finished_run()), "--greedy-answers=4"]
    return export.main([f"--push={NAME}", *run, *more])


def refusal(action) -> str:
    with pytest.raises(PhiSightError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def fetch(run: str = f"hf:{NAME}") -> str:
    return refusal(lambda: checkpoints.resolve(run))


def answer(run: object, capsys) -> dict:
    capsys.readouterr()
    picture = runs.world() / "images/held_out_000000.png"
    asked = ["--run", str(run), "--image", str(picture), "--prompt", "What is there?", "--json"]
    assert infer.main(asked) == 0
    return json.loads(capsys.readouterr().out)


# -- there and back -------------------------------------------------------------------------------


def test_a_run_goes_to_the_hub_and_answers_from_there_as_it_does_here(server, capsys):
    assert push("--yes", "--message=The first") == 0
    said = capsys.readouterr().out
    [commit] = set(server.repositories[NAME].branches.values())
    assert f"hf:{NAME}@{commit}" in said and hub_server.TOKEN not in said
    assert server.repositories[NAME].messages == ["initial commit", "The first"]
    there = server.repositories[NAME].files
    assert {name for name in there if name != ".gitattributes"} == set(files())
    here, from_hub = answer(runs.finished_run(), capsys), answer(f"hf:{NAME}", capsys)
    assert from_hub.pop("checkpoint") == f"hf:{NAME}@{commit}"
    here.pop("checkpoint")
    for one in (here, from_hub):
        one.pop("seconds")
    assert from_hub == here
    # What was fetched is the run alone, and it is whole.
    assert set(server.fetched()) == {n for n in files() if n.startswith("check")} | {
        "metrics.jsonl"
    }
    assert kept() == [commit]
    assert checkpoints.main(["verify", f"hf:{NAME}@{commit}"]) == 0
    # The same again changes nothing, and is told as what it is.
    assert push("--yes") == 0 and len(server.repositories[NAME].messages) == 2


def test_without_yes_the_hub_is_asked_for_nothing_and_every_file_is_listed(server, capsys):
    assert push() == 0
    lines = capsys.readouterr().out.splitlines()
    assert server.asked == []
    listed = {line.split("  ")[-1]: line.split() for line in lines if line[:13].strip()}
    for name, data in files().items():
        assert int(listed[name][0].replace(",", "")) == len(data)
        if name not in ("README.md", CERTIFICATE):
            assert listed[name][1] == hashlib.sha256(data).hexdigest()
    assert "Nothing was sent: --yes does it" in lines[-1] and "public" in lines[-1]


@pytest.mark.parametrize(
    "name", ["me", "me/", "me/a/b", "me/a--b", "../x", "me/..", "me/a b", "me/x.git", ""]
)
def test_a_name_that_cannot_be_is_refused_before_anything(server, name):
    assert "cannot be a repository" in refusal(lambda: checkpoints.resolve(f"hf:{name}"))
    assert "cannot be a repository" in refusal(lambda: export.main([f"--push={name}", "--yes"]))
    assert server.asked == []


@pytest.mark.parametrize("revision", ["", "a b", "../x", "a//b", "-x", "x" * 300, "\0"])
def test_a_revision_that_cannot_be_is_refused_before_anything(server, revision):
    assert "cannot be a branch" in fetch(f"hf:{NAME}@{revision}")
    assert server.asked == []


# -- what is fetched ------------------------------------------------------------------------------


def test_branches_tags_and_commits_name_what_they_are_and_a_commit_is_asked_for_once(
    server, monkeypatch
):
    first = server.put(NAME, files())
    newer = files() | {"metrics.jsonl": files()["metrics.jsonl"] + b""}
    second = server.put(NAME, newer | {"NOTES.md": b"new"})
    server.repositories[NAME].branches["v/1"] = first
    assert checkpoints.resolve(f"hf:{NAME}@v/1").published_as == f"hf:{NAME}@{first}"
    assert checkpoints.resolve(f"hf:{NAME}").published_as == f"hf:{NAME}@{second}"
    assert kept() == sorted([first, second])
    asked = len(server.asked)
    assert checkpoints.resolve(f"hf:{NAME}@{first}").published_as == f"hf:{NAME}@{first}"
    assert len(server.asked) == asked
    assert checkpoints.resolve(f"hf:{NAME}").step and len(server.asked) == asked + 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoints.resolve(f"hf:{NAME}@v/1").published_as == f"hf:{NAME}@{first}"
    assert "never fetched" in fetch(f"hf:{NAME}@other") and len(server.asked) == asked + 1


def test_a_commit_is_that_commit(server):
    commit = server.put(NAME, files())
    server.repositories[NAME].branches["0" * 40] = commit
    assert f"another commit for it, {commit}" in fetch(f"hf:{NAME}@{'0' * 40}") and kept() == []


def test_the_longest_name_of_a_branch_is_remembered(server, monkeypatch):
    name = "/".join(["a"] * 125)
    commit = server.put(NAME, files())
    server.repositories[NAME].branches[name] = commit
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert checkpoints.resolve(f"hf:{NAME}@{name}").published_as == f"hf:{NAME}@{commit}"


def test_a_cache_that_is_only_read_serves_what_it_has(server, monkeypatch):
    server.put(NAME, files())
    checkpoints.resolve(f"hf:{NAME}")

    def refused(path, data):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(hub, "write_whole", refused)
    assert checkpoints.resolve(f"hf:{NAME}").step
    server.repositories[NAME].branches["other"] = server.repositories[NAME].branches["main"]
    assert "it cannot be kept here" in fetch(f"hf:{NAME}@other")


def test_a_folder_that_cannot_be_made_is_one_of_the_disk(server, monkeypatch, tmp_path):
    server.put(NAME, files())
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone/x")
    for folder in (tmp_path / "nowhere", "/proc/none", tmp_path / ("x" * 300)):
        monkeypatch.setattr(constants, "HF_HOME", str(folder))
        assert "set HF_HOME to another folder" in fetch()


def test_without_a_network_the_error_says_what_is_there(server, monkeypatch):
    commit = server.put(NAME, files())
    checkpoints.resolve(f"hf:{NAME}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    said = fetch()
    assert (
        "Connection refused" in said and f"HF_HUB_OFFLINE=1 for what was fetched: {commit}" in said
    )
    assert checkpoints.resolve(f"hf:{NAME}@{commit}").step


def test_of_a_repository_the_run_alone_is_fetched(server):
    older = {n.replace(checkpoint_name(), "checkpoint-000001"): d for n, d in files().items()}
    hostile = [
        f"{checkpoint_name()}/optimizer.pt",
        f"{checkpoint_name()}/tokenizer/../../../../evil.json",
        f"{checkpoint_name()}/tokenizer/code.py",
        f"../{checkpoint_name()}/MANIFEST.json",
        f"/{checkpoint_name()}/MANIFEST.json",
        "lora_weights.pkl",
        "pytorch_model.bin",
    ]
    server.put(NAME, older | files() | dict.fromkeys(hostile, b"cos\nsystem\n"))
    folder = checkpoints.resolve(f"hf:{NAME}").path.parent
    wanted = {name for name in files() if name.startswith(f"{checkpoint_name()}/")}
    assert set(runs.contents(folder)) == wanted | {"metrics.jsonl"} == set(server.fetched())


def test_a_repository_without_a_run_says_so(server):
    server.put(NAME, {"README.md": b"hello", "model.safetensors": b"x"})
    assert "holds no run" in fetch() and server.fetched() == []


def test_how_much_is_fetched_is_bounded_before_anything_is(server, monkeypatch):
    server.put(NAME, files())
    server.sizes[f"{checkpoint_name()}/lora_weights.safetensors"] = 10**13
    said = fetch()
    assert "at most 4,096 are fetched" in said and f"{hub.MAX_MIB}=" in said
    server.sizes.clear()
    monkeypatch.setenv(hub.MAX_MIB, "0")
    assert "at most 0 are fetched" in fetch()
    monkeypatch.setenv(hub.MAX_MIB, "much")
    assert "not a whole number of MiB" in fetch()
    monkeypatch.setattr(hub_runs, "MAX_LISTED", 5)
    assert "where a published run has a dozen" in fetch()
    assert server.fetched() == [] and not home().exists()


# -- what goes wrong on the way here --------------------------------------------------------------


@pytest.mark.parametrize("part", ["/metrics.jsonl", "/large/"])
def test_a_connection_that_breaks_is_gone_on_with(server, monkeypatch, part):
    # Early enough for whatever large file comes first: that of no tensors has few bytes.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 5)
    server.put(NAME, files())
    server.cuts[part] = [10]
    assert checkpoints.resolve(f"hf:{NAME}").step
    assert server.ranges == ["bytes=10-"]


def test_what_came_before_a_connection_broke_is_not_fetched_again(server):
    commit = server.put(NAME, files())
    server.cuts["/large/"] = [100] + [0] * 30
    assert "the files that came whole are kept" in fetch()
    assert kept() == [f".partial-{commit}"]
    server.cuts.clear()
    assert checkpoints.resolve(f"hf:{NAME}").step and kept() == [commit]
    assert server.fetched().count("metrics.jsonl") == 2  # HEAD and GET: what was whole is kept


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("lora_weights.safetensors", lambda data: data[:-9] + b"\1" + data[-8:]),
        ("lora_weights.safetensors", lambda data: data[:-4]),
        ("tokenizer/tokenizer.json", lambda data: data.replace(b"red", b"der", 1)),
        ("config.json", lambda data: data + b"\n"),
    ],
)
def test_other_bytes_than_the_manifest_says_are_not_kept(server, file, change):
    commit, name = server.put(NAME, files()), f"{checkpoint_name()}/{file}"
    server.served[name] = change(files()[name])
    said = fetch()
    assert kept() == [] and file.split("/")[-1] in said
    assert "not as its manifest says, and was not kept" in said
    server.served.clear()
    assert checkpoints.resolve(f"hf:{NAME}").step and kept() == [commit]


@pytest.mark.parametrize(
    "change", [lambda d: d.replace(b'"step": ', b'"step":  '), lambda d: b"{}"]
)
def test_a_manifest_that_was_edited_is_refused(server, change):
    name = f"{checkpoint_name()}/MANIFEST.json"
    server.put(NAME, files() | {name: change(files()[name])})
    assert "MANIFEST.json" in fetch() and kept() == []


def test_a_log_that_is_none_is_not_kept(server):
    server.put(NAME, files() | {"metrics.jsonl": b"no record\n"})
    said = fetch()
    assert "was not kept (metrics.jsonl: line 1 is not JSON" in said and ".partial" not in said
    assert not [*home().glob(".partial-*")]


def test_a_folder_that_has_no_steps_name_is_no_checkpoint(server):
    other = "checkpoint-0" + checkpoint_name().removeprefix("checkpoint-")
    server.put(NAME, {n.replace(checkpoint_name(), other): d for n, d in files().items()})
    assert "holds no run" in fetch() and kept() == []


def test_a_log_that_is_of_another_run_is_refused(server):
    log = files()["metrics.jsonl"]
    server.put(NAME, files() | {"metrics.jsonl": log.replace(b'"loss":', b'"loss":1', 1)})
    assert "the log was edited" in fetch() and kept() == []


def test_what_was_changed_here_since_is_refused_and_can_be_fetched_again(server):
    server.put(NAME, files())
    folder = checkpoints.resolve(f"hf:{NAME}").path
    (folder / "config.json").write_bytes(b"{}")
    assert f"remove {folder.parent}, and it is fetched again" in fetch()
    shutil.rmtree(folder.parent)
    assert checkpoints.resolve(f"hf:{NAME}").step


@pytest.mark.parametrize("where", ["/api/models/", "/resolve/"])
def test_whatever_the_hub_answers_is_one_line(server, where):
    server.put(NAME, files())
    for status in (401, 403, 404, 429, 500):
        server.status_of = lambda method, path, s=status: s if where in path else None
        said = fetch()
        assert str(status) in said or (status == 401 and "no such repository" in said)
        assert [name for name in kept() if not name.startswith(".partial")] == []


@pytest.mark.parametrize(
    "reply", ["[]", "{}", "nonsense", '{"sha": "../x", "id": "a/b", "siblings": []}']
)
def test_an_answer_that_no_hub_gives_is_one_line(server, monkeypatch, reply):
    server.put(NAME, files())
    monkeypatch.setattr(
        hub_server.Handler, "send_json", lambda self, value: self.send(200, reply.encode())
    )
    assert fetch().startswith(f"hf:{NAME}: the hub did not give it") and not home().exists()


def test_what_is_not_there_is_named(server):
    assert "no such repository" in fetch()
    server.put(NAME, files())
    assert "no such revision" in fetch(f"hf:{NAME}@v9")
    server.repositories[NAME].private = True
    assert checkpoints.resolve(f"hf:{NAME}").step


def test_two_that_fetch_at_once_fetch_once(server):
    server.put(NAME, files())
    with ThreadPoolExecutor(2) as both:
        [one, other] = both.map(checkpoints.resolve, [f"hf:{NAME}"] * 2)
    assert one.path == other.path
    assert len([1 for m, p in server.asked if m == "GET" and p.endswith("/config.json")]) == 1


# -- every command --------------------------------------------------------------------------------


def test_every_command_takes_a_run_of_the_hub(server, tmp_path, capsys):
    commit = server.put(NAME, files())
    run = f"hf:{NAME}@{commit[:40]}"
    loaded = Assistant.load(run)
    assert loaded.source == run and Api(loaded).name == NAME
    questions = [f"--held-out-questions={runs.world() / 'held_out.jsonl'}", "--max-new-tokens=1"]
    where = [f"--images={runs.world() / 'images'}", f"--features={tmp_path / 'features'}"]
    assert evaluate.main([f"--run={run}", *questions, *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == run
    assert export.main([f"--peft={tmp_path / 'peft'}", f"--run={run}"]) == 0
    assert checkpoints.main(["show", run]) == checkpoints.main(["verify", run]) == 0
    assert checkpoints.main(["diff", run, str(published())]) == 0
    newest = f"hf:{NAME}"
    assert runs.start(tmp_path / "next", start_from=newest, **runs.SHORT | {"max_steps": 1}) == 0
    assert f"weights of {run} at step" in capsys.readouterr().out  # with the commit
    started = checkpoints.resolve(tmp_path / "next").config
    assert started["config"]["start_from"] == newest and started["started_from"]["run"] == run
    assert runs.resume(tmp_path / "next") == 0


def test_a_run_of_the_hub_is_not_trained_and_a_published_one_not_resumed(server, tmp_path):
    for more in ([], ["--resume"], ["--resume-if-any"]):
        said = refusal(lambda: train.main([f"--run=hf:{NAME}", *more]))
        assert f"--start-from hf:{NAME}" in said
    run = runs.copy_of(published(), tmp_path)
    for more in ("--resume", "--resume-if-any"):
        said = refusal(lambda: train.main([f"--run={run}", more]))
        assert "without the state of an optimizer" in said and "--start-from" in said
    assert runs.contents(run) | files() == runs.contents(run) and server.asked == []


SCRIPT = """
import checkpoints
from errors import run_main
for run in {runs}:
    try:
        run_main(lambda: checkpoints.main(["verify", run]))
    except SystemExit as end:
        print(end.code)
"""


def test_a_command_by_itself_speaks_with_the_hub_of_the_environment(server, tmp_path):
    """Settings are read when huggingface_hub is imported, so this takes a process of its own."""
    commit = server.put(NAME, files())
    settings = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(runs=[f"hf:{NAME}", "hf:me/none"])],
        cwd=runs.ROOT,
        env=runs.environment() | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = done.stdout.split()
    assert (lines[-2], lines[-1]) == ("0", "2") and commit in done.stdout, done
    assert done.stderr.splitlines() == [
        "error: hf:me/none: the hub has no such repository, or does not show it to you; check the"
        " name, or log in with `hf auth login` if it is private"
    ]


def test_a_name_on_the_hub_is_the_same_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (paths.located, paths.recorded):
        assert place(f"hf:{NAME}@v1") == f"hf:{NAME}@v1"


# -- what goes wrong on the way there -------------------------------------------------------------


def send(folder: Path | None = None, **more) -> str:
    folder = folder or published()
    said = {"branch": "", "message": "A run", "private": False, "user": hub_server.USER} | more
    return upload.upload(NAME, folder, upload.files_of(folder), **said)


def nothing_visible(server) -> bool:
    """Whether the repository shows nothing of a run."""
    there = server.repositories[NAME].files if NAME in server.repositories else {}
    return set(there) <= {".gitattributes"}


def test_without_a_token_nothing_begins(server, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "no token of the hub; log in with `hf auth login`" in refusal(lambda: push("--yes"))
    assert server.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_secret_that_is_wrong")
    said = refusal(lambda: push("--yes"))
    assert "does not know this token" in said and "secret" not in said
    assert server.repositories == {}


def test_what_belongs_to_others_is_left_to_them(server):
    server.put(NAME, {"README.md": b"theirs"}, owner="other")
    assert "does not let me write there" in refusal(send)
    server.hidden = {NAME}
    assert "does not show it to you" in refusal(send)
    assert server.repositories[NAME].files == {"README.md": b"theirs"}


def test_a_name_of_others_cannot_be_made(server, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "NAME", "other/tiny")
    said = refusal(send)
    assert "does not let me write there" in said and "me/NAME" in said
    assert server.repositories == {}


@pytest.mark.parametrize("where", ["/large/", "/commit/"])
def test_an_upload_that_breaks_leaves_nothing_to_be_seen(server, where):
    for status, reason in (
        (0, "it shows what it showed before, or all of this; run it again"),
        (401, "does not take this token"),
        (403, "does not let me write there"),
        (412, "somebody else changed it meanwhile"),
        (500, "the hub answered with status 500"),
    ):
        server.status_of = lambda method, path, s=status: (
            s if method != "GET" and where in path else None
        )
        said = refusal(send)
        assert said.startswith(f"{NAME}: not published: ") and reason in said
        assert nothing_visible(server)
    server.status_of = lambda method, path: None
    assert send() == server.repositories[NAME].branches["main"]


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(server):
    server.put(NAME, {"README.md": b"first"})

    def meddle(method: str, path: str) -> None:
        if "/preupload/" in path:
            server.put(NAME, {"README.md": b"second"})

    server.status_of = meddle
    assert "somebody else changed it meanwhile" in refusal(send)
    assert server.repositories[NAME].files == {"README.md": b"second"}


def test_what_the_hub_then_says_it_holds_is_compared(server):
    name = f"{checkpoint_name()}/lora_weights.safetensors"
    server.silent_about = {name}
    assert f"{name} is not in it" in refusal(send)
    server.silent_about = set()
    server.sizes[name] = 7
    assert f"{name} has 7 bytes there" in refusal(send)


def test_a_checkpoint_of_before_goes_in_the_commit_that_brings_the_new_one(server):
    older = {n.replace(checkpoint_name(), "checkpoint-000001"): d for n, d in files().items()}
    server.put(NAME, older | {"LICENSE": b"mine"})
    send()
    assert set(server.repositories[NAME].files) == set(files()) | {"LICENSE"}
    assert len(server.repositories[NAME].messages) == 2


def test_what_the_run_before_had_and_this_one_lacks_does_not_stay(server, tmp_path):
    """The log of another run would contradict the checkpoint, and PEFT would load its adapter."""
    send()
    other = Path(shutil.copytree(published(), tmp_path / "other"))
    for name in ("metrics.jsonl", "curves.png", "adapter_model.safetensors"):
        (other / name).unlink()
    send(other)
    assert set(server.repositories[NAME].files) == set(runs.contents(other)) | {".gitattributes"}


def test_what_is_no_run_is_not_overwritten(server):
    server.put(NAME, {"model.safetensors": b"x", "README.md": b"mine"})
    assert "holds something else already (model.safetensors)" in refusal(send)
    assert len(server.repositories[NAME].messages) == 1


def test_private_and_branches_are_as_asked(server):
    commit = send(private=True, branch="try")
    made = server.repositories[NAME]
    assert made.private and made.branches["try"] == commit != made.branches["main"]
    assert nothing_visible(server)
    made.private = False
    assert "is public; make it private" in refusal(lambda: send(private=True))


def test_a_run_that_does_not_see_can_be_refused(server):
    assert "refused" in refusal(lambda: push("--yes", "--require-alignment=100"))
    assert server.repositories == {}


# -- what is published ----------------------------------------------------------------------------


def test_nothing_published_names_a_place_on_this_machine():
    for name, data in files().items():
        assert str(runs.shared()).encode() not in data and str(runs.ROOT).encode() not in data, name
    config = json.loads(files()[f"{checkpoint_name()}/config.json"])
    assert config["config"]["base"] == "assets/tiny/phi3"
    assert config["config"]["run"] == "runs/published" and config["config"]["data"] == []
    assert {"data", "images", "features", "run"} <= set(config["published"]["withheld"])


def test_what_is_published_is_the_run(tmp_path):
    here, there = checkpoints.resolve(runs.finished_run()), checkpoints.resolve(published())
    assert checkpoints.weights_digest(here.state) == checkpoints.weights_digest(there.state)
    size = here.trainer_state["metrics_offset"]
    assert files()["metrics.jsonl"] == (runs.finished_run() / "metrics.jsonl").read_bytes()[:size]
    assert not any(checkpoints.verify_run(published()).values())
    again = tmp_path / "again"
    write_published(again, there, repository=NAME)  # a stranger publishes it on
    assert checkpoints.weights_digest(checkpoints.resolve(again).state) == (
        checkpoints.weights_digest(here.state)
    )
    adapter = load_file(published() / "adapter_model.safetensors")
    assert len(adapter) == sum("lora_A" in n or "lora_B" in n for n in here.state["lora_weights"])
    config = json.loads(files()["adapter_config.json"])
    assert config["base_model_name_or_path"] == "assets/tiny/phi3"


def test_a_log_that_is_gone_or_of_another_run_is_not_published(tmp_path):
    run = runs.copy_of(runs.finished_run(), tmp_path)
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"loss":', b'"loss":1', 1))
    assert "log was edited" in refusal(
        lambda: write_published(tmp_path / "out", checkpoints.resolve(run))
    )
    log.unlink()
    assert "metrics.jsonl" in refusal(
        lambda: write_published(tmp_path / "out2", checkpoints.resolve(run))
    )


def test_where_an_imported_run_came_from_is_told_by_name_alone(tmp_path):
    saved = checkpoints.resolve(runs.finished_run())
    imported = dataclasses.replace(
        saved,
        config=saved.config
        | {
            "imported_from": "/home/ann/peft",
            "started_from": {"step": 1, "finished": "imported from /home/ann/x"},
        },
        trainer_state={
            "step": saved.step,
            "epoch": 0,
            "row": 0,
            "finished": "imported from /home/ann/peft",
        },
    )
    folder = tmp_path / "out"
    write_published(folder, imported)
    assert all(
        b"ann" not in data for n, data in runs.contents(folder).items() if n.endswith("json")
    )
    assert checkpoints.resolve(folder).config["imported_from"] == "peft"


def test_base_and_clip_are_named_as_others_find_them(tmp_path):
    config = config_values.from_dict(
        checkpoints.resolve(runs.finished_run()).config["config"], "run"
    )

    def fields(**more) -> dict:
        return public_fields(configs.replace(config, **more), "run")[0]

    commit = "a" * 40
    cached = f"/home/ann/.cache/huggingface/hub/models--some--phi/snapshots/{commit}"
    assert (
        fields(base=cached)["base"] == "some/phi" and fields(base=cached)["base_revision"] == commit
    )
    assert fields(vision="openai/clip")["vision"] == "openai/clip"
    assert fields(speech="/home/ann/w.pt")["speech"] == "base"
    assert fields(start_from=f"hf:{NAME}@{commit}")["start_from"] == f"hf:{NAME}@{commit}"
    for folder in ("/home/ann/phi", str(tmp_path), str(runs.ROOT / "models/phi")):
        said = refusal(lambda: fields(base=folder))
        assert "a folder that nobody else has" in said and "--base owner/name" in said
    text = {"warning": f"{config.data[0]}: no such file", "gap": 1.0}
    assert without_paths(text, config) == {"warning": "(data): no such file", "gap": 1.0}
    text = {"warning": f"{runs.ROOT}/cache/x: gone; cd {runs.ROOT} && make x; /home/ann/clip: torn"}
    assert without_paths(text, configs.replace(config, vision="/home/ann/clip")) == {
        "warning": "cache/x: gone; cd (the project) && make x; (vision): torn"
    }


def test_from_another_folder_nothing_more_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gone = ["--greedy-answers=1", f"--held-out-questions={tmp_path / 'gone'}"]
    run = runs.finished_run()
    assert export.main([f"--push={NAME}", f"--run={run}", "--out=sent", *gone]) == 0
    found = runs.contents(tmp_path / "sent")
    for name, data in found.items():
        assert str(runs.ROOT).encode() not in data and str(tmp_path).encode() not in data, name
    assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "assets/tiny/phi3"
