"""The folder of a Space: what is in it, how the hub reads it, what its settings make of app.py."""

from __future__ import annotations

import argparse
import ast
import errno
import functools
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import runs
import spaces
import yaml
from huggingface_hub import SpaceCard
from test_conversations import begin

import app
import checkpoints
import config as configs
import export
import space
from assistant.assistant import Assistant
from data.examples import read_examples
from errors import PhiSightError
from exports import carried
from exports import space as exported
from exports.alignment import unmeasured
from web.chat.store import ConversationStore, new_key
from web.chat.sweep import forget

RUN = "owner/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
IN_SPACE = {"SPACE_ID": RUN, "SPACE_HOST": "owner-name.hf.space"}


def head_of(folder: Path) -> dict:
    """The front matter, read by a reader that takes no name twice."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            names = [self.construct_object(key) for key, _ in node.value]
            assert len(set(names)) == len(names)
            return super().construct_mapping(node, deep)

    text = (folder / "README.md").read_text()
    _, head, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    assert body.startswith("\n\n# ")
    return yaml.load(head, Strict)


def written(out: Path, assistant=None, **more) -> Path:
    exported.export_space(assistant or runs.assistant(), out, unmeasured("not here"), **more)
    return out


@pytest.fixture(scope="module", autouse=True)
def found_once():
    """All the exports here take the same files along."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "carried_files", functools.cache(carried.carried_files))
        yield


@pytest.fixture
def assistant():
    """The finished run, to be told that its parts lie elsewhere."""
    loaded = runs.assistant()
    config = loaded.config
    yield loaded
    loaded.config = config


# -- what is in it --------------------------------------------------------------------------------


def test_the_hub_reads_its_settings():
    folder, head = spaces.exported(), head_of(spaces.exported())
    card = SpaceCard.load(folder / "README.md")
    assert head == card.data.to_dict()
    pins = dict(line.split("==") for line in (runs.ROOT / "requirements.txt").read_text().split())
    assert (head["sdk"], head["sdk_version"]) == ("gradio", pins["gradio"])
    assert head["app_file"] == "app.py" and (folder / "app.py").is_file()
    assert re.fullmatch(r"3\.\d+", head["python_version"])
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {head["colorFrom"], head["colorTo"]} <= colours and not head["emoji"].isascii()
    assert len(head["short_description"]) <= 60 and head["suggested_hardware"] == "cpu-basic"
    assert "models" not in head and "preload_from_hub" not in head  # all of it lies in the folder
    assert "sdk: gradio" not in card.text and "## Does it see?" in card.text
    wanted, *more = (folder / "requirements.txt").read_text().rsplit("\n", 2)[:2]
    assert f"{wanted}\n" == (runs.ROOT / "requirements.txt").read_text()
    assert more[0].startswith("av==") and more[0] in (
        (runs.ROOT / "requirements-extras.txt").read_text().split()
    )
    assert (folder / "packages.txt").read_text() == "espeak-ng\n"
    for picture in re.findall(r"\]\((\S+\.png)\)", card.text):
        assert (folder / picture).is_file()


def test_every_import_of_ours_is_in_the_folder_and_nothing_else_is():
    folder = spaces.exported()
    ours = {path.name.removesuffix(".py") for path in runs.ROOT.glob("*.py")}
    ours |= {path.parent.name for path in runs.ROOT.glob("*/*.py")} - {"tests"}
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    left_out = tuple(name.replace("/", ".") for name in exported.NOT_THERE)
    assert len(files) > 100
    for path in files:
        for name, is_import in carried.names_in(ast.parse((folder / path).read_text())):
            if is_import and name.partition(".")[0] in ours and not name.startswith(left_out):
                found = carried.files_of(folder, name)
                assert found == carried.files_of(runs.ROOT, name) != [], f"{path}: {name}"
    rooms = {path.parts[0] for path in files}
    assert not rooms & {"tests", "tools", "benchmarks", "exports", "training", "terminal"}
    assert not rooms & {"train.py", "export.py", "infer.py", "evaluate.py", "serve.py"}
    assert not any((folder / name).exists() for name in exported.NOT_THERE)
    assert (folder / "workers/child.py").is_file()


