"""How much memory there is, and how much of it this process has."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from pathlib import Path

from system import windows

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
UNKNOWN = 8 * 2**30  # bytes that a machine is taken to have which does not say
M_ARENA_MAX = -8  # of glibc's mallopt


def peak() -> int:
    """The most memory in bytes that this process has held; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        # Not ru_maxrss: a started process inherits the peak of the one that started it.
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024
    if resource is None:
        return windows.process_memory()[1]
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident() -> int:
    """Memory in bytes that this process holds now; where the system does not tell, the most that
    it ever held."""
    return _pages(1) or windows.process_memory()[0] or peak()


def mapped() -> int:
    """Bytes of addresses that this process has taken; 0 where the system does not say."""
    return _pages(0)


def _pages(which: int) -> int:
    """Bytes that this process has mapped (0) or resident (1); 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[which]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):
        return 0


def of_machine() -> int:
    """Bytes of memory of the machine, or of the container, if that has less."""
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):  # a system without these names
        sizes = [windows.machine_memory() or UNKNOWN]
    for path in map(Path, CONTAINER_LIMITS):
        if path.is_file() and (said := path.read_text("ascii").strip()).isdigit():  # else "max"
            sizes.append(int(said))
    return min(sizes)


def use_large_pages(address: int, length: int) -> None:
    """Ask Linux to keep this memory in pages of 2 MiB: it is there in a third of the time, and read
    faster too. A system without them takes small ones."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return
    page = mmap.PAGESIZE
    start = -(-address // page) * page
    end = (address + length) // page * page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def share_heaps() -> None:
    """Have all threads take memory from two heaps. By default glibc gives eight to a core, and each
    keeps what its threads freed: a server that has had many questions at once stays large."""
    if os.name == "posix":
        with contextlib.suppress(AttributeError):  # another C library, which has no such setting
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
