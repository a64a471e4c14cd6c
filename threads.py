"""How the threads of torch's OpenMP wait for each other; imported before torch, by every command.

Nothing here imports torch: OpenMP reads its settings once, when torch is loaded.
"""

from __future__ import annotations

import os

SPINS = 1000  # a few microseconds
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def _let_waiting_threads_sleep() -> None:
    """Have a thread that waits for the others spin for a few microseconds, and then sleep.

    By itself libgomp, which torch's wheels bring, spins for milliseconds at the end of each
    operation. Where other programs run, the thread that spins keeps the one that it waits for from
    its core: see benchmarks/RESULTS.md. What the person set stays.
    """
    if not any(setting in os.environ for setting in SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


_let_waiting_threads_sleep()