def test_the_whole_page_is_in_the_folder_and_is_the_same_page():
    """Every script, style and text of the page: one that lacks is a room that does not open."""
    folder = spaces.exported()
    for part, kinds in (("static", {".js", ".css"}), ("texts", {".json", ".py"})):
        there = {p.relative_to(folder) for p in (folder / "web" / part).rglob("*") if p.is_file()}
        ours = {
            path.relative_to(runs.ROOT)
            for path in (runs.ROOT / "web" / part).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert there == ours != set() and {path.suffix for path in ours} <= kinds
        assert all((folder / path).read_bytes() == (runs.ROOT / path).read_bytes() for path in ours)


def test_a_module_that_is_named_in_a_text_is_taken_along(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "command.py").write_text('import a.one, json\nrun(["-m", "a.two"], "a.three")\n')
    (tmp_path / "a/one.py").write_text("def f():\n    from b import c\n")
    page = ("a/static/core/page.js", "a/static/page.css", "a/texts/room.json")
    notes = ("a/notes.txt", "a/mine.json", "a/static/notes.md", "a/static/data.json", "three.py")
    for name in ("a/two.py", "b.py", *page, *notes, "c/static/page.js"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "a/static/mine.js").symlink_to(tmp_path / "three.py")
    found = carried.carried_files(tmp_path, "command.py")
    assert [str(p) for p in found] == sorted(("a/one.py", "a/two.py", "b.py", "command.py", *page))


def test_nothing_in_it_is_of_this_machine():
    folder = spaces.exported()
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".md", ".txt"):
            text = path.read_text()
            assert str(runs.ROOT) not in text and str(runs.shared()) not in text, path
    assert not list(folder.rglob("__pycache__")) and not (folder / space.STORED).exists()


def test_its_run_is_a_run_whose_base_lies_in_the_folder():
    folder = spaces.exported()
    settings = space.found_in(folder)
    assert settings.run == "run" and checkpoints.verify_run(folder / "run")
    assert not any(checkpoints.verify_run(folder / "run").values())
    saved = checkpoints.resolve(folder / "run")
    own = checkpoints.resolve(runs.finished_run())
    assert (saved.step, saved.config["base_fingerprint"]) == (
        own.step,
        own.config["base_fingerprint"],
    )
    for name in (settings.base, settings.vision, settings.speech):
        assert (folder / name).exists() and (folder / name).resolve().is_relative_to(folder)
    assert saved.config["config"]["base"] == settings.base


def test_its_examples_are_those_of_the_run():
    examples = read_examples(spaces.exported() / "examples")
    own = read_examples(runs.finished_run() / "examples")
    assert [e.question for e in examples] == [e.question for e in own]


@pytest.fixture
def bare(tmp_path):
    """The finished run without examples of its own, as those of former versions."""
    copy = runs.copy_of(runs.finished_run(), tmp_path)
    shutil.rmtree(copy / "examples")
    loaded = Assistant.load(copy)
    yield loaded
    loaded.close()


def test_without_any_of_the_runs_own_they_are_held_out_and_small(tmp_path, bare):
    assert 2 <= exported.write_shown(bare, tmp_path / "examples") <= 4
    examples = read_examples(tmp_path / "examples")
    held_out = [json.loads(line) for line in (runs.world() / "held_out.jsonl").open()]
    assert {e.question for e in examples} <= {q["text"] for q in held_out}
    assert len({e.picture for e in examples}) == len(examples)
    assert all(Path(e.picture).stat().st_size < 2**20 for e in examples)


def test_a_run_whose_pictures_are_gone_has_no_examples_and_that_is_said(tmp_path, bare):
    bare.config = configs.replace(bare.config, images=str(tmp_path / "gone"))
    said = exported.export_space(bare, tmp_path / "space", unmeasured("no data"))
    assert "without examples" in said and "was not measured: no data" in said
    assert not (tmp_path / "space/examples").exists()
    settings = space.found_in(tmp_path / "space")
    flags = space.flags(settings, tmp_path / "space", space.Storage(tmp_path, tmp_path), {})
    assert settings.examples == "" and not any("--examples" in flag for flag in flags)


