"""Other systems than Linux: a simulated one (tests/other_system) runs what a person runs; and each
of the replacements of `system` alone."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path, PureWindowsPath

import pytest
import runs
import torch
from safetensors.torch import load_file

import files
import hub
import infer
import paths
from data.record_content import picture_name
from errors import PhiSightError
from exports.published import _is_path
from fields import PATH_OR_NAME
from system import disk, limits, locks, memory, processes
from system.pipes import Pipe
from training.lock import RunLock

OTHER = runs.ROOT / "tests" / "other_system"
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]|[. ]\Z')  # in a name on Windows


def environment(system: str) -> dict[str, str]:
    """To start Python with, in the "ordinary" system or the "other" one."""
    places = [runs.ROOT, runs.ROOT / "tests", *([OTHER] if system == "other" else [])]
    return runs.environment() | {"PYTHONPATH": os.pathsep.join(map(str, places))}


def begun(system: str, code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=runs.ROOT,
        env=environment(system),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen) -> str:
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return printed


# -- all of it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    """A run of the other system, and what it said."""
    folder = tmp_path_factory.mktemp("other")
    fields = runs.SHORT | {"features": folder / "features"}  # so that pictures are read there
    flags = [flag for flag in runs.flags(folder / "run", **fields) if "--run=" not in flag]
    done = subprocess.run(
        [sys.executable, OTHER / "trains.py", folder / "run", a_picture(), *map(str, flags)],
        cwd=runs.ROOT,
        env=environment("other"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", json.loads(done.stdout.splitlines()[-1])


def a_picture() -> Path:
    return sorted((runs.world() / "images").iterdir())[0]


def test_every_command_runs_without_what_posix_has(trained):
    assert trained[1]["codes"] == [0, 0, 0, 0]


def test_a_run_is_the_same_there_to_the_bit(trained, tmp_path, capsys):
    run, here = trained[0], tmp_path / "run"
    assert runs.start(here, **runs.SHORT) == 0
    names = {path.name for path in here.glob("checkpoint-*/*.safetensors")}
    assert len(names) > 3
    for name in names:
        one, other = (max(place.glob(f"checkpoint-*/{name}")) for place in (here, run))
        first, second = load_file(one), load_file(other)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items()), name
    capsys.readouterr()
    question = ["--image", str(a_picture()), "--prompt", "What is this?", "--json"]
    assert infer.main([f"--run={here}", *question]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    told = [line for line in trained[1]["said"].splitlines() if line.startswith("{")]
    assert json.loads(told[-1])["answer"] == answer["answer"]


# -- locks -----------------------------------------------------------------------------------------

HOLDS = """
import sys
from training.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
ASKS = """
import sys
from errors import PhiSightError
from reports.watching import holder_of
from training.lock import RunLock
print(holder_of(sys.argv[1]) or "nobody")
try:
    with RunLock(sys.argv[1]):
        print("taken")
except PhiSightError as error:
    print(error)
"""


@pytest.mark.parametrize("system", ["ordinary", "other"])
def test_a_run_has_one_trainer_until_it_ends_however_it_ends(system, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "kept").touch()
    holder = begun(system, HOLDS, run)
    try:
        assert holder.stdout.readline() == "held\n", holder.communicate()
        found, refused = output(begun(system, ASKS, run)).splitlines()
        assert found.startswith(f"process {holder.pid} on ")
        assert f"process {holder.pid} on" in refused and "is training there" in refused
    finally:
        holder.kill()
        holder.communicate()
    assert output(begun(system, ASKS, run)).splitlines() == ["nobody", "taken"]
    assert [path.name for path in run.iterdir()] != []


LOOKS = """
import sys
from reports.watching import holder_of
print("ready", flush=True)
sys.stdin.readline()
print({holder_of(sys.argv[1]) for _ in range(300)})
"""


def test_who_looks_is_in_nobodys_way_there(tmp_path):
    with RunLock(tmp_path / "run"):
        (tmp_path / "run/kept").touch()
    lookers = [begun("other", LOOKS, tmp_path / "run") for _ in range(2)]
    for looker in lookers:
        assert looker.stdout.readline() == "ready\n", looker.communicate()
    for looker in lookers:
        looker.stdin.write("\n")
        looker.stdin.flush()
    assert [output(looker) for looker in lookers] == ["{''}\n"] * 2


def test_a_lock_excludes_and_is_given_back(tmp_path):
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open("rb") as one, (tmp_path / "lock").open("rb") as other:
        locks.take(one, shared=True)
        locks.take(other, shared=True)
        with pytest.raises(BlockingIOError):
            locks.take(other)
        locks.give_back(one)
        locks.take(other)
        with pytest.raises(BlockingIOError):
            locks.take(one, shared=True)


