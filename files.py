"""Files: written whole or not at all, read where they are regular, known by their sha256.

**Whole or not at all.** A file or folder is written beside its place under a temporary name, synced
to the disk, renamed, and the rename synced too, so that a kill or a lost power supply at any
instant leaves the former content or the new one. What a killed writer left half written bears the
name `.tmp-NAME-PROCESS` and is swept by the next one; where several machines write, the name says
which one, as another machine's processes cannot be seen. All functions raise the `OSError` of the
disk: the caller knows what to say about it.

**Regular files alone are read.** A pipe, a device or a socket in the place of a file of ours may
never end, or wait for ever; `open_regular` refuses it before it is opened.

**Hashes.** A base has several gigabytes, which take seconds to hash. With a folder to remember in,
the result is kept under the names, sizes, times and inodes of the files, and believed as long as
all of these are the same. What that costs: a file whose bytes were changed and whose times were set
back by changing the machine's clock, or beneath the file system, would pass for the old one.
Changing a file in place, replacing it, or setting its modification time back alone is noticed,
since the time of the inode's last change cannot be set. Without a folder every byte is read every
time.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path

from tqdm import tqdm

from errors import PhiSightError
from system import processes
from system.disk import REMOVED_WHILE_OPEN, replace, sync

STALE_SECONDS = 3600.0  # what nobody touched for so long belongs to no process that still writes it
BAR_BYTES = 500 * 10**6  # below that the work is done before a bar could be read
CHUNK = 4 * 2**20
MEMORY = "fingerprints"  # the folder of what is remembered
MEMORY_BYTES = 2**30  # of a file in it; a million pictures make 200 MB
YOUNG_SECONDS = 2.0  # files touched so recently may change again within one tick of their clock

_LEFT_OVER = re.compile(r"\.(tmp|old)-(.+)-(\d+)(?:\.[0-9a-f]{8,16})?")
_WRITER = re.compile(r"-(\d+)(?:\.([0-9a-f]{8})(?:[0-9a-f]{8})?)?")  # the end of a temporary name


# -- regular files --------------------------------------------------------------------------------


def open_regular(path: Path, follow_links: bool = True) -> BufferedReader:
    """A file to read bytes from. Raises `OSError`, also for what is not a regular file."""
    mode = path.stat(follow_symlinks=follow_links).st_mode
    if not stat.S_ISREG(mode):
        kind = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe"}.get(
            stat.S_IFMT(mode), "a device or a socket"
        )
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file", str(path))
    return path.open("rb")


def read_regular(path: Path, limit: int, follow_links: bool = True) -> bytes:
    """All bytes of a regular file. Raises `OSError`, also for one of more than `limit` bytes."""
    with open_regular(path, follow_links) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"is absurdly large (over {limit:,} bytes)", str(path))
    return data


# -- written whole or not at all ------------------------------------------------------------------


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder, then every folder. Links are not followed."""
    below = [path for path in sorted(folder.rglob("*")) if not path.is_symlink()]
    for path in below:
        if not path.is_dir():
            sync(path)
    for path in (*below, folder):
        if path.is_dir():
            sync(path)