# -- a base that lies elsewhere -------------------------------------------------------------------


def test_a_base_that_nobody_else_has_is_refused_or_copied(tmp_path, assistant):
    for name in ("base", "vision"):
        there = shutil.copytree(getattr(assistant.config, name), tmp_path / name)
        (there / "notes.bin").write_bytes(b"not read")
        assistant.config = configs.replace(assistant.config, **{name: str(there)})
    out = tmp_path / "space"
    with pytest.raises(PhiSightError, match="nobody else has; put it into the Space with --copy-b"):
        written(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "vision"]
    settings = space.found_in(written(out, copy_base=True))
    assert (settings.base, settings.vision) == ("assets/own/base", "assets/own/vision")
    for name in ("base", "vision"):
        copied = {path.name for path in (out / f"assets/own/{name}").iterdir()}
        there = {path.name for path in (tmp_path / name).iterdir()}
        assert copied == there - {"notes.bin", "README.md"}
    assert checkpoints.resolve(out / "run").config["config"]["base"] == "assets/own/base"
    head, text = head_of(out), (out / "README.md").read_text()
    assert head["license"] == "apache-2.0", "the base's card names it, and stays where it is"
    assert "The base is `assets/own/base` of the Space, of the type `phi3`." in text
    assert "Say with `--base` and `--vision` where these folders lie" in text


def test_a_base_of_the_hub_is_fetched_when_the_space_is_built(tmp_path, assistant):
    for name, repository in (("base", "some--phi"), ("vision", "some--clip")):
        snapshot = tmp_path / f"hub/models--{repository}/snapshots/{COMMIT}"
        shutil.copytree(getattr(assistant.config, name), snapshot)
        assistant.config = configs.replace(assistant.config, **{name: str(snapshot)})
    folder = written(tmp_path / "space")
    settings, head = space.found_in(folder), head_of(folder)
    assert (settings.base, settings.base_revision) == ("some/phi", COMMIT)
    assert head["models"] == ["some/phi", "some/clip"]
    base, vision = (line.split() for line in head["preload_from_hub"])
    assert (base[0], base[2], vision[0], vision[2]) == ("some/phi", COMMIT, "some/clip", COMMIT)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(base[1].split(","))
    assert "preprocessor_config.json" in vision[1].split(",")
    assert {path.name for path in (folder / "assets").rglob("*") if path.is_file()} == {"tiny.pt"}


def test_a_run_of_the_hub_stays_there(tmp_path, assistant, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    fetched = tmp_path / f"phisight/owner--name/{COMMIT}"
    shutil.copytree(spaces.exported() / "run", fetched)
    monkeypatch.setattr(assistant, "source", f"hf:{RUN}@{COMMIT}")
    folder = written(tmp_path / "space")
    assert space.found_in(folder).run == f"hf:{RUN}@{COMMIT}" and not (folder / "run").exists()
    assert head_of(folder)["models"] == [RUN] and head_of(folder)["title"] == "PhiSight name"
    assert f"huggingface.co/{RUN}/resolve/{COMMIT}/curves.png" in (folder / "README.md").read_text()


# -- errors ---------------------------------------------------------------------------------------


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(PhiSightError, match="is there already"):
        export.main([f"--space={tmp_path}", f"--run={runs.finished_run()}"])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_title_is_text_alone(tmp_path):
    folder = written(tmp_path / "space", title="a\n---\n# [b](http://evil.example)")
    assert head_of(folder)["title"] == "a --- # [b](http://evil.example)"
    text = (folder / "README.md").read_text()
    assert "\n# a \\-\\-\\- \\# \\[b\\]" in text and "](http://evil" not in text.split("---\n")[2]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exported, "write_shown", full)
    with pytest.raises(PhiSightError, match="not written .No space left on device.; make room"):
        written(tmp_path / "a/space")
    assert not any(tmp_path.iterdir())


