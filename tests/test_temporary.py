"""Files that a server makes for a while: whose they are, how many there may be, when they go."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

from errors import PhiSightError
from web import temporary
from web.temporary import LOCK, PREFIX, Uploads, own_folder, sweep_dead

OLD = time.time() - 10 * 24 * 3600


def aged(path: Path, moment: float = OLD) -> Path:
    os.utime(path, (moment, moment))
    return path


def later(monkeypatch, seconds: float) -> None:
    """It is so many seconds later: the time at which a file was made cannot be set back."""
    now = time.time
    monkeypatch.setattr(temporary.time, "time", lambda: now() + seconds)


def folder_of_a_server(root: Path, name: str, with_lock: bool = True) -> Path:
    folder = root / f"{PREFIX}{name}"
    folder.mkdir()
    (folder / "uploads").mkdir()
    (folder / "uploads" / "picture.png").write_bytes(b"x")
    if with_lock:
        (folder / LOCK).touch()
    return folder


def test_what_killed_servers_left_goes_and_what_living_ones_use_stays(tmp_path):
    dead = folder_of_a_server(tmp_path, "dead")
    living = folder_of_a_server(tmp_path, "living")
    begins = folder_of_a_server(tmp_path, "begins", with_lock=False)
    never_began = folder_of_a_server(tmp_path, "never", with_lock=False)
    former, others = tmp_path / "phisight-uploads-abc", tmp_path / "phisight-tests-abc"
    for folder in (former, others):
        folder.mkdir()
        (folder / "file").touch()
    for path in (*never_began.rglob("*"), never_began):
        aged(path, time.time() - 120)
    for path in (*former.rglob("*"), former, *others.rglob("*"), others):
        aged(path)
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    (tmp_path / f"{PREFIX}file").touch()
    with (living / LOCK).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep_dead(tmp_path)
    assert not (dead.exists() or never_began.exists() or former.exists())
    assert (living / "uploads" / "picture.png").exists() and begins.exists()
    assert (others / "file").exists()  # no folder of a server's
    assert elsewhere.exists() and (tmp_path / f"{PREFIX}link").is_symlink()


A_SERVER = """
import sys
from web.temporary import own_folder
print(own_folder(), flush=True)
sys.stdin.read()
"""


def a_server(root: Path) -> tuple[subprocess.Popen, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", A_SERVER],
        cwd=runs.ROOT,
        env=runs.environment() | {"TMPDIR": str(root), "GRADIO_TEMP_DIR": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, Path(process.stdout.readline().strip())


def test_several_servers_leave_each_other_alone_and_clean_up_after_a_kill(tmp_path):
    first, its = a_server(tmp_path)
    killed, left = a_server(tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert left.exists()
    third, last = a_server(tmp_path)
    assert its.exists() and not left.exists()
    for process in (first, third):
        process.communicate("", timeout=30)
    assert not its.exists() and not last.exists() and list(tmp_path.iterdir()) == []


def test_only_the_owner_may_enter():
    folder = own_folder()
    for path in (folder, *folder.iterdir()):
        if path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    made = temporary.made_file(".wav")
    assert stat.S_IMODE(made.stat().st_mode) == 0o600 and made.suffix == ".wav"
    made.unlink()


# -- uploads --------------------------------------------------------------------------------------


@pytest.fixture
def uploads(tmp_path) -> Uploads:
    return Uploads(tmp_path, most=1000)


def uploaded(uploads: Uploads, name: str, size: int) -> Path:
    path = uploads.folder / name / "picture.png"
    path.parent.mkdir()
    path.write_bytes(bytes(size))
    return path


def test_parts_of_uploads_that_were_cut_off_go_when_none_arrives(uploads):
    uploads.begin()
    uploads.begin()
    part, other = uploads.folder / "tmpabc_12", uploads.folder / "named"
    part.write_bytes(bytes(10))
    other.write_bytes(bytes(10))
    uploads.end()
    assert part.exists()  # it may be the other one's
    uploads.end()
    assert not part.exists() and other.exists() and uploads.held == 10


def test_uploads_have_a_limit_and_what_is_old_makes_room(uploads, monkeypatch):
    uploads.begin()
    uploads.take(900)
    with pytest.raises(PhiSightError, match="send smaller files"):
        uploads.take(200)
    uploads.end()
    first, second = uploaded(uploads, "a", 500), uploaded(uploads, "b", 499)
    os.utime(first, (1, 1))
    uploads.sweep()
    assert uploads.held == 999 and first.exists()  # all of them are in use
    with pytest.raises(PhiSightError):
        uploads.take(100)
    later(monkeypatch, 2 * 3600)
    uploads.sweep()
    assert uploads.held == 499 and not first.exists() and second.exists()
    later(monkeypatch, 25 * 3600)
    uploads.keep = lambda: [str(second)]
    uploads.sweep()
    assert second.exists()
    uploads.keep = tuple
    uploads.sweep()
    assert uploads.held == 0 and not second.exists()
    later(monkeypatch, 27 * 3600)
    uploads.sweep()
    assert list(uploads.folder.iterdir()) == []


def test_a_nearly_full_disk_takes_no_upload(uploads, monkeypatch):
    monkeypatch.setattr(temporary, "SPARE_BYTES", 2**62)
    with pytest.raises(PhiSightError, match="disk is nearly full"):
        uploads.begin()
    assert uploads.arriving == 0