def temporary_for(path: Path) -> Path:
    """The name under which this process writes what is to become the folder `path`, beside it."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}")


def put_in_place(temporary: Path, final: Path) -> None:
    """Give a file or folder that is written and synced its name, for good."""
    replace(temporary, final)
    sync(final.parent)


def make_folder(path: Path) -> list[Path]:
    """Make a folder, and return what had to be made for it, the innermost first, for
    `remove_empty` to take away again where nothing came of it."""
    path = path.absolute()
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove these folders, the innermost first, up to the first that holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            return


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write a file to, which replaces `path` when the block ends well.

    Threads and processes may write the same file at once: one of them wins. The folder that it lies
    in must be there.
    """
    path = Path(path)
    sweep_stale(path.parent, f".tmp-{glob.escape(path.name)}-*")
    temporary = path.with_name(f".tmp-{path.name}-{writer()}{secrets.token_hex(4)}")
    try:
        yield temporary
        sync(temporary)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write a file, whole or not at all; see `whole_file`."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(data)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to write into, which gets the name `path` when the block ends well.

    The folder that it lies in must be there, and `path` itself must not.
    """
    path = Path(path)
    sweep_stale(path.parent, f".tmp-{glob.escape(path.name)}-*")
    temporary = path.with_name(f".tmp-{path.name}-{writer()}")
    try:
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Like `whole_folder`, with the folders that it is to lie in, for what a person names. After an
    error, an interruption or a refusal nothing is left.

    Raises `PhiSightError` if `out` is there already or cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() or out.is_symlink():
        raise PhiSightError(f"{out}: is there already; remove it or give another folder")
    made: list[Path] = []
    try:
        made = make_folder(out.parent)
        sweep_stale(out.parent, ".tmp-*", by_age=False)  # of writers that were killed, of any name
        with whole_folder(out) as temporary:
            yield temporary
    except OSError as error:
        raise PhiSightError(
            f"{out}: not written ({error.strerror or error}); make room or give another folder"
        ) from error
    finally:
        remove_empty(made)


def replace_folder(temporary: Path, final: Path) -> None:
    """Like `put_in_place`, where a folder of that name may be there already.

    It is set aside first, as `.old-NAME-PROCESS`, which `sweep_dead` puts back after a kill between
    the two renames and removes after a kill behind them.
    """
    aside = final.with_name(f".old-{final.name}-{os.getpid()}")
    if final.exists():
        replace(final, aside)
    try:
        put_in_place(temporary, final)
    except BaseException:
        if aside.exists() and not final.exists():
            replace(aside, final)
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder, so that a kill meanwhile leaves none of its name that is half there."""
    doomed = temporary_for(path)
    replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=not REMOVED_WHILE_OPEN)  # the next sweep does the rest


def former_name(path: Path) -> str | None:
    """The name of a folder before it was set aside, if nothing has taken its place; else None."""
    match = _LEFT_OVER.fullmatch(path.name)
    if match and match[1] == "old" and not path.with_name(match[2]).exists():
        return match[2]
    return None


