"""Files and folders are there whole or not at all, and what was left half written is swept."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_at(number: int, act) -> int:
    """The exit code of a process that does `act` and dies before its `number`-th fsync or rename:
    0 if it makes fewer."""
    child = os.fork()
    if child == 0:
        left = [number]

        def wrap(function):
            def wrapped(*arguments):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return function(*arguments)

            return wrapped

        os.fsync, os.replace = wrap(os.fsync), wrap(os.replace)
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_file_is_the_former_or_the_new_one_wherever_a_kill_strikes(tmp_path):
    path = tmp_path / "a.json"
    contents, left = [], []
    for number in range(1, 10):
        path.write_bytes(b"former")
        code = kill_at(number, lambda: files.write_whole(path, b"new"))
        contents.append(path.read_bytes())
        left.append([name for name in names(tmp_path) if name != path.name])
        if code == 0:
            break
    assert contents == [b"former", b"former", b"new", b"new"]
    # Each writer sweeps what the one before it, which is dead, had left.
    assert [len(each) for each in left] == [1, 1, 0, 0] and left[0] != left[1]
    assert all(name.startswith(".tmp-a.json-") for [name] in left[:2])
    assert names(tmp_path) == ["a.json"]


def test_what_another_machine_writes_is_swept_by_its_age_alone(tmp_path):
    """Numbers of processes mean nothing there. Files of other programs are left alone too."""
    path, machine = tmp_path / "a", files.writer().split(".")[1]
    dead = kill_at(1, lambda: files.write_whole(path, b"new")) and names(tmp_path)[0]
    another = dead.replace(f".{machine}", ".0123abcd")
    own_thread = f".tmp-a-{files.writer()}01234567"
    of_a_person = ".tmp-a-2024"
    stay = [another, own_thread, of_a_person]
    for name in stay:
        (tmp_path / name).write_bytes(b"ne")
    files.write_whole(path, b"newer")
    assert names(tmp_path) == sorted([*stay, "a"])
    for name in stay:
        os.utime(tmp_path / name, (0, 0))
    files.sweep_stale(tmp_path, ".tmp-*", by_age=False)
    assert names(tmp_path) == sorted([*stay, "a"])
    files.write_whole(path, b"newest")
    assert names(tmp_path) == ["a"] and path.read_bytes() == b"newest"
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_former_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"former")
    with pytest.raises(type(error)), files.whole_file(path) as temporary:
        temporary.write_bytes(b"hal")
        raise error
    assert names(tmp_path) == ["a"] and path.read_bytes() == b"former"
    with pytest.raises(FileNotFoundError):  # a caller whose writer wrote nothing
        with files.whole_file(path):
            pass
    assert path.read_bytes() == b"former"


def test_threads_that_write_the_same_file_leave_one_of_their_contents(tmp_path):
    path, contents = tmp_path / "a", [bytes([65 + n]) * 100_000 for n in range(8)]
    threads = [threading.Thread(target=files.write_whole, args=(path, c)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and names(tmp_path) == ["a"]


def test_a_folder_is_absent_or_whole(tmp_path):
    path = tmp_path / "out"

    def write() -> None:
        with files.whole_folder(path) as folder:
            (folder / "below").mkdir()
            (folder / "below" / "a").write_text("a")
            assert not path.exists()

    seen = []
    for number in range(1, 10):
        code = kill_at(number, write)
        seen.append(path.exists())
        if path.exists():
            assert (path / "below" / "a").read_text() == "a"
            for child in (path / "below" / "a", path / "below", path):
                child.unlink() if child.is_file() else child.rmdir()
        for left in tmp_path.glob(".tmp-*"):
            os.utime(left, (0, 0))
        if code == 0:
            break
    # fsync of the file and of both folders, rename, fsync of the parent; then nothing dies.
    assert seen == [False, False, False, False, True, True]
    with pytest.raises(ZeroDivisionError), files.whole_folder(path) as folder:
        (folder / "a").write_text("a")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_folder_is_replaced_by_another(tmp_path):
    final = tmp_path / "checkpoint"

    def ours(name: str) -> bool:
        return name == "checkpoint"

    for number in range(1, 10):
        final.mkdir()
        (final / "a").write_text("former")
        new = files.temporary_for(final)
        new.mkdir()
        (new / "a").write_text("new")
        code = kill_at(number, lambda: files.replace_folder(new, final))
        former = [files.former_name(path) for path in tmp_path.iterdir()]
        assert final.exists() != ("checkpoint" in former)  # one of them counts, at every instant
        files.sweep_dead(tmp_path, ours)
        assert names(tmp_path) == ["checkpoint"]
        assert (final / "a").read_text() == ("former" if number <= 2 else "new")
        files.remove_folder(final)
        assert names(tmp_path) == []
        if code == 0:
            break
    assert number == 4