def test_hardware_that_the_hub_has_not_and_blindness_are_refused(tmp_path):
    for hardware in ("zero-a10g", "toaster"):
        with pytest.raises(PhiSightError, match=f"--space-hardware {hardware}: choose one of cpu"):
            written(tmp_path / "space", hardware=hardware)
    command = [f"--space={tmp_path / 'space'}", f"--run={runs.finished_run()}"]
    with pytest.raises(PhiSightError, match="space: refused, nothing was written"):
        export.main([*command, "--require-alignment=99", "--greedy-answers=4"])
    with pytest.raises(PhiSightError, match="--copy-base: goes with --space only"):
        export.main([f"--peft={tmp_path / 'peft'}", "--copy-base"])
    assert not any(tmp_path.iterdir())
    head = head_of(written(tmp_path / "space", hardware="l4x1", title='A "title": with marks'))
    assert (head["suggested_hardware"], head["title"]) == ("l4x1", 'A "title": with marks')


# -- what its settings make of app.py -------------------------------------------------------------


def options_in(folder: Path, environ: dict[str, str]) -> argparse.Namespace:
    storage = space.Storage.of(folder, environ)
    return app.parse(space.flags(space.found_in(folder), folder, storage, environ))


@pytest.fixture
def folder(tmp_path) -> Path:
    space.Space("run", "assets/base", "some/clip", vision_revision=COMMIT).write(tmp_path)
    for name in ("run", "assets/base"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def test_in_a_space_the_hubs_visitors_come_in(folder):
    asked = options_in(folder, IN_SPACE)
    assert (asked.host, asked.port, asked.without_key) == ("0.0.0.0", 7860, True)
    assert asked.allow_host == ["owner-name.hf.space"]
    assert asked.allow_frame == ["https://huggingface.co"] and asked.allow_origin == []
    assert asked.public and asked.run == str(folder / "run")
    assert (asked.base, asked.base_revision) == (str(folder / "assets/base"), "")
    assert (asked.vision, asked.vision_revision) == ("some/clip", COMMIT)
    assert asked.speech == "" and asked.base_cache == ""
    more = {"SPACE_HOST": "a.hf.space, chat.example.org", "PHISIGHT_FRAMES": "https://example.org"}
    asked = options_in(folder, IN_SPACE | more | {"GRADIO_SERVER_PORT": "80"})
    assert asked.allow_host == ["a.hf.space", "chat.example.org"] and asked.port == 80
    assert asked.allow_frame == ["https://huggingface.co", "https://example.org"]


def test_elsewhere_it_is_for_this_machine_alone(folder):
    asked = options_in(folder, {})
    assert (asked.host, asked.without_key) == ("127.0.0.1", False) and asked.public


def test_a_space_without_a_name_is_one_line(folder):
    with pytest.raises(PhiSightError, match="SPACE_HOST: is not set"):
        options_in(folder, {"SPACE_ID": RUN})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"run": 3}'])
def test_settings_that_cannot_be_read_are_one_line(tmp_path, text):
    assert space.found_in(tmp_path) is None and space.begin(tmp_path) == []
    (tmp_path / "space.json").write_text(text)
    with pytest.raises(PhiSightError, match="space.json: .*; export the Space again"):
        space.begin(tmp_path)