def sweep_dead(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Clear what writers that are dead left in a folder that one machine writes to, one process at
    a time; folders that they had set aside are put back. `is_ours`: which names are swept."""
    for path in list(folder.iterdir()):
        match = _LEFT_OVER.fullmatch(path.name)
        if not match or not is_ours(match[2]) or path.is_symlink() or _lives(int(match[3])):
            continue
        if former_name(path) and path.is_dir():
            replace(path, folder / match[2])
        else:
            _remove(path)


def sweep_stale(folder: Path, pattern: str, by_age: bool = True) -> None:
    """Clear what writers that were killed left in a folder that several machines may write to, as
    `pattern` names it: what a dead process of this machine wrote, and what nobody touched for
    `STALE_SECONDS`. Without `by_age` the former alone, as beside files of other programs."""
    for path in folder.glob(pattern):
        try:
            if not _is_of_the_dead(path.name):
                old = time.time() - path.lstat().st_mtime > STALE_SECONDS
                if not (by_age and old):
                    continue
            _remove(path)
        except OSError:  # another process was quicker, or it is not ours to remove
            continue


def writer() -> str:
    """How a temporary name ends that says who writes it: PROCESS.MACHINE."""
    return f"{os.getpid()}.{_machine()}"


@functools.cache
def _machine() -> str:
    """Where numbers of processes mean the same: this machine since it was started, and within it
    this container. Eight hexadecimal digits."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # of Linux alone
        facts += [
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"),
            os.readlink("/proc/self/ns/pid"),
        ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _is_of_the_dead(name: str) -> bool:
    """Whether a temporary name was given by a process of this machine that has ended."""
    match = _WRITER.search(name, max(name.rfind("-"), 0))
    if not match or match.end() != len(name) or match[2] != _machine():
        return False
    process = int(match[1])  # our own may be writing it in another thread
    return process != os.getpid() and not _lives(process)


def _remove(path: Path) -> None:
    """Remove a file or a folder; a link is removed itself, whatever it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _lives(process: int) -> bool:
    """Whether another process of this number is there."""
    # Our own: a name from an earlier life. In a container it is always the same.
    return process != os.getpid() and processes.lives(process)


# -- hashes ---------------------------------------------------------------------------------------


def byte_bar(total: int, what: str) -> tqdm:
    """A progress bar over `total` bytes on standard error: for much work, and on a terminal."""
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=None if total >= BAR_BYTES else True,
    )


def hash_files(paths: Sequence[Path], memory: str | Path | None = None) -> str:
    """sha256 over the sha256 of each file, in the given order: no byte can change its file.

    `memory`: a folder to remember it in, see above. Raises `PhiSightError` if a file is unreadable.
    """
    try:
        before = _stamps(paths)
        place = None
        if memory:
            name = hashlib.sha256(json.dumps(before).encode()).hexdigest()
            place = Path(memory) / MEMORY / f"{name}.json"
            if known := _remembered(place, before):
                return known
        total = _hash_all(paths)
        if place and _stamps(paths) == before and not any(is_young(stamp[1:]) for stamp in before):
            _write_memory(place, {"files": before, "sha256": total, "seal": _seal(total)})
        return total
    except OSError as error:
        raise PhiSightError(f"{error.filename}: {error.strerror}; check the file") from error


def stamp_of(status: os.stat_result) -> list[int]:
    """What tells one state of a file from another without reading it: size, times, inode."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def is_young(stamp: list[int]) -> bool:
    """Whether the file may change again without its stamp changing."""
    return max(stamp[1:3]) > time.time_ns() - YOUNG_SECONDS * 1e9


def _stamps(paths: Sequence[Path]) -> list[list]:
    return [[str(path.resolve()), *stamp_of(path.stat())] for path in paths]


def _hash_all(paths: Sequence[Path]) -> str:
    total = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with byte_bar(sum(path.stat().st_size for path in paths), "reading the weights") as bar:
        for path in paths:
            own = hashlib.sha256()
            with open_regular(path) as file:
                while count := file.readinto(buffer):
                    own.update(buffer[:count])
                    bar.update(count)
            total.update(own.digest())
    return total.hexdigest()


def _remembered(place: Path, stamps: list[list]) -> str | None:
    """The sha256 that was remembered, or None for nothing, or for what is not of ours."""
    try:
        content = json.loads(read_regular(place, MEMORY_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("files") != stamps:
        return None
    known = content.get("sha256")
    if isinstance(known, str) and len(known) == 64 and content.get("seal") == _seal(known):
        return known
    return None


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_memory(place: Path, content: dict) -> None:
    """Write it whole, or leave it: next time the files are only read once more."""
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep_stale(place.parent, ".tmp-*")
        write_whole(place, f"{json.dumps(content)}\n".encode())


class RememberedHashes:
    """sha256 of many files of a folder, such as pictures, each read once while it stays as it is.

    They are remembered in one file, which `save` writes. The cost is the one that is told above.
    """

    def __init__(self, place: Path) -> None:
        self.place, self._changed = place, False
        self._known: dict[str, list] = {}  # name -> [sha256, *stamp]
        try:
            content = json.loads(read_regular(place, MEMORY_BYTES))
        except (OSError, ValueError, RecursionError):
            return
        known = content.get("files") if isinstance(content, dict) else None
        if isinstance(known, dict) and content.get("seal") == _seal(json.dumps(known)):
            self._known = known

    def of(self, name: str, path: Path, read: Callable[[Path], str]) -> str:
        """The sha256 of the file at `path`, known here as `name`; `read(path)` computes it."""
        stamp = stamp_of(path.stat())
        known = self._known.get(name)
        if known and known[1:] == stamp:
            return known[0]
        computed = read(path)
        if stamp == stamp_of(path.stat()) and not is_young(stamp):
            self._known[name] = [computed, *stamp]
            self._changed = True
        return computed

    def save(self) -> None:
        """Write what is new; where that cannot be done, files are read again next time."""
        if self._changed:
            seal = _seal(json.dumps(self._known))
            _write_memory(self.place, {"files": self._known, "seal": seal})
            self._changed = False
