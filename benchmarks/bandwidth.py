"""How fast this machine reads its memory: the limit of decoding, which reads all weights a token.

    python -m benchmarks.bandwidth '{"threads": 2}'

Threads read an array far larger than the caches, each its own part, and add up what they read.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from benchmarks import measuring
from errors import PhiSightError

BYTES = 1 << 29  # many times the last cache
PASSES = 7


@numba.njit(nogil=True)
def added(numbers: np.ndarray) -> int:
    """The sum of (count,) int64."""
    total = 0
    for number in numbers:
        total += number
    return total


def read_all(numbers: np.ndarray, threads: int) -> tuple[int, float]:
    """The sum of (count,) int64, read by `threads` threads at once, and the seconds of it."""
    parts = np.array_split(numbers, threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(added, [part[:1] for part in parts]))  # compiled, and the threads are there
        started = time.perf_counter()
        total = sum(pool.map(added, parts))
        return int(total), time.perf_counter() - started


def read_bandwidth(threads: int, size: int = BYTES, passes: int = PASSES) -> float:
    """GB/s (10^9 bytes) of the fastest of some passes over an array of `size` bytes.

    Raises `PhiSightError` when a sum is wrong: what is not read is not measured.
    """
    numbers = np.arange(size // 8, dtype=np.int64)
    expected = len(numbers) * (len(numbers) - 1) // 2
    best = float("inf")
    for _ in range(passes):
        total, seconds = read_all(numbers, threads)
        if total != expected:
            raise PhiSightError(f"bandwidth: read {total}, not {expected}; check the memory")
        best = min(best, seconds)
    return numbers.nbytes / best / 1e9


if __name__ == "__main__":
    measuring.report({"gb_per_second": read_bandwidth(measuring.argument()["threads"])})