# -- children --------------------------------------------------------------------------------------

CHILDREN = """
import logging, sys, time
from errors import PhiSightError
from workers.pool import Limits, Workers
from test_workers import echo, sleep_forever, write_notes, take
logging.basicConfig(stream=sys.stdout, format="%(message)s")
pool = Workers(2, Limits(wall_seconds=60.0))
value, data = pool.call(echo, bytes(300_000), {"a": [1]}, name="a", remedy="b")
print(value["arguments"], len(data))
print(pool.call(write_notes, b"", {"lines": 2000}, name="notes", remedy="b"))
for _ in range(50):
    pool.call(echo, b"", name="notes", remedy="b")  # a thread reads them: they may come later
try:
    limits = Limits(wall_seconds=1.0)
    pool.call(sleep_forever, b"", name="slow", remedy="send another", limits=limits)
except PhiSightError as error:
    print(error)
print(len(pool.call(echo, b"x", name="a", remedy="b")[1]))
pool.close()
"""


def test_children_read_untrusted_bytes_there_and_are_ended_by_time():
    said = output(begun("other", CHILDREN)).splitlines()
    assert said[0].startswith("this system cannot limit what a child process takes: its memory")
    assert "{'a': [1]} 300000" in said and "(2000, bytearray(b''))" in said
    assert any("its decoder wrote" in line for line in said)
    assert "slow: took over 1 seconds to read; send another" in said and said[-1] == "1"
    assert sum("cannot limit" in line for line in said) == 1


@pytest.mark.parametrize("by_thread", [False, True])
def test_a_pipe_gives_all_and_then_its_end(by_thread, monkeypatch):
    if by_thread:
        monkeypatch.delattr(os, "set_blocking")
    code = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 40_000)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    pipe, got = Pipe(child.stdout), bytearray()
    assert (pipe.descriptor is None) == by_thread
    while (piece := pipe.read()) != b"":
        got += piece or b""
        pipe.wait(0.05)
    assert got == bytes(range(256)) * 40_000 and pipe.read() == b""
    child.wait()
    pipe.close()


def test_a_pipe_that_nobody_empties_is_closed(monkeypatch):
    monkeypatch.delattr(os, "set_blocking")
    code = "import sys\nwhile True: sys.stdout.write('x' * 65536)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    pipe = Pipe(child.stdout)
    pipe.wait(10)
    child.kill()
    child.wait()
    pipe.close()
    assert not pipe._reader.is_alive() and child.stdout.closed


# -- processes, memory, disk -----------------------------------------------------------------------


def test_when_a_process_was_born_is_asked_of_ps_where_there_is_no_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "PROC", tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    birth = processes.born(child.pid)
    assert re.fullmatch(r"\w{3} \w{3} \d+ \d\d:\d\d:\d\d \d{4}", birth)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert processes.born(child.pid) == birth
    monkeypatch.delattr(os, "pidfd_open")
    assert not processes.signal_if(child.pid, "Thu Jan 1 00:00:00 1970", signal.SIGTERM)
    assert child.poll() is None
    assert processes.signal_if(child.pid, birth, signal.SIGTERM)
    child.communicate()
    assert processes.born(child.pid) == "" and not processes.signal_if(child.pid, birth, 15)


def test_asking_whether_a_process_lives_ends_none_on_windows(monkeypatch):
    """There `os.kill` ends the process, whatever it is sent."""

    def kill(*_):
        raise AssertionError("it was sent a signal")

    with monkeypatch.context() as there:  # pytest itself has to find the system that it is on
        there.setattr(os, "name", "nt")
        there.setattr(os, "kill", kill)
        there.setattr(processes.windows, "born", lambda process: "1" if process == 7 else "")
        found = processes.lives(7), processes.lives(8)
    assert found == (True, False)


SEES = """
import os, subprocess, sys
from system import memory, processes
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
lived, birth = processes.lives(child.pid), processes.born(child.pid)
child.communicate()
print(lived, birth.isdigit(), processes.lives(child.pid), repr(processes.born(child.pid)))
print(memory.peak() >= memory.resident() > 2**20, memory.of_machine() > 2**28)
"""


def test_what_windows_tells_of_processes_and_memory():
    assert output(begun("other", SEES)).split("\n")[:2] == ["True True False ''", "True True"]


def test_bytes_are_read_at_an_offset_without_preadv(tmp_path, monkeypatch):
    data = os.urandom(1 << 20)
    (tmp_path / "file").write_bytes(data)
    monkeypatch.delattr(os, "preadv")
    wrong = []

    def read(start: int) -> None:
        for at in range(start, len(data), 9973):
            if disk.bytes_at(file.fileno(), 5000, at) != data[at : at + 5000]:
                wrong.append(at)

    with (tmp_path / "file").open("rb") as file:
        threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert disk.bytes_at(file.fileno(), 10, len(data)) == b""
    assert wrong == []


