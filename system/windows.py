"""What Windows tells of processes and memory, which Python does not ask it: `kernel32` by ctypes.

On other systems each function says that it does not know.
"""

from __future__ import annotations

import ctypes
from ctypes import c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

QUERY = 0x1000  # PROCESS_QUERY_LIMITED_INFORMATION
STILL_ACTIVE = 259
ACCESS_DENIED = 5


class _ProcessMemory(ctypes.Structure):  # PROCESS_MEMORY_COUNTERS
    _fields_ = [
        ("cb", c_uint32),
        ("faults", c_uint32),
        ("peak", c_size_t),
        ("resident", c_size_t),
        *((f"other_{number}", c_size_t) for number in range(6)),
    ]


class _MachineMemory(ctypes.Structure):  # MEMORYSTATUSEX
    _fields_ = [
        ("length", c_uint32),
        ("load", c_uint32),
        ("physical", c_uint64),
        *((f"other_{number}", c_uint64) for number in range(6)),
    ]


def _kernel() -> Any:
    """kernel32, its functions typed; None elsewhere."""
    load = getattr(ctypes, "WinDLL", None)
    if load is None:
        return None
    kernel = load("kernel32", use_last_error=True)
    kernel.OpenProcess.argtypes = (c_uint32, ctypes.c_int, c_uint32)
    kernel.OpenProcess.restype = c_void_p
    kernel.GetCurrentProcess.restype = c_void_p
    kernel.CloseHandle.argtypes = (c_void_p,)
    kernel.GetExitCodeProcess.argtypes = (c_void_p, c_void_p)
    kernel.GetProcessTimes.argtypes = (c_void_p,) * 5
    kernel.K32GetProcessMemoryInfo.argtypes = (c_void_p, c_void_p, c_uint32)
    kernel.GlobalMemoryStatusEx.argtypes = (c_void_p,)
    return kernel


def process_memory() -> tuple[int, int]:
    """Bytes that this process holds now, and held at most; 0 for what is not known."""
    kernel, found = _kernel(), _ProcessMemory()
    found.cb = ctypes.sizeof(found)
    if kernel is None or not kernel.K32GetProcessMemoryInfo(
        kernel.GetCurrentProcess(), ctypes.byref(found), found.cb
    ):
        return 0, 0
    return found.resident, found.peak


def machine_memory() -> int:
    """Bytes of the machine's memory; 0 for not known."""
    kernel, found = _kernel(), _MachineMemory()
    found.length = ctypes.sizeof(found)
    if kernel is None or not kernel.GlobalMemoryStatusEx(ctypes.byref(found)):
        return 0
    return found.physical


def born(process: int) -> str:
    """When a process that runs was born, in units of 100 ns; "?" for one that may not be asked, and
    empty for none."""
    kernel = _kernel()
    if kernel is None or not 0 < process < 2**32:
        return ""
    handle = kernel.OpenProcess(QUERY, 0, process)
    if not handle:
        return "?" if ctypes.get_last_error() == ACCESS_DENIED else ""  # type: ignore[attr-defined]
    code = c_uint32()
    times = [c_uint64() for _ in range(4)]  # created, ended, in the kernel, outside of it
    try:
        if not kernel.GetExitCodeProcess(handle, ctypes.byref(code)) or code.value != STILL_ACTIVE:
            return ""
        if not kernel.GetProcessTimes(handle, *map(ctypes.byref, times)):
            return "?"
        return str(times[0].value)
    finally:
        kernel.CloseHandle(handle)
