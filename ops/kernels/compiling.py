"""Compiled code is kept on the disk, in a folder that is named after what it was compiled from.

numba notices that a function's own file has changed, and not that of a function that it calls. So
the folder's name has a hash of all files of this room, the versions of numba and llvmlite, and
the target.

numba neither syncs nor checks what it keeps: after a loss of power a file may be empty, and machine
code with a wrong byte does anything. So each file here ends with its sha256. One that was damaged
is compiled anew, and where nothing can be kept, a start compiles for itself; both are said.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    UserProvidedCacheLocator,
)

from ops.kernels.target import choose
from system import disk

ROOM = Path(__file__).parent
DIGEST = hashlib.sha256().digest_size
COMPLETE = "complete-"  # begins the name of an empty file: what follows was compiled once


_not_kept: set[str] = set()  # functions that could not be written


@functools.cache
def cache_folder() -> Path | None:
    """Where code for the chosen target is kept: under XDG_CACHE_HOME, by default
    ~/.cache/phisight; None where nothing can be written, or where others could write: numba keeps
    code in pickles."""
    digest = hashlib.sha256()
    for path in sorted(ROOM.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for fact in (numba.__version__, llvmlite.__version__, platform.python_version(), choose()[0]):
        digest.update(fact.encode())
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "phisight" / "kernels" / digest.hexdigest()[:16]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    own = disk.is_own(found) and (os.name == "nt" or not found.st_mode & 0o022)
    return folder if own and os.access(folder, os.W_OK) else None


@functools.cache
def warn(text: str) -> None:
    """Each warning once: what befalls one function befalls the others too."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class _CheckedFiles(IndexDataCacheFile):
    """numba's files of one function. A pickle ends by itself: the sha256 behind it is not read
    with it."""

    def _load_index(self) -> Any:
        if Path(self._index_path).exists() and not _is_whole(self._index_path):
            return {}
        return super()._load_index()

    def _load_data(self, name: str) -> Any:
        if not _is_whole(self._data_path(name)):
            raise FileNotFoundError(name)  # which has it compiled
        return super()._load_data(name)

    @contextlib.contextmanager
    def _open_for_write(self, path: str) -> Iterator[Any]:
        with super()._open_for_write(path) as file, io.BytesIO() as content:
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def _is_whole(path: str) -> bool:
    """Whether a file of `_CheckedFiles` is as it was written; with a warning where it is not."""
    content = Path(path).read_bytes()
    if hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]:
        return True
    warn(f"{Path(path).parent}: compiled code that was kept is damaged; compiling it anew")
    return False


class _InOneFolder(UserProvidedCacheLocator):
    """numba would keep the code of each place of a file apart, so that every copy of the project
    compiled for itself; what the file holds is in the folder's name and in numba's stamp."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        return ""


class _Places(CompileResultCacheImpl):
    _locator_classes = [_InOneFolder]


class _KeptCode(FunctionCache):
    _impl_class = _Places

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        given = self._cache_file
        self._cache_file = _CheckedFiles(
            given._cache_path, self._impl.filename_base, given._source_stamp
        )

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _not_kept.add(self._name)
            warn(
                f"{self.cache_path}: compiled code is not kept ({error.strerror}); make room,"
                " or give another folder by XDG_CACHE_HOME"
            )


def prepare(what: str, compile_all: Callable[[], object]) -> None:
    """Where it was not done before on this machine: compile `what` by `compile_all`, and say how
    long it took."""
    folder = cache_folder()
    done = folder / (COMPLETE + what.replace(" ", "-")) if folder else None
    if done and done.is_file():
        return
    print(
        f"compiling {what} for this processor"
        + ("" if folder else " (at each start: no cache folder can be written)"),
        file=sys.stderr,
        flush=True,
    )
    started = time.perf_counter()
    compile_all()
    print(f"compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if done and not _not_kept:
        done.touch()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call, for threads without Python's lock, and keep it on the disk.

    float32 is as it is written: no sum is taken in another order, and NaN stays NaN.
    """
    settings: Any = numba.config
    folder, before = cache_folder(), settings.CACHE_DIR
    result: Any = numba.njit(nogil=True, error_model="numpy")(function)
    settings.CACHE_DIR = str(folder or "")  # read while a cache is made
    try:
        if folder is not None:
            result._cache = _KeptCode(function)  # as `cache=True` does with numba's own
    finally:
        settings.CACHE_DIR = before
    return result
