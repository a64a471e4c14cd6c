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


A_PAGE = """
import io, sys, tempfile
from fastapi.testclient import TestClient
from PIL import Image
from web.app import build_site, web_application
from web.model import Model
from web.temporary import own_folder
file = io.BytesIO()
Image.new("RGB", (8, 8)).save(file, "PNG")
client = TestClient(web_application(build_site(Model(), conversations=sys.argv[1], runs=None)))
headers = {"X-Browser-Key": "a" * 32}
sent = client.post("/app/uploads?name=a.png", content=file.getvalue(), headers=headers)
assert sent.status_code == 200, sent.text
print(own_folder(), flush=True)
sys.stdin.read()
"""


def test_pictures_of_a_killed_server_are_swept_at_the_next_start(tmp_path):
    temporaries = tmp_path / "temporary"
    temporaries.mkdir()
    killed = subprocess.Popen(
        [sys.executable, "-c", A_PAGE, str(tmp_path / "conversations")],
        cwd=runs.ROOT,
        env=runs.environment() | {"TMPDIR": str(temporaries), "GRADIO_TEMP_DIR": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    left = Path(killed.stdout.readline().strip())
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    pictures = [path for path in left.rglob("a.png") if path.is_file()]
    assert len(pictures) == 1 and stat.S_IMODE(pictures[0].stat().st_mode) == 0o600
    for folder in pictures[0].relative_to(left).parents:
        assert stat.S_IMODE((left / folder).stat().st_mode) == 0o700
    following, its = a_server(temporaries)
    assert its.exists() and not left.exists()
    following.communicate("", timeout=30)


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
    """An upload removes its own part; this is for one that could not, as on a full disk."""
    uploads.begin()
    uploads.begin()
    folder = uploads.folder / ("d" * 32)
    folder.mkdir()
    part, whole = folder / f"{'0' * 32}.part", folder / ("1" * 32) / f"{'0' * 32}.part"
    whole.parent.mkdir()  # a file that its owner has called so
    part.write_bytes(bytes(10))
    whole.write_bytes(bytes(10))
    uploads.end()
    uploads.sweep()
    assert part.exists()  # it may be the other one's
    uploads.end()
    uploads.sweep()
    assert not part.exists() and whole.exists() and uploads.held == 10


def test_room_is_made_when_it_is_needed_and_not_at_each_upload(uploads, monkeypatch):
    swept = []
    monkeypatch.setattr(uploads, "sweep", lambda: swept.append(1))
    for _ in range(3):
        uploads.begin()
        uploads.take(100)
        uploads.end()
    assert swept == []
    uploads.take(500)
    uploads.begin()
    uploads.end()
    assert swept == [1]
    uploads.give_back(10**6)
    assert uploads.held == 0


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
