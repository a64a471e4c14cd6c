"""The machine that figures were seen on, in the words that a figure needs beside it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

TOLD = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")  # of a processor's abilities


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, load, date and versions of what computes; Linux only.

    "load" is the number of processes that wanted a core in the last minute: over 0.5 the machine
    was busy before the benchmark began.
    """
    lines = [
        line.partition(":")
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    ]
    facts = {name.strip(): value.strip() for name, _, value in lines}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    family = f"family {facts.get('cpu family')} model {facts.get('model')}"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": f"{facts.get('model name', platform.machine())} ({family})",
        "instructions": [name for name in TOLD if name in facts.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "bitsandbytes", "numba")
        },
    }