def test_a_place_that_somebody_has_open_is_asked_for_again(tmp_path, monkeypatch):
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "old").write_bytes(b"old")
    really, refused = os.replace, [2]

    def replace(source, target):
        if refused[0]:
            refused[0] -= 1
            raise PermissionError("somebody has it open")
        really(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError):  # elsewhere it means what it says
        disk.replace(tmp_path / "new", tmp_path / "old")
    monkeypatch.setattr(disk, "REMOVED_WHILE_OPEN", False)
    refused[0] = 2
    disk.replace(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"new" and refused == [0]


def test_what_is_limited_here():
    assert limits.missing() == "" or not memory.mapped()
    assert memory.peak() >= memory.resident() // 2 > 0


# -- names and texts -------------------------------------------------------------------------------

WINDOWS_PATHS = ["C:\\data\\x.json", "C:/data/x.json", "\\\\server\\share\\x", "data\\x", ".\\x"]


@pytest.mark.parametrize("path", WINDOWS_PATHS)
def test_a_path_of_windows_is_a_path(path):
    assert paths.problem_of(path) == ""
    assert paths.is_typed_as_path(path) and not hub.is_repository(path)
    assert not hub.is_reference(path) and _is_path(PATH_OR_NAME, path)
    with pytest.raises(PhiSightError, match="there is no such folder"):
        hub.find_folder(path, None, "base model", "config.json", [])


def test_a_name_of_the_hub_is_none():
    for name in ("microsoft/Phi-3.5-mini-instruct", "gpt2", "owner/name.v1"):
        assert not paths.is_typed_as_path(name)


def test_a_checkpoint_says_paths_that_every_system_reads(monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    assert paths.recorded("assets\\tiny\\phi3") == "assets/tiny/phi3"
    assert paths.recorded("hf:owner/name") == "hf:owner/name"


@pytest.mark.parametrize("name", ["C:\\x.jpg", "..\\x.jpg", "a\\..\\..\\x.jpg", "\\\\s\\s\\x.jpg"])
def test_a_picture_of_windows_outside_the_folder_is_refused(name):
    with pytest.raises(Exception, match="outside the image folder"):
        picture_name(name)


def test_temporary_names_can_be_given_on_windows(tmp_path):
    names = [files.temporary_for(tmp_path / "run").name, f"x-{files.writer()}"]
    with files.whole_file(tmp_path / "a.json") as temporary:
        temporary.touch()
        names.append(temporary.name)
    with files.whole_folder(tmp_path / "checkpoint-000500") as temporary:
        names.append(temporary.name)
    assert [name for name in names if FORBIDDEN.search(name)] == []
    assert all(PureWindowsPath(name).name == name for name in names)


def test_what_is_typed_is_quoted_for_the_shell(monkeypatch):
    assert paths.typed("a b", "c") == "'a b' c"
    with monkeypatch.context() as there:
        there.setattr(os, "name", "nt")
        found = paths.typed("C:\\my runs\\a", "c")
    assert found == '"C:\\my runs\\a" c'


def test_texts_say_how_they_are_encoded_and_how_lines_end():
    """By default Windows reads and writes another encoding, and ends lines by two characters."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=runs.ROOT, capture_output=True, text=True, check=True
    )
    product = [name for name in listed.stdout.split() if not name.startswith(("tests/", "bench"))]
    assert len(product) > 100
    assert [wrong for name in product for wrong in vague_texts(name)] == []


def vague_texts(name: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse((runs.ROOT / name).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).rpartition(".")[2]
        said = {keyword.arg for keyword in node.keywords}
        if called == "read_text" and not node.args:
            lacking = {"encoding"} - said
        elif called == "write_text":
            lacking = {"encoding", "newline"} - said
        elif called == "open" and (modes := modes_of(node)) and "b" not in modes:
            lacking = {"encoding", *({"newline"} if set("wxa") & set(modes) else ())} - said
        else:
            continue
        found += [f"{name}:{node.lineno}: {called} without {what}" for what in sorted(lacking)]
    return found


def modes_of(call: ast.Call) -> str:
    """The mode of a file that is opened; empty where it is not said as a text."""
    place = call.args[isinstance(call.func, ast.Name) :][:1]
    values = [*place, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    texts = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    return next((text for text in texts if re.fullmatch(r"[rwxa][+bt]*", text)), "")


def test_a_vague_text_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    text = "p.read_text()\np.write_text('')\nopen('a', 'w')\nopen('a', 'rb')\np.open('r')\n"
    (tmp_path / "a.py").write_text(text)
    assert len(vague_texts("a.py")) == 6