def test_all_storage_lies_below_one_folder(folder, monkeypatch, tmp_path_factory):
    storage = space.Storage.of(folder, {})
    assert storage.kept == storage.passing == folder / "storage"
    chosen = storage.environment({})
    assert {"HF_HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "TMPDIR"} <= chosen.keys()
    assert all(Path(path).is_relative_to(folder / "storage") for path in chosen.values())
    assert "HF_HOME" not in storage.environment({"HF_HOME": "/x"})
    named = space.Storage.of(folder, {"PHISIGHT_STORAGE": str(folder / "own")})
    assert named.kept == folder / "own"
    data = tmp_path_factory.mktemp("data")
    monkeypatch.setattr(space, "PERSISTENT", data)
    lasting = space.Storage.of(folder, IN_SPACE)
    assert (lasting.kept, lasting.passing) == (data / "phisight", folder / "storage")
    assert space.Storage.of(folder, {}).kept == folder / "storage", "not a Space"


def test_a_folder_that_cannot_be_written_is_left(folder, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("tmp")
    monkeypatch.setattr(space.tempfile, "gettempdir", lambda: str(elsewhere))
    monkeypatch.setattr(space.os, "access", lambda path, mode: path != folder)
    first = space.Storage.of(folder, {}).kept
    assert first.parent == elsewhere and first == space.Storage.of(folder, {}).kept
    assert first.stat().st_mode & 0o077 == 0
    first.rename(elsewhere / "theirs")
    first.symlink_to(elsewhere / "theirs")
    with pytest.raises(PhiSightError, match="belongs to somebody else; .*PHISIGHT_STORAGE"):
        space.Storage.of(folder, {})
    with pytest.raises(PhiSightError, match="/dev/null/x: Not a directory; .*PHISIGHT_STORAGE"):
        space.Storage.of(folder, {"PHISIGHT_STORAGE": "/dev/null/x"})


def test_a_cache_that_cannot_be_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(space.os, "environ", {"HF_HOME": "/dev/null/hf"})
    with pytest.raises(PhiSightError, match="HF_HOME: /dev/null/hf: Not a directory; unset it"):
        space.begin(folder)


@pytest.mark.parametrize(("said", "threads"), [
    ({}, None), ({"OMP_NUM_THREADS": "4"}, "4"), ({"OMP_NUM_THREADS": "7500m"}, "7"),
    ({"OMP_NUM_THREADS": "500m"}, "1"), ({"CPU_CORES": "2"}, "2"), ({"CPU_CORES": "many"}, None),
])  # fmt: skip
def test_as_many_threads_as_the_space_may_use(folder, said, threads):
    assert space.Storage.of(folder, {}).environment(said).get("OMP_NUM_THREADS") == threads


def test_what_the_hub_has_preloaded_is_found_and_only_read(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model = theirs / "models--some--phi"
    for name in ("blobs", "refs", f"snapshots/{COMMIT}/sub"):
        (model / name).mkdir(parents=True)
    (model / "blobs/abc").write_text("weights")
    (model / f"snapshots/{COMMIT}/model.safetensors").symlink_to("../../blobs/abc")
    (model / "refs/main").write_text(COMMIT)
    before = runs.contents(theirs)
    space.link_preloaded(theirs, ours)
    space.link_preloaded(theirs, ours)
    copied = ours / f"models--some--phi/snapshots/{COMMIT}/model.safetensors"
    assert copied.read_text() == "weights" and not copied.parent.is_symlink()
    (ours / "models--some--phi/refs/main").write_text("newer")
    assert runs.contents(theirs) == before
    copied.unlink()
    copied.symlink_to(tmp_path / "the home of a former image")
    space.link_preloaded(theirs, ours)
    assert copied.read_text() == "weights"
    space.link_preloaded(tmp_path / "none", ours)
    space.link_preloaded(theirs, theirs)
    assert runs.contents(theirs) == before


# -- what strangers leave -------------------------------------------------------------------------


def test_conversations_of_strangers_are_forgotten(tmp_path):
    now = time.time()
    kept = {}
    for hours in (30, 3, 2, 1):
        store = ConversationStore(tmp_path, new_key())
        conversation = begin(store)
        path = store.folder / conversation.id
        (path / "picture").write_bytes(b"x" * 1000)
        for file in (*path.iterdir(), path):
            os.utime(file, (now, now - 3600 * hours))
        kept[hours] = path
    forget(tmp_path, age=24 * 3600)
    assert [hours for hours, path in kept.items() if path.exists()] == [3, 2, 1]
    assert not kept[30].parent.exists()
    size = sum(file.stat().st_size for file in kept[1].iterdir())
    forget(tmp_path, most=2 * size)
    assert [hours for hours, path in kept.items() if path.exists()] == [2, 1]
